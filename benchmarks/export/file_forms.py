"""Compare files of CIFAR ResNet-18 with those of an earlier version: bytes, peak memory and time of a load.

    git worktree add --detach old COMMIT
    python -m benchmarks file-forms --old old --checkpoint s2ap-run/finetune/model.safetensors

Random weights under random masks with a uniform budget and with ERK's, at 90, 95 and 99 %, half of the
channels removed, and with --checkpoint the masks of searches. Each file is loaded by ONNX Runtime in fresh
processes in turn with the dense one; the figures are medians of what a load adds to the process. Also the
bytes of the saved network under zip's compression, with the signs that weights x mask leaves on zeros and
without.
"""

import argparse
import statistics
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from safetensors.torch import save

from benchmarks.lib import arguments, networks, results
from s2ap_deploy.models.channels.coupling import channel_groups
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.benchmark import peaks
from s2ap_deploy.onnx_export.dead_channels.compact import compact
from s2ap_deploy.onnx_export.encoding import arrays, decode, encode
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.quantization import quantize

BUDGETS = {"random": "uniform", "erk": "erk"}
OLD = """
import sys, onnx
from s2ap_deploy.onnx_export.encoding import encode
onnx.save(encode(onnx.load(sys.argv[1]))[0], sys.argv[2])
"""
LOAD = """
import sys, time, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
started = time.perf_counter()
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = arguments.parser(__doc__, "file-forms", "work")
    parser.add_argument("--old", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="pruned files of this tool")
    parser.add_argument("--processes", type=int, default=5)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def add(mask: str, model: ModelProto) -> None:
        rows.append({"mask": mask} | row(args, model))
        print(rows[-1], flush=True)
        results.write(args.name, {"rows": rows, "compressed": compressed()})

    for sparsity in (0.9, 0.95, 0.99):
        for mask, budget in BUDGETS.items():
            add(f"{mask} {sparsity:.0%}", to_onnx(pruned(sparsity, budget), networks.CIFAR))
    half = compact(to_onnx(half_of_the_channels(), networks.CIFAR))[0]
    add("channels 50%", half)
    pixels = networks.images(16, networks.CIFAR).tensors()[0].numpy()
    add("channels 50%, int8", quantize(half, pixels))
    add("random 90%, int8", quantize(to_onnx(pruned(0.9, "uniform"), networks.CIFAR), pixels))
    for path in args.checkpoint:
        classifier, info = checkpoint.load(path)[:2]
        add(f"search {info.sparsity:.0%}, {info.arch}", to_onnx(classifier, info.preprocessing.size))


def pruned(sparsity: float, budget: str) -> Classifier:
    return networks.pruned("cifar-resnet18", sparsity, budget)


def half_of_the_channels() -> Classifier:
    """A random network in which half of each group's channels are zero."""
    classifier, size = networks.network("cifar-resnet18")
    with torch.no_grad():
        for group in channel_groups(classifier.eval(), size).groups:
            for touched in group.writers:
                first = touched.index[: group.channels // 2].flatten()
                classifier.state_dict()[touched.parameter].index_fill_(touched.dim, first, 0.0)
    return classifier


def row(args: argparse.Namespace, model: ModelProto) -> dict[str, Any]:
    """Bytes, and medians of added peak bytes and seconds of a load, of the dense, new and old form."""
    paths = {form: args.work / f"{form}.onnx" for form in ("dense", "new", "old")}
    onnx.save(model, paths["dense"])
    coded, table = encode(model)
    onnx.save(coded, paths["new"])
    if args.old is None:
        del paths["old"]
    else:
        command = [sys.executable, "-c", OLD, str(paths["dense"].resolve()), str(paths["old"].resolve())]
        subprocess.run(command, check=True, cwd=args.old, env={"PYTHONPATH": str(args.old.resolve())})
    expected = arrays(model.graph.initializer)
    found: dict[str, Any] = {}
    measured: dict[str, list[tuple[float, float]]] = {form: [] for form in paths}
    for _ in range(args.processes):
        for form, path in paths.items():
            bare, loaded, _ = peaks(path, 1)
            done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, check=True)
            measured[form].append((loaded - bare, float(done.stdout)))
    for form, path in paths.items():
        memory, seconds = zip(*measured[form], strict=True)
        found[form] = {
            "bytes": path.stat().st_size,
            "load_mib": round(statistics.median(memory) / 2**20, 1),
            "load_seconds": round(statistics.median(seconds), 3),
        }
    decoded = arrays(decode(coded).graph.initializer)
    found["same_bits"] = all(decoded[name].tobytes() == array.tobytes() for name, array in expected.items())
    kinds = sorted({each.encoding for each in table})
    return {**found, "forms": {kind: sum(each.encoding == kind for each in table) for kind in kinds}}


def compressed() -> dict[str, int]:
    """Bytes of a saved ResNet-18 at 90 %, whole and compressed, with -0.0 and with +0.0 in pruned places."""
    classifier = pruned(0.9, "uniform")
    dense = networks.network("cifar-resnet18")[0]
    state = classifier.state_dict()
    signed = {
        name: dense.state_dict()[name] * (tensor != 0) if tensor.dim() > 1 else tensor
        for name, tensor in state.items()
    }
    plain = {name: tensor + 0.0 if tensor.is_floating_point() else tensor for name, tensor in signed.items()}
    forms = {"signed": save(signed), "plain": save(plain)}
    sizes = {name: len(data) for name, data in forms.items()}
    return sizes | {f"{name}_deflate_6": len(zlib.compress(data, 6)) for name, data in forms.items()}
