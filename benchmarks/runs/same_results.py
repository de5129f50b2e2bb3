"""Compare two checkouts bit by bit: tensors, verdicts per image, decoded ONNX weights, gate verdicts.

    python -m benchmarks same-results record CHECKOUT before.json --shared ../shared
    python -m benchmarks same-results compare before.json after.json

``record`` runs the command line of a checkout in subprocesses of one thread. Finished runs are kept in
``--work`` and in the JSON file, so that an interrupted recording continues. ``compare`` pairs values by name
first and by content where a name is on one side only, so that renamed files and keys do not count as
differences. Of the run on two ranks it needs equal values or, failing that, a distance from the run on one
rank that did not grow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
FINISHED = (0, 1, 3)  # exit codes of a finished command: passed, failed, inconclusive
DISTANCE = 1.1  # how much further apart one and two ranks may be than before
# One short run for each base method, loss, budget, granularity, protocol and encoding, on the digits.
# name: options of prune, of certify, of export
VARIANTS = {
    "harp": ("--sparsity 0.9 --method harp", "--protocol plus", "--encoding gaps"),
    "hydra-trades-global": (
        "--sparsity 0.9 --method hydra --budget global --loss trades",
        "--provable --curve",
        "--encoding mask",
    ),
    "rst-accumulate": ("--sparsity 0.8 --method rst --accumulate 2", "--protocol rand", "--encoding coo"),
    "magnitude-mart": ("--sparsity 0.9 --method magnitude --loss mart", "--protocol quick", "--values f16"),
    "random-fast-awp": (
        "--sparsity 0.8 --method random --loss fast --awp-gamma 0.01",
        "--first",
        "--encoding dense",
    ),
    "steps-free-distill": (
        "--steps 0.5,0.8 --sparsity 0.9 --method hydra --loss free --distill 0.5 --dense-ends",
        "--attack-seed 1",
        "--values int8",
    ),
    "macs-bf16": (
        "--sparsity 0.9 --method hydra --budget macs --precision bf16",
        "--sample-seed 3",
        "--encoding ef",
    ),
    "n-of-m": ("--granularity 2:4", "--protocol quick", "--no-compact --batch 1"),
    "l2": ("--sparsity 0.9 --norm L2 --eps 0.5", "", "--int8"),
    "l1": ("--sparsity 0.9 --norm L1 --eps 1.5 --no-s2ap", "", "--opset 18"),
}


class Recorder:
    """Runs commands of one checkout below ``work`` and collects what they computed."""

    def __init__(self, checkout: Path, work: Path, shared: Path) -> None:
        self.checkout, self.work, self.shared = checkout.resolve(), work.resolve(), shared.resolve()
        self.work.mkdir(parents=True, exist_ok=True)

    def deploy(self, *arguments: Any) -> int:
        """Run one command; its exit code. Raises SystemExit if the command did not finish."""
        command = [sys.executable, "-m", "s2ap_deploy", *map(str, arguments)]
        environment = {
            **os.environ,
            **dict.fromkeys(THREADS, "1"),
            "PYTHONPATH": str(self.checkout),
            "S2AP_DATA_ROOT": str(self.shared / "data"),
        }
        with (self.work / "commands.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command[1:])}\n")
            log.flush()
            done = subprocess.run(command, cwd=self.checkout, env=environment, stdout=log, stderr=log)
        if done.returncode not in FINISHED:
            raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}; see {log.name}")
        return done.returncode

    def in_run(self, run: Path, command: str, *arguments: Any) -> int:
        """Run a command on the run folder ``run`` at one thread."""
        threads = [] if command == "gate" else ["--threads", 1]
        workers = ["--workers", 1] if command in ("run", "certify") else []
        return self.deploy(command, *arguments, "--run", run, *threads, *workers, "--quiet")

    def certify_export_gate(self, run: Path, certify: list[Any], export: list[Any]) -> int:
        """Run the last three stages on a pruned run; the exit code of the gate."""
        self.in_run(run, "certify", *certify)
        self.in_run(run, "export", *export)
        return self.in_run(run, "gate", "--min-robust", 0.3, "--max-drop", 0.1, "--rule", "point")

    def results(self, run: Path, gate: int | None) -> dict[str, Any]:
        """Collect the values below a run folder."""
        return {
            "tensors": tensors(run),
            "verdicts": verdicts(run),
            "onnx": {
                f"{path.relative_to(run)}: {name}": digest(value)
                for path in sorted(run.rglob("*.onnx"))
                for name, value in self.decoded(path).items()
            },
            "gate": {"exit code": gate},
        }

    def decoded(self, path: Path) -> dict[str, NDArray[Any]]:
        """Decode the initializers of an exported file, by name."""
        dense = self.work / "decoded.onnx"
        command = [sys.executable, "-m", "s2ap_deploy", "decode", str(path), "--output", str(dense)]
        environment = {**os.environ, "PYTHONPATH": str(self.checkout)}
        done = subprocess.run([*command, "--overwrite"], env=environment, capture_output=True)
        # A file whose weights are all stored dense has nothing to decode.
        model = onnx.load(dense if done.returncode == 0 else path)
        return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def demo(recorder: Recorder) -> dict[str, Any]:
    run = recorder.work / "demo"
    return recorder.results(run, recorder.in_run(run, "run", "demo", "--overwrite"))


def demo_two_ranks(recorder: Recorder) -> dict[str, Any]:
    run = recorder.work / "demo-two-ranks"
    return recorder.results(run, recorder.in_run(run, "run", "demo", "--devices", 2, "--overwrite"))


def mnist(recorder: Recorder) -> dict[str, Any]:
    run = recorder.work / "mnist"
    checkpoint = recorder.shared / "checkpoints/mnist_convex_eps0.1.pth"
    arguments = [
        "--sparsity",
        0.9,
        "--data",
        "mnist",
        "--eps",
        0.1,
        "--preset",
        "quick",
        "--s2ap",
        "--seed",
        0,
    ]
    recorder.in_run(run, "prune", checkpoint, *arguments, "--overwrite")
    return recorder.results(run, recorder.certify_export_gate(run, ["--n", 100, "--full"], []))


def channels(recorder: Recorder) -> dict[str, Any]:
    run = recorder.work / "channels"
    dense = pretrained(recorder, 20)
    epochs = ["--search-epochs", 10, "--finetune-epochs", 10, "--batch-size", 64]
    recorder.in_run(
        run, "prune", dense, "--granularity", "channel", "--keep-ratio", 0.5, *epochs, "--overwrite"
    )
    return recorder.results(run, recorder.certify_export_gate(run, ["--n", 50], ["--torch", "--align", 4]))


def int8(recorder: Recorder) -> dict[str, Any]:
    run = recorder.work / "int8"
    recorder.in_run(run, "run", "demo", "--overwrite")
    recorder.in_run(run, "export", "--int8", "--overwrite")
    (exported,) = (path for path in run.rglob("*.onnx") if "int8" in path.name)
    recorder.in_run(run, "certify", "--artifact", exported, "--n", 8)
    return recorder.results(run, recorder.in_run(run, "gate"))


def batchnorm(recorder: Recorder) -> dict[str, Any]:
    data = [
        "--data",
        f"imagefolder:{photographs(recorder)}",
        "--eps",
        "2/255",
        "--batch-size",
        32,
        "--overwrite",
    ]
    dense = recorder.work / "resnet20.safetensors"
    arguments = ["--arch", "cifar-resnet20", "--epochs", 1, "--output", dense]
    recorder.in_run(recorder.work / "batchnorm-dense", "pretrain", *data, *arguments)
    run = recorder.work / "batchnorm"
    epochs = ["--search-epochs", 1, "--finetune-epochs", 1]
    recorder.in_run(run, "prune", dense, *data, "--sparsity", 0.9, *epochs)
    return recorder.results(run, recorder.certify_export_gate(run, ["--n", 8], []))


def photographs(recorder: Recorder) -> Path:
    """Unpack 60 training and 20 test photographs of each class."""
    folder = recorder.work / "cifar10"
    if not folder.exists():
        partial = recorder.work / "cifar10.partial"
        last = {"train": 60, "test": 20}
        with tarfile.open(recorder.shared / "data/cifar10-jpeg.tar.xz") as archive:
            for member in archive:
                parts = Path(member.name).parts
                if len(parts) == 3 and int(Path(parts[2]).stem) < last[parts[0]]:
                    archive.extract(member, partial, filter="data")
        partial.rename(folder)
    return folder


def pretrained(recorder: Recorder, epochs: int) -> Path:
    """Train a dense network on the digits for ``epochs``."""
    dense = recorder.work / f"digits-{epochs}.safetensors"
    data = ["--data", "digits", "--arch", "digits-conv", "--eps", 0.1, "--learning-rate", 0.05]
    arguments = ["--batch-size", 64, "--epochs", epochs, "--output", dense, "--overwrite"]
    recorder.in_run(recorder.work / f"digits-{epochs}", "pretrain", *data, *arguments)
    return dense


def variant(name: str) -> Callable[[Recorder], dict[str, Any]]:
    """A short run of one row of ``VARIANTS``."""
    prune, certify, export = (options.split() for options in VARIANTS[name])

    def record(recorder: Recorder) -> dict[str, Any]:
        run = recorder.work / name
        epochs = ["--search-epochs", 3, "--finetune-epochs", 2, "--warmup-epochs", 1, "--batch-size", 64]
        learned = epochs if not {"magnitude", "random"} & set(prune) else epochs[2:4] + epochs[6:]
        recorder.in_run(run, "prune", pretrained(recorder, 4), *prune, *learned, "--overwrite")
        return recorder.results(run, recorder.certify_export_gate(run, ["--n", 20, *certify], export))

    return record


RUNS: dict[str, Callable[[Recorder], dict[str, Any]]] = {
    "demo": demo,
    "demo-two-ranks": demo_two_ranks,
    "int8": int8,
    "channels": channels,
    "batchnorm": batchnorm,
    "mnist": mnist,
    **{name: variant(name) for name in VARIANTS},
}


def digest(value: NDArray[Any]) -> str:
    """SHA-256 of type, shape and bytes."""
    head = f"{value.dtype.str} {value.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()


def tensors(run: Path) -> dict[str, str]:
    return {
        f"{path.relative_to(run)}: {name}": digest(value)
        for path in sorted(run.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def verdicts(run: Path) -> dict[str, list[Any]]:
    """Per certificate and image: the label, both predictions, and the attack that broke it."""
    found = {}
    for path in sorted(run.rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        samples = record.get("samples") if isinstance(record, dict) else None
        if isinstance(samples, list):
            for sample in samples:
                values = [sample[key] for key in sorted(sample) if key != "id"]
                found[f"{path.relative_to(run)}: {sample['id']}"] = values
            counts = [[row["name"], row["n_in"], row["n_broken"]] for row in record["attacks"]]
            found[f"{path.relative_to(run)}: attacks"] = counts
    return found


def record(args: argparse.Namespace) -> None:
    recorder = Recorder(args.checkout, args.work or args.out.with_suffix(".work"), args.shared)
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for name in args.only or RUNS:
        if name in found:
            continue
        started = time.monotonic()
        found[name] = RUNS[name](recorder)
        found[name]["seconds"] = round(time.monotonic() - started, 1)
        if name.startswith("demo"):
            # The values themselves: of the run on two ranks, the distance counts.
            values = {
                f"{path.relative_to(recorder.work / name)}: {key}": value
                for path in sorted((recorder.work / name).rglob("*.safetensors"))
                for key, value in load_file(path).items()
            }
            save_file(values, args.out.with_name(f"{args.out.stem}-{name}.safetensors"))
        args.out.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        print(f"{name}: {found[name]['seconds']} s", flush=True)


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """The names of values that have no equal on the other side."""
    shared = before.keys() & after.keys()
    yield from (name for name in sorted(shared) if before[name] != after[name])
    # What was renamed is paired by content; a count covers values that occur more than once.
    lost, new = (
        {name: json.dumps(side[name]) for name in side if name not in shared} for side in (before, after)
    )
    left, right = Counter(lost.values()), Counter(new.values())
    yield from (f"{name} (before only)" for name, value in sorted(lost.items()) if left[value] > right[value])
    yield from (f"{name} (after only)" for name, value in sorted(new.items()) if right[value] > left[value])


def distance(file: Path) -> dict[str, float]:
    """How far the run on two ranks is from the run on one: the largest difference, and moved mask bits."""
    one, two = (
        load_file(file.with_name(f"{file.stem}-{name}.safetensors")) for name in ("demo", "demo-two-ranks")
    )
    weights = [name for name in one if "model" in name]
    masks = [name for name in one if "masks" in name]
    return {
        "largest difference of a weight": max(float(np.abs(one[name] - two[name]).max()) for name in weights),
        "mask bits that differ": float(sum(int((one[name] != two[name]).sum()) for name in masks)),
    }


def compare(args: argparse.Namespace) -> None:
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (args.before, args.after))
    failed = False
    print("| run | tensors | verdicts per image | ONNX weights | gate | equal |\n|---|---|---|---|---|---|")
    details = []
    for name in before:
        if name not in after:
            continue
        cells = []
        unequal = 0
        for kind in ("tensors", "verdicts", "onnx", "gate"):
            found = list(differences(before[name][kind], after[name][kind]))
            unequal += len(found)
            details += [f"{name}: {kind}: {each}" for each in found]
            total = len(before[name][kind])
            cells.append(f"{total}" if not found else f"{total}, {len(found)} differ")
        near = unequal == 0 or (name == "demo-two-ranks" and close(args, details))
        failed = failed or not near
        print(f"| {name} | {' | '.join(cells)} | {'yes' if unequal == 0 else 'close' if near else 'NO'} |")
    print("\n".join(details[: args.details]))
    missing = sorted(before.keys() ^ after.keys())
    if missing:
        print(f"on one side only: {', '.join(missing)}")
    sys.exit(1 if failed or missing else 0)


def close(args: argparse.Namespace, details: list[str]) -> bool:
    was, now = distance(args.before), distance(args.after)
    details += [f"demo-two-ranks from demo: {key}: {was[key]:g} before, {now[key]:g} after" for key in was]
    return all(now[key] <= DISTANCE * was[key] for key in was)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("out", type=Path)
    recording.add_argument("--shared", type=Path, required=True)
    recording.add_argument("--work", type=Path, help="run folders; default: beside the JSON file")
    recording.add_argument("--only", nargs="+", choices=list(RUNS))
    recording.set_defaults(command=record)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--details", type=int, default=40, help="how many differences to name")
    comparing.set_defaults(command=compare)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
