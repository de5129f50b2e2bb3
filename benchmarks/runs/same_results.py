"""Compare two checkouts bit by bit: tensors, verdicts per image, decoded ONNX weights, gate verdicts.

    python -m benchmarks same-results record CHECKOUT before.json --shared ../shared
    python -m benchmarks same-results compare before.json after.json

``record`` runs the command line of a checkout in processes of one thread. Finished runs are kept in the JSON
file, so that an interrupted recording continues. ``compare`` pairs values by name first, and by content where
a name is on one side only: renamed files and keys are no differences. The run on two ranks needs equal values
or, failing that, a distance from the run on one rank that did not grow.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.lib import commands
from benchmarks.lib.images import ARCHIVE, unpack

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
FINISHED = (0, 1, 3)  # exit codes of a finished command: passed, failed, inconclusive
KINDS = ("tensors", "verdicts", "onnx", "gate")
DISTANCE = 1.1  # how much further apart one and two ranks may be than before
PHOTOGRAPHS = {"train": 60, "test": 20}  # of each class


def commands_of_runs() -> dict[str, list[str]]:
    """The commands of each run, from ``same_results.toml``."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    variants = table["variants"]
    found: dict[str, list[str]] = table["runs"]
    for name, options in variants["runs"].items():
        filled = dict(zip(("prune", "certify", "export"), options, strict=True))
        filled |= {key: variants[key] for key in ("search", "tune")}  # schedules, which options name
        found[name] = variants["commands"]
        for key, value in filled.items():
            found[name] = [command.replace(f"{{{key}}}", value) for command in found[name]]
    return found


RUNS = commands_of_runs()


def record(args: argparse.Namespace) -> None:
    """Run what the JSON file does not hold yet, and write it after every run."""
    work: Path = (args.work or args.out.with_suffix(".work")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    unpack(args.shared / ARCHIVE, work / "cifar10", PHOTOGRAPHS)
    found = commands.read(args.out) if args.out.exists() else {}
    for name in [each for each in args.only or RUNS if each not in found]:
        started = time.monotonic()
        found[name] = {"commit": commit(args.checkout)}
        found[name] |= results(args.checkout.resolve(), name, work, args.shared.resolve())
        found[name]["seconds"] = round(time.monotonic() - started, 1)
        args.out.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        print(f"{name}: {found[name]['seconds']} s", flush=True)


def commit(checkout: Path) -> str:
    """The commit of a checkout, with ``-dirty`` where files were changed since."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def results(checkout: Path, name: str, work: Path, shared: Path) -> dict[str, Any]:
    """Run the commands of ``name`` and collect the values that they leave."""
    run = work / name
    shutil.rmtree(run, ignore_errors=True)
    for command in RUNS[name]:
        words = [word.format(run=run, work=work, shared=shared) for word in command.split()]
        if words[0] == "copy":
            shutil.copytree(work / words[1], run)
            continue
        words += [] if "--run" in words else ["--run", str(run)]
        words += ["--overwrite"] if words[0] == "pretrain" else []
        words += [] if words[0] == "gate" else ["--threads", "1"]
        words += ["--workers", "1"] if words[0] in ("run", "certify") else []
        code = deploy(checkout, shared, work, *words, "--quiet")
        if code not in FINISHED:
            raise SystemExit(f"exit code {code}: {' '.join(words)}; see {work / 'commands.log'}")
    weights = ((path, decoded(checkout, shared, work, path)) for path in sorted(run.rglob("*.onnx")))
    found = {
        "tensors": {each: digest(value) for each, value in tensors(run).items()},
        "verdicts": verdicts(run),
        "onnx": {
            f"{path.relative_to(run)}: {each}": digest(value)
            for path, values in weights
            for each, value in values.items()
        },
        "gate": {"exit code": code},
    }
    return {**found, "distance": distance(work / "demo", run)} if name == "demo-two-ranks" else found


def deploy(checkout: Path, shared: Path, work: Path, *words: str) -> int:
    """Run one command of the checkout at one thread; its exit code."""
    paths = {"PYTHONPATH": str(checkout), "S2AP_DATA_ROOT": str(shared / "data")}
    environment = {**os.environ, **dict.fromkeys(THREADS, "1"), **paths}
    with (work / "commands.log").open("a", encoding="utf-8") as log:
        print(f"$ {' '.join(words)}", file=log, flush=True)
        command = commands.deploy(*words)
        return subprocess.run(command, cwd=checkout, env=environment, stdout=log, stderr=log).returncode


def tensors(run: Path) -> dict[str, NDArray[Any]]:
    """All tensors below a run folder, by file and name."""
    return {
        f"{path.relative_to(run)}: {name}": value
        for path in sorted(run.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def digest(value: NDArray[Any]) -> str:
    """SHA-256 of type, shape and bytes."""
    head = f"{value.dtype.str} {value.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()


def verdicts(run: Path) -> dict[str, list[Any]]:
    """Per certificate and image: the label, both predictions, and the attack that broke it."""
    found = {}
    for path in sorted(run.rglob("*.json")):
        content = commands.read(path)
        if isinstance(content, dict) and isinstance(content.get("samples"), list):
            for sample in content["samples"]:
                values = [sample[key] for key in sorted(sample) if key != "id"]
                found[f"{path.relative_to(run)}: {sample['id']}"] = values
            counts = [[row["name"], row["n_in"], row["n_broken"]] for row in content["attacks"]]
            found[f"{path.relative_to(run)}: attacks"] = counts
    return found


def decoded(checkout: Path, shared: Path, work: Path, path: Path) -> dict[str, NDArray[Any]]:
    """The initializers of an exported file, by name, after the tool's own ``decode``."""
    dense = work / "decoded.onnx"
    code = deploy(checkout, shared, work, "decode", str(path), "--output", str(dense), "--overwrite")
    model = onnx.load(path if code else dense)  # a file without encoded weights is refused
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def distance(one_rank: Path, two_ranks: Path) -> dict[str, float]:
    """How far the run on two ranks is from the run on one."""
    one, two = tensors(one_rank), tensors(two_ranks)
    models = [name for name in one if "model.safetensors" in name]
    masks = [name for name in one if "masks.safetensors" in name]
    return {
        "largest difference of a weight": max(float(np.abs(one[name] - two[name]).max()) for name in models),
        "mask bits that differ": float(sum(int((one[name] != two[name]).sum()) for name in masks)),
    }


def compare(args: argparse.Namespace) -> None:
    """Print a table and the first differences; exit 1 where there is one."""
    before, after = commands.read(args.before), commands.read(args.after)
    print("| run | tensors | verdicts per image | ONNX weights | gate | equal |\n|---|---|---|---|---|---|")
    details = [f"{name}: on one side only" for name in sorted(before.keys() ^ after.keys())]
    failed = bool(details)
    for name in [name for name in before if name in after]:
        cells, found = [], []
        for kind in KINDS:
            differing = list(differences(before[name][kind], after[name][kind]))
            found += [f"{name}: {kind}: {each}" for each in differing]
            count = len(before[name][kind])
            cells.append(f"{count}, {len(differing)} differ" if differing else f"{count}")
        was, now = (side[name].get("distance", {}) for side in (before, after))
        if found and was:
            details += [
                f"{name}: {key} from one rank: {was[key]:g} before, {now[key]:g} after" for key in was
            ]
        close = bool(was) and all(now[key] <= DISTANCE * was[key] for key in was)
        failed = failed or (bool(found) and not close)
        details += found
        answer = "yes" if not found else "as close as before" if close else "NO"
        print(f"| {name} | {' | '.join(cells)} | {answer} |")
    print("\n".join(details[: args.details]))
    sys.exit(1 if failed else 0)


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """The names of values that have no equal on the other side."""
    shared = before.keys() & after.keys()
    yield from (name for name in sorted(shared) if before[name] != after[name])
    # Renamed values are paired by content; a count covers those that occur more than once.
    lost, new = ({n: json.dumps(side[n]) for n in side if n not in shared} for side in (before, after))
    for mine, other, which in ((lost, new, "before"), (new, lost, "after")):
        left = Counter(mine.values()) - Counter(other.values())
        yield from (f"{name} ({which} only)" for name, value in sorted(mine.items()) if left[value])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = parser.add_subparsers(required=True)
    recording = choices.add_parser("record")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("out", type=Path)
    recording.add_argument("--shared", type=Path, required=True)
    recording.add_argument("--work", type=Path, help="run folders; default: beside the JSON file")
    recording.add_argument("--only", nargs="+", choices=list(RUNS))
    recording.set_defaults(run=record)
    comparing = choices.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--details", type=int, default=40, help="how many differences to name")
    comparing.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)
