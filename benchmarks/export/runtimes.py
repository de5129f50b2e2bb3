"""Try exported files in other runtimes and tools: which read them, and what they answer.

    python3 -m venv tools && tools/bin/pip install onnxruntime onnx onnxsim onnxslim openvino MNN rten-convert
    tools/bin/pip install opencv-python-headless onnxoptimizer onnxconverter-common
    python -m benchmarks runtimes --python tools/bin/python --runs weights=A --shared ../shared --work W

Files of the pruned networks of MNIST runs, float32 and int8, in all encodings and in opsets 20 and 17, in the
packages of one or more environments apart from this one. A row says ok with the largest difference of the
logits from ONNX Runtime's on the dense file, or the last line of what the tool said.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.lib import arguments, results
from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.data import datasets
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.onnx_export.encoding import encode
from s2ap_deploy.onnx_export.graph import lowered, to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize

IMAGES = 32
TIMEOUT = 120
HEAD = """
import sys, numpy as np
path, folder = sys.argv[1:3]
images, expected = np.load(folder + "/images.npy"), np.load(folder + "/expected.npy")
def judged(found):
    print("ok", float(np.abs(np.asarray(found, np.float32).reshape(expected.shape) - expected).max()))
def ort(where):
    import onnxruntime
    running = onnxruntime.InferenceSession(where, providers=["CPUExecutionProvider"])
    judged(running.run(None, {running.get_inputs()[0].name: images})[0])
"""
TOOLS = {
    "onnxruntime": "ort(path)",
    "onnxsim": "import onnx, onnxsim\nm, _ = onnxsim.simplify(onnx.load(path)); ort(m.SerializeToString())",
    "onnxslim": "import onnxslim\nort(onnxslim.slim(path).SerializeToString())",
    "onnxoptimizer": """
import onnx, onnxoptimizer
ort(onnxoptimizer.optimize(onnx.load(path)).SerializeToString())
""",
    "openvino": """
import openvino
core = openvino.Core()
compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
judged(compiled([images])[0])
""",
    "opencv": """
import cv2
print(cv2.__version__)
net = cv2.dnn.readNetFromONNX(path)
net.setInput(images)
judged(net.forward())
""",
    "MNN": """
import os, subprocess
target = folder + "/model.mnn"
if os.path.exists(target): os.remove(target)
convert = os.path.join(os.path.dirname(sys.executable), "mnnconvert")
command = [convert, "-f", "ONNX", "--modelFile", path, "--MNNModel", target]
subprocess.run(command, capture_output=True, env={"PATH": folder})  # it would install a package by pip
if not os.path.exists(target): raise SystemExit("converter wrote no file")
import MNN.nn, MNN.expr, MNN.numpy
net = MNN.nn.load_module_from_file(target, ["image"], ["logits"])
given = MNN.expr.const(images, list(images.shape), MNN.expr.NCHW)
judged(np.array(MNN.expr.convert(net.forward(given), MNN.expr.NCHW).read()))
""",
    "rten-convert": """
import os, subprocess
target = folder + "/model.rten"
convert = os.path.join(os.path.dirname(sys.executable), "rten-convert")
done = subprocess.run([convert, path, target], capture_output=True, text=True)
if done.returncode: raise SystemExit(done.stderr.strip().splitlines()[-1])
print("ok converted")
""",
    "onnx.reference": """
from onnx.reference import ReferenceEvaluator
judged(ReferenceEvaluator(path).run(None, {"image": images})[0])
""",
    "onnx2torch": """
import onnx2torch, torch
judged(onnx2torch.convert(path).eval()(torch.from_numpy(images)).detach().numpy())
""",
}


def main() -> None:
    parser = arguments.parser(__doc__, "runtimes", "shared", "work")
    parser.add_argument("--python", type=Path, nargs="+", required=True, help="interpreters with the tools")
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="finished MNIST runs")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pixels = datasets.load("mnist", root=args.shared / "data").test.subset(range(IMAGES)).tensors()[0].numpy()
    np.save(args.work / "images.npy", pixels)
    rows: list[dict[str, Any]] = []
    for name, folder in (each.split("=", 1) for each in args.runs):
        classifier = checkpoint.load(Path(folder) / "finetune" / "model.safetensors")[0].eval()
        for form, model in forms(classifier, pixels).items():
            np.save(args.work / "expected.npy", logits(session(model.SerializeToString()), pixels))
            for encoding in ("auto", *(each.name for each in CODECS.values() if each.selectable)):
                path = args.work / "file.onnx"
                onnx.save(encode(model, encoding=encoding)[0], path)
                found = {"network": name, "form": form, "encoding": encoding, "bytes": path.stat().st_size}
                for python in args.python:
                    for tool in args.tools:
                        answer = tried(python, tool, path)
                        if answer is not None:
                            found[tool if tool not in found else f"{tool}, {python.parts[-3]}"] = answer
                rows.append(found)
                print(json.dumps(found), flush=True)
                results.write(args.name, {"images": IMAGES, "rows": rows})


def forms(classifier: Any, pixels: np.ndarray) -> dict[str, onnx.ModelProto]:
    """The dense graphs: float32 and int8, in the default opset and in 17."""
    size = pixels.shape[1:]
    plain, low = to_onnx(classifier, size), to_onnx(classifier, size, opset=18)
    return {
        "float32": plain,
        "float32, opset 17": lowered(low),
        "int8": quantize(plain, pixels),
        "int8, opset 17": lowered(quantize(low, pixels)),
    }


def tried(python: Path, tool: str, path: Path) -> str | None:
    """What a tool makes of the file; None where it is not installed there."""
    command = [str(python), "-c", HEAD + TOOLS[tool], str(path.resolve()), str(path.parent.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("ok"):
        return lines[-1]
    said = (done.stderr.strip().splitlines() or lines or [""])[-1]
    if "ModuleNotFoundError" in said:
        return None
    return f"refused ({done.returncode}): {said[:160]}"
