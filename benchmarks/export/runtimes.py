"""Try exported files in other runtimes and tools: which read them, and what they answer.

    python3 -m venv tools && tools/bin/pip install -e '.[tools]' onnxoptimizer onnx2torch openvino tract
    tools/bin/pip install pnnx ncnn iree-base-compiler iree-base-runtime
    python -m benchmarks runtimes --python tools/bin/python --runs weights=A --shared ../shared --work W

Files of the pruned networks of MNIST runs, float32 and int8, in all encodings and in opsets 20 and 17, in the
packages of one or more environments apart from this one. A row says ok with the largest difference of the
logits from ONNX Runtime's on the dense file, or the end of what the tool said. What has been tried is not
tried again.
"""

import subprocess
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.lib import arguments, commands, results
from s2ap_deploy import files
from s2ap_deploy.codecs.registry import ENCODINGS
from s2ap_deploy.data import datasets
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.onnx_export.dead_channels.compact import compact
from s2ap_deploy.onnx_export.encoding import encode
from s2ap_deploy.onnx_export.graph import lowered, to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.quantization import quantize

IMAGES = 32
TIMEOUT = 900
HEAD = """
import os, subprocess, sys, numpy as np
folder = sys.argv[1]
images, expected = np.load(folder + "/images.npy"), np.load(folder + "/expected.npy")
def program(name, *arguments):
    command = [os.path.join(os.path.dirname(sys.executable), name), *arguments]
    # Without a pip in PATH, which MNN's converter would call.
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": folder})
    if done.returncode: raise SystemExit((done.stderr.strip().splitlines() or ["no word"])[-1])
def fresh(name):
    if os.path.exists(folder + name): os.remove(folder + name)
    return folder + name
def ort(where):
    import onnxruntime
    running = onnxruntime.InferenceSession(where, providers=["CPUExecutionProvider"])
    return running.run(None, {running.get_inputs()[0].name: images})[0]
def answer(path):
"""
TAIL = """
for path in sys.argv[2:]:
    print("file", flush=True)
    try:
        found = answer(path)
        if found is not None:
            found = float(np.abs(np.asarray(found, np.float32).reshape(expected.shape) - expected).max())
        print("answer ok", "converted" if found is None else found, flush=True)
    except BaseException as error:
        said = [type(error).__name__, *str(error).split()]
        missing = said[0] == "ModuleNotFoundError"
        print("answer", "not installed" if missing else " ".join(said)[-200:], flush=True)
"""
TOOLS = {
    "onnxruntime": "return ort(path)",
    "onnxsim": "import onnx, onnxsim\nreturn ort(onnxsim.simplify(onnx.load(path))[0].SerializeToString())",
    "onnxslim": "import onnxslim\nreturn ort(onnxslim.slim(path).SerializeToString())",
    "onnxoptimizer": """
import onnx, onnxoptimizer
return ort(onnxoptimizer.optimize(onnx.load(path)).SerializeToString())
""",
    "onnxconverter-common float16": """
import onnx
from onnxconverter_common import float16
return ort(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True).SerializeToString())
""",
    "quantize_static": """
from onnxruntime import quantization
class Reader(quantization.CalibrationDataReader):
    batches = iter([{"image": images}])
    def get_next(self): return next(self.batches, None)
quantization.quantize_static(path, fresh("/quantized.onnx"), Reader(), per_channel=True)
return ort(folder + "/quantized.onnx")
""",
    "openvino": """
import openvino
compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
return compiled([images])[0]
""",
    "opencv 5": """
import cv2
if cv2.__version__[0] != "5": raise ModuleNotFoundError
net = cv2.dnn.readNetFromONNX(path)
net.setInput(images)
return net.forward()
""",
    "opencv 4": """
import cv2
if cv2.__version__[0] != "4": raise ModuleNotFoundError
net = cv2.dnn.readNetFromONNX(path)
def one(image):  # more images at once give other answers with int8
    net.setInput(image[None])
    return net.forward()[0]
return np.stack([one(image) for image in images])
""",
    "MNN": """
target = fresh("/model.mnn")
program("mnnconvert", "-f", "ONNX", "--modelFile", path, "--MNNModel", target)
if not os.path.exists(target): raise SystemExit("exit code 0 and no file")
import MNN.nn, MNN.expr, MNN.numpy
net = MNN.nn.load_module_from_file(target, ["image"], ["logits"])
given = MNN.expr.const(images, list(images.shape), MNN.expr.NCHW)
return np.array(MNN.expr.convert(net.forward(given), MNN.expr.NCHW).read())
""",
    "rten-convert": """
from rten_convert import converter
sys.argv = ["rten-convert", path, fresh("/model.rten")]
converter.main()
""",
    "onnx.reference": """
from onnx.reference import ReferenceEvaluator
return ReferenceEvaluator(path).run(None, {"image": images})[0]
""",
    "onnx2torch": """
import onnx2torch, torch
return onnx2torch.convert(path).eval()(torch.from_numpy(images)).detach().numpy()
""",
    "tract": """
import tract
model = tract.onnx().load(path)
model.set_input_fact(0, ",".join(map(str, images.shape)) + ",f32")
return model.into_model().into_runnable().run([images])[0].to_numpy()
""",
    "pnnx, ncnn": """
import ncnn
param, weights = fresh("/model.ncnn.param"), fresh("/model.ncnn.bin")
options = [f"{kind}={folder}/model.{name}" for kind, name in [("pnnxparam", "pnnx.param"),
    ("pnnxbin", "pnnx.bin"), ("pnnxpy", "pnnx.py"), ("pnnxonnx", "pnnx.onnx"), ("ncnnpy", "ncnn.py")]]
shape = "[" + ",".join(map(str, (1, *images.shape[1:]))) + "]f32"
program("pnnx", path, "inputshape=" + shape, "fp16=0", f"ncnnparam={param}", f"ncnnbin={weights}", *options)
net = ncnn.Net()
net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
if net.load_param(param) or net.load_model(weights): raise SystemExit("ncnn cannot load what pnnx wrote")
def one(image):
    running = net.create_extractor()
    running.input("in0", ncnn.Mat(image))
    return np.array(running.extract("out0")[1])
return np.stack([one(image) for image in images])
""",
    "iree": """
import iree.compiler.tools, iree.runtime
program("iree-import-onnx", path, "-o", fresh("/model.mlir"))
options = ["--iree-llvmcpu-target-cpu=host"]
code = iree.compiler.tools.compile_file(
    folder + "/model.mlir", target_backends=["llvm-cpu"], input_type="onnx", extra_args=options
)
config = iree.runtime.Config("local-sync")
module = iree.runtime.load_vm_module(iree.runtime.VmModule.copy_buffer(config.vm_instance, code), config)
names = module.vm_module.function_names
name = next(each for each in names if not each.endswith("$async") and each[0] != "_")
return module[name](images).to_host()
""",
}
FORMS = ("float32", "float32, opset 17", "int8", "int8, opset 17")
PACKAGES = (
    *(
        "onnx",
        "onnxruntime",
        "onnxsim",
        "onnxslim",
        "onnxoptimizer",
        "onnxconverter-common",
        "openvino",
        "mnn",
    ),
    *("opencv-python-headless", "rten-convert", "onnx2torch", "torch", "tract", "pnnx", "ncnn"),
    *("iree-base-compiler", "iree-base-runtime"),
)
# What is tried on some forms alone: these read nothing newer than opset 17, those take long or want floats.
ONLY = {
    "onnx2torch": FORMS[1::2],
    "opencv 4": FORMS[1::2],
    "onnxsim": FORMS[::2],
    "pnnx, ncnn": FORMS[::2],
    "iree": FORMS[::2],
    "onnxconverter-common float16": FORMS[:1],
    "quantize_static": FORMS[:1],
}
DENSE_ALONE = ("onnx2torch", "opencv 4")  # these know no ScatterElements or no CumSum
# The dense file is refused as well, so that no encoding could avoid it.
REFUSED = {
    **{("MNN", form): "its converter ends with an error or writes no file" for form in FORMS[2:]},
    **{("pnnx, ncnn", form): "ncnn does not know the operators that pnnx writes" for form in FORMS[2:]},
    ("onnx2torch", FORMS[3]): "no QuantizeLinear",
    ("onnx.reference", FORMS[3]): "no DequantizeLinear before opset 19",
}


def main() -> None:
    parser = arguments.parser(__doc__, "runtimes", "shared", "work")
    parser.add_argument("--python", type=Path, nargs="+", required=True, help="interpreters with the tools")
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="finished MNIST runs")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pixels = datasets.load("mnist", root=args.shared / "data").test.subset(range(IMAGES)).tensors()[0].numpy()
    np.save(args.work / "images.npy", pixels)
    kept = args.work / "runtimes.json"
    rows: dict[str, dict[str, Any]] = commands.read(kept) if kept.exists() else {}
    versions = sorted({each for python in args.python for each in installed(python)})
    for name, folder in (each.split("=", 1) for each in args.runs):
        classifier = checkpoint.load(Path(folder) / "finetune" / "model.safetensors")[0].eval()
        for form, model in forms(classifier, pixels).items():
            if form not in args.forms:
                continue
            np.save(args.work / "expected.npy", logits(session(model.SerializeToString()), pixels))
            made = {
                f"{name}, {form}, {encoding}": args.work / f"{encoding}.onnx" for encoding in args.encodings
            }
            for key, path in made.items():
                onnx.save(encode(model, encoding=path.stem)[0], path)
                rows.setdefault(key, {"bytes": path.stat().st_size})
            for tool in args.tools:
                left = {key: path for key, path in made.items() if tool not in rows[key]}
                if not left or form not in ONLY.get(tool, FORMS):
                    continue
                for python in args.python:
                    answers = tried(python, tool, list(left.values()))
                    for key, answer in zip(left, answers, strict=True):
                        if answer != "not installed":
                            rows[key][tool] = answer
                            print(key, tool, answer, flush=True)
                files.write_json(kept, rows)
                results.write(args.name, {"images": IMAGES, "tools": versions, "rows": rows})
    print(table(rows))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a table in Markdown: the largest difference from the dense file, or that it was refused."""
    columns = [tool for tool in TOOLS if any(tool in row for row in rows.values())]
    lines = [f"| file | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key, row in rows.items():
        cells = [row.get(tool, "-") for tool in columns]
        cells = [
            f"{float(cell[3:]):.1g}" if cell[3:4].isdigit() and cell[:2] == "ok" else cell for cell in cells
        ]
        cells = [cell if cell[:1].isdigit() or cell[:2] in ("ok", "-") else "refused" for cell in cells]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def installed(python: Path) -> list[str]:
    """The packages of an environment that the tools come from, with their versions."""
    code = f"""
from importlib import metadata
for each in metadata.distributions():
    if each.name.lower() in {PACKAGES}: print(f"{{each.name}}=={{each.version}}")
"""
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def forms(classifier: Any, pixels: np.ndarray) -> dict[str, onnx.ModelProto]:
    """The dense graphs: float32 and int8, in the default opset and in 17."""
    size = pixels.shape[1:]
    plain, low = (compact(to_onnx(classifier, size, **opset))[0] for opset in ({}, {"opset": 18}))
    models = (plain, lowered(low), quantize(plain, pixels), lowered(quantize(low, pixels)))
    return dict(zip(FORMS, models, strict=True))


def tried(python: Path, tool: str, paths: list[Path]) -> list[str]:
    """What a tool makes of each file: ok and the largest difference, or what it said, or how it ended."""
    code = HEAD + textwrap.indent(TOOLS[tool].strip(), "    ") + TAIL
    answers: list[str] = []
    while len(answers) < len(paths):
        left = [str(path.resolve()) for path in paths[len(answers) :]]
        command = [str(python), "-c", code, str(paths[0].parent.resolve()), *left]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            printed, ended = done.stdout, f"process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            printed, ended = (error.stdout or b"").decode(), f"no answer in {TIMEOUT} s"
        lines = printed.splitlines()
        said = [line.removeprefix("answer ") for line in lines if line.startswith("answer ")]
        answers += said
        if len(said) < len(left):  # the next file ended the process
            answers.append(ended)
    return answers
