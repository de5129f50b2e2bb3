"""Compare the exported ONNX file with PyTorch on all 10,000 MNIST test images.

    python -m benchmarks onnx-agreement --shared ../shared --run work/mnist-prune-0.9-s2ap-0

``--run`` is a run folder of the MNIST network that ``s2ap-deploy export`` has written to.
"""

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.lib import arguments, commands, results
from s2ap_deploy.data import datasets
from s2ap_deploy.models.checkpoints import checkpoint


def main() -> None:
    args = arguments.parser(__doc__, "mnist-onnx", "shared", "run").parse_args()
    images, labels = datasets.load("mnist", root=args.shared / "data").test.tensors()
    classifier, info, _ = checkpoint.load(args.run / "finetune/model.safetensors")
    session = ort.InferenceSession(args.run / "export/model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = torch.cat([classifier(batch) for batch in images.split(500)]).numpy()
    found = np.concatenate([session.run(None, {"image": batch.numpy()})[0] for batch in images.split(500)])
    report = commands.read(args.run / "export/report.json")
    figures = {
        "n": len(labels),
        "sparsity": info.sparsity,
        "same_argmax": int((found.argmax(1) == expected.argmax(1)).sum()),
        "clean_accuracy": float((found.argmax(1) == labels.numpy()).mean()),
        "max_logit_difference": float(np.abs(found - expected).max()),
        "allowed": 1e-5 * max(1.0, float(np.abs(expected).max())),
        **{name: report[name] for name in ("bytes", "dense_bytes", "latency_ratio")},
    }
    results.write(args.name, figures)
