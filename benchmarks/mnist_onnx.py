"""The exported ONNX file against PyTorch on all 10,000 MNIST test images.

    python benchmarks/mnist_onnx.py --shared ../shared --run work/mnist-prune-0.9-s2ap-0

``--run`` is a run folder of the MNIST network that ``s2ap-deploy export --onnx`` has written to.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import result
import torch

from s2ap_deploy.data import datasets
from s2ap_deploy.models.checkpoints import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args()

    images, labels = datasets.load("mnist", root=args.shared / "data").test.tensors()
    classifier, info, _ = checkpoint.load(args.run / "finetune/model.safetensors")
    session = ort.InferenceSession(args.run / "export/model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = torch.cat([classifier(batch) for batch in images.split(500)]).numpy()
    found = np.concatenate([session.run(None, {"image": batch.numpy()})[0] for batch in images.split(500)])
    largest = float(np.abs(expected).max())
    report = json.loads((args.run / "export/report.json").read_text())
    result.write(
        "mnist-onnx",
        {
            "n": len(labels),
            "sparsity": info.sparsity,
            "same_argmax": int((found.argmax(1) == expected.argmax(1)).sum()),
            "clean_accuracy": float((found.argmax(1) == labels.numpy()).mean()),
            "max_logit_difference": float(np.abs(found - expected).max()),
            "allowed": 1e-5 * max(1.0, largest),
            "bytes": report["bytes"],
            "dense_bytes": report["dense_bytes"],
            "latency_ratio": report["latency_ratio"],
        },
    )


if __name__ == "__main__":
    main()
