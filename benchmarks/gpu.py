"""One command for a GPU: the whole path on CIFAR-10 with a ResNet-18, and how fast it is. No network needed.

    python benchmarks/gpu.py --budget 9 --out OUT          (again and again, until it says that all is done)
    python benchmarks/gpu.py --smoke --device cpu          (a few minutes: tiny subset, tiny schedules)

Each call works for at most ``--budget`` minutes and goes on where the last one stopped: a finished piece is
in ``WORK/pieces``, an unfinished stage in its run folder, which ``--resume`` continues. After every piece
``results/gpu.json`` is written anew, and again into ``--out``, with the dense network in parts of 15 MiB
(compressed). On another machine ``--kept FOLDER`` takes both up again.

Order: CIFAR-10 unpacked; a dense network trained adversarially (PGD-10, bf16) and certified; search and
fine-tuning steps against the plain loop in float32 (with torch's own TF32 setting and a data loader of its
own) at two batch sizes, and the device's bf16 rate; certify against pyautoattack, each at several batch
sizes; hydra with and without S2AP at 90 and 99 %: prune, certify, export of each; the same steps compiled,
and certify once more with another seed; then harp, 95 %, another seed, more points. ``summary`` in the JSON
has the figures that somebody looks for first. A piece that fails says so in the JSON and is not tried again
(remove its file to do so).

Needs torch 2.11 or newer; what else the package needs and the machine lacks (pydantic and what it needs,
torch-pruning, pyautoattack) can lie as wheels in a folder that ``--wheels`` names; no pip is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PART = 15 * 2**20
RESERVE = 25.0  # seconds that a stopped command may take to save its state
LEAST = 20.0  # seconds under which nothing is begun


class OutOfTime(Exception):
    """The budget is used up; the next call continues."""


class Failed(Exception):
    """A command of a piece ended with an error, which it has told on stderr."""


class Scale(NamedTuple):
    """How large everything is."""

    arch: str
    per_class: int | None  # images of each class that are unpacked, None: all
    dense_epochs: int
    search_epochs: int
    finetune_epochs: int
    batch: int
    large_batch: int | None  # of the timed steps alone, None: neither that nor compilation
    points: int
    more_points: int
    steps: int
    warm_up: int
    loader: int  # worker processes of the plain loop's data loader
    speed_points: int
    protocol: str
    variants: int | None  # how many networks are pruned, None: all of the plan


FULL = Scale(
    arch="cifar-resnet18",
    per_class=None,
    dense_epochs=30,
    search_epochs=5,
    finetune_epochs=10,
    batch=256,
    large_batch=1024,
    points=500,
    more_points=2000,
    steps=20,
    warm_up=3,
    loader=8,
    speed_points=256,
    protocol="standard",
    variants=None,
)
SMOKE = Scale(
    arch="cifar-resnet20",
    per_class=8,
    dense_epochs=1,
    search_epochs=2,
    finetune_epochs=1,
    batch=16,
    large_batch=None,
    points=4,
    more_points=6,
    steps=1,
    warm_up=1,
    loader=1,
    speed_points=2,
    protocol="quick",
    variants=2,
)
WANTED_FIRST = 4  # networks of the plan that come before everything else about speed


class Bench:
    """Folders, the budget, and the pieces that are done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scale = SMOKE if args.smoke else FULL
        self.end = time.monotonic() + 60 * args.budget
        self.work: Path = args.work.resolve() / ("smoke" if args.smoke else "full")
        self.pieces = self.work / "pieces"
        self.pieces.mkdir(parents=True, exist_ok=True)
        self.data = self.work / "cifar10"
        self.dense = self.work / "dense.safetensors"
        self.parts = self.work / "parts"
        self.name = "gpu-smoke" if args.smoke else "gpu"
        self.device = facts(args.device)

    @property
    def left(self) -> float:
        """Seconds that work may still take."""
        return self.end - time.monotonic() - RESERVE

    def piece(self, name: str, make: Callable[[], Any], least: float = LEAST) -> Any:
        """The piece from an earlier call, or made now where ``least`` seconds are left. Raises OutOfTime."""
        path = self.pieces / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["figures"]
        never = least > 60 * self.args.budget - 2 * RESERVE
        if self.left < (LEAST if self.args.smoke or never else least):
            raise OutOfTime
        print(f"{name} ({self.left / 60:.1f} minutes left)", flush=True)
        started = time.monotonic()
        try:
            if never and not self.args.smoke:
                raise Failed(f"it may take {least:.0f} seconds, more than a call has")
            content = {"figures": make()}
        except Failed as error:
            print(f"{name}: {error}", flush=True)
            content = {"figures": None, "failed": str(error)}
        content["seconds"] = round(time.monotonic() - started, 1)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.rename(path)
        self.write()
        return content["figures"]

    def done(self, *prefixes: str) -> dict[str, Any]:
        """Figures of the pieces with such names that there are."""
        paths = sorted(self.pieces.glob("*.json"))
        found = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))["figures"]
            for path in paths
            if path.stem.startswith(prefixes)
        }
        return {name: figures for name, figures in found.items() if figures is not None}

    def write(self) -> None:
        """All pieces so far as one JSON, in ``results`` and in ``--out``."""
        import result
        from gpu_speed import summary

        found = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(self.pieces.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        }
        content = {"smoke": self.args.smoke, "scale": self.scale._asdict(), "device": self.device}
        content |= {"summary": summary(self)}
        path = result.write(self.name, {**content, "pieces": found})
        if self.args.out is not None:
            self.args.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.args.out / path.name)
            for part in self.parts.glob("*"):
                if not (self.args.out / part.name).exists():
                    shutil.copy(part, self.args.out / part.name)

    def tool(self, *arguments: str, run: str, device: bool = True) -> dict[str, Any]:
        """A command of the tool in a run folder of ours; what it prints as JSON."""
        command = [sys.executable, "-m", "s2ap_deploy", *arguments]
        command += ["--run", str(self.work / run), "--resume", "--json", "--quiet"]
        if device:
            command += ["--device", self.args.device]
        return json.loads(self.process(command))  # type: ignore[no-any-return]

    def process(self, command: list[str], accepted: tuple[int, ...] = (0,)) -> str:
        """Standard output of a process, which is stopped in time to save its state.

        Raises OutOfTime, and Failed for an exit code that is not ``accepted``.
        """
        if self.left < LEAST:
            raise OutOfTime
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            try:
                output, _ = child.communicate(timeout=self.left)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGTERM)
                try:
                    child.communicate(timeout=RESERVE)
                except subprocess.TimeoutExpired:
                    child.kill()
                raise OutOfTime from None
        if child.returncode not in accepted:
            raise Failed(f"{' '.join(command[1:5])} ended with {child.returncode}")
        return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=HERE.parents[1] / "shared/data/cifar10-jpeg.tar.xz")
    parser.add_argument("--work", type=Path, default=HERE.parent / "work/gpu")
    parser.add_argument("--budget", type=float, default=9.0, help="minutes that this call may take")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="also leave the JSON and the dense network here")
    parser.add_argument("--wheels", type=Path, help="packages that this machine lacks")
    parser.add_argument("--kept", type=Path, help="what an earlier machine left with --out")
    args = parser.parse_args()
    if args.wheels is not None:
        add_wheels(args.wheels, args.work.resolve() / "site")
    require_torch()
    if args.device is None:
        args.device = default_device()
    bench = Bench(args)
    if args.kept is not None:
        take_up(bench, args.kept)
    try:
        everything(bench)
    except OutOfTime:
        bench.write()
        print("the budget is used up: call again to go on")
    else:
        print("all is done")


def everything(bench: Bench) -> None:
    """All pieces in their order."""
    import gpu_speed

    if not bench.data.exists():
        unpack(bench.args.archive, bench.data, bench.scale.per_class)
    if bench.piece("dense", lambda: dense(bench)) is None:
        (bench.pieces / "dense.json").unlink()
        raise SystemExit("without a dense network there is nothing to measure")
    points = bench.scale.points
    bench.piece("dense-certificate", lambda: certificate(bench, bench.dense, "dense-certificate", points))
    gpu_speed.steps(bench)
    bench.piece("bf16-rate", lambda: gpu_speed.rate(bench))
    gpu_speed.certify_trials(bench)
    networks = list(itertools.islice(plan(), bench.scale.variants))
    for network in networks[:WANTED_FIRST]:
        bench.piece(network.name, lambda network=network: pruned(bench, network))
    gpu_speed.compiled_steps(bench)
    gpu_speed.certify_pair(bench)
    for network in networks[WANTED_FIRST:]:
        bench.piece(network.name, lambda network=network: pruned(bench, network))
    for network in networks:
        model = bench.work / network.name / "finetune/model.safetensors"
        if model.exists():  # not on a machine that only took up the pieces
            more, count = f"{network.name}-more", bench.scale.more_points
            bench.piece(
                more, lambda model=model, more=more, count=count: certificate(bench, model, more, count)
            )


class Network(NamedTuple):
    """One network to prune."""

    method: str
    sparsity: float
    s2ap: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.sparsity:g}-{'s2ap' if self.s2ap else 'plain'}-{self.seed}"


def plan() -> Iterator[Network]:
    """The most wanted first."""
    for seed in (0, 1):
        for sparsities, methods in (((0.9, 0.99), ("hydra", "harp")), ((0.95,), ("hydra", "harp"))):
            for method, sparsity, s2ap in itertools.product(methods, sparsities, (False, True)):
                yield Network(method, sparsity, s2ap, seed)


def unpack(archive: Path, folder: Path, per_class: int | None) -> None:
    """The images into a folder that takes its name when it is complete; with ``per_class`` only so many."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    taken: dict[str, int] = {}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            parent = str(Path(member.name).parent)
            taken[parent] = taken.get(parent, 0) + member.isfile()
            if per_class is None or not member.isfile() or taken[parent] <= per_class:
                tar.extract(member, partial, filter="data")
    partial.rename(folder)


def dense(bench: Bench) -> dict[str, Any]:
    """Adversarial training from scratch."""
    scale = bench.scale
    found = bench.tool(
        "pretrain",
        *("--arch", scale.arch, "--data", f"imagefolder:{bench.data}", "--eps", "8/255"),
        *("--epochs", str(scale.dense_epochs), "--batch-size", str(scale.batch)),
        run="dense",
    )
    shutil.copy(bench.work / "dense/pretrain/model.safetensors", bench.dense)
    divide(bench.dense, bench.parts)
    history = json.loads((bench.work / "dense/pretrain/history.json").read_text(encoding="utf-8"))
    return {
        "best": found["pretrain"]["best"],
        "history": history,
        **sessions(bench.work / "dense", "pretrain"),
    }


def pruned(bench: Bench, network: Network) -> dict[str, Any]:
    """Search and fine-tuning, then the certificate of the result and its export."""
    scale, name = bench.scale, network.name
    bench.tool(
        "prune",
        str(bench.dense),
        *("--method", network.method, "--sparsity", str(network.sparsity)),
        *("--s2ap" if network.s2ap else "--no-s2ap", "--seed", str(network.seed)),
        *("--data", f"imagefolder:{bench.data}", "--batch-size", str(scale.batch)),
        *("--search-epochs", str(scale.search_epochs), "--finetune-epochs", str(scale.finetune_epochs)),
        run=name,
    )
    model = bench.work / name / "finetune/model.safetensors"
    certified = certificate(bench, model, f"{name}-certificate", scale.points)
    if not (bench.work / name / "export/report.json").exists():
        bench.tool("export", "--onnx", run=name, device=False)
    report = json.loads((bench.work / name / "export/report.json").read_text(encoding="utf-8"))
    return {
        "certificate": certified,
        "stages": {stage: sessions(bench.work / name, stage) for stage in ("search", "finetune")},
        "results": {stage: results(bench.work / name, stage) for stage in ("search", "finetune")},
        "export": report,
    }


def certificate(bench: Bench, model: Path, run: str, points: int) -> dict[str, Any]:
    """AutoAttack on one network alone."""
    found = bench.tool(
        "certify",
        str(model),
        *("--n", str(points), "--protocol", bench.scale.protocol, "--full"),
        *("--data", f"imagefolder:{bench.data}"),
        run=run,
    )
    return {"formal_guarantee": found["formal_guarantee"], "certify": found["certify"]}  # not where it lies


def sessions(run: Path, stage: str) -> dict[str, Any]:
    """How long a stage took, and what it computed with."""
    record = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"][stage]
    return {"seconds": record["seconds"], "environment": record["sessions"][-1]["environment"]}


def results(run: Path, stage: str) -> Any:
    """What a stage reports, without its list of layers."""
    found = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"][stage]["results"]
    return {name: value for name, value in found.items() if name != "layers"}


def divide(path: Path, folder: Path) -> None:
    """A file in compressed parts that a small channel takes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = lzma.compress(path.read_bytes(), preset=1)
    for index, start in enumerate(range(0, len(data), PART)):
        (folder / f"{path.name}.xz.{index}").write_bytes(data[start : start + PART])


def take_up(bench: Bench, folder: Path) -> None:
    """Pieces and dense network of an earlier machine, where this one has none.

    Without its dense network a piece of another one is worth nothing beside those to come.
    """
    parts = sorted(folder.glob(f"{bench.dense.name}.xz.*"), key=lambda path: int(path.suffix[1:]))
    if parts and not bench.dense.exists():
        bench.dense.write_bytes(lzma.decompress(b"".join(part.read_bytes() for part in parts)))
        bench.parts.mkdir(exist_ok=True)
        for part in parts:
            shutil.copy(part, bench.parts / part.name)
    kept = folder / f"{bench.name}.json"
    if not kept.exists() or not bench.dense.exists():
        return
    for name, piece in json.loads(kept.read_text(encoding="utf-8"))["pieces"].items():
        path = bench.pieces / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(piece), encoding="utf-8")


def add_wheels(folder: Path, site: Path) -> None:
    """Unpack wheels, which are archives, and import from them; what this machine has comes first."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path.append(str(site))


def facts(name: str) -> dict[str, Any]:
    """What the device is."""
    import torch

    if not name.startswith("cuda"):
        return {"name": name}
    properties = torch.cuda.get_device_properties(torch.device(name))
    return {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require_torch() -> None:
    """Leave with a sentence where torch is missing or older than 2.11."""
    try:
        import torch
    except ImportError:
        raise SystemExit("benchmarks/gpu.py needs torch 2.11 or newer; there is none here") from None
    major, minor = map(int, torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        raise SystemExit(f"benchmarks/gpu.py needs torch 2.11 or newer, not {torch.__version__}")


if __name__ == "__main__":
    main()
