"""Measure the whole path on one GPU: CIFAR-10 with a ResNet-18, and how fast it is. Needs no network.

    python -m benchmarks gpu --budget 9 --out OUT          (again and again, until it prints "all is done")
    python -m benchmarks gpu --smoke --device cpu          (a few minutes: tiny subset, tiny schedules)

Each call works for at most ``--budget`` minutes and continues where the last one stopped: a finished piece is
in ``WORK/pieces``, an unfinished stage in its run folder, which ``--resume`` continues. After every piece
``results/gpu.json`` is rewritten, and copied to ``--out``, with the dense network in parts of 15 MiB
(compressed). On another machine ``--kept FOLDER`` restores both.

Order: CIFAR-10 unpacked; a dense network trained adversarially (PGD-10, bf16) and certified; search and
fine-tuning steps against the plain loop in float32 (with torch's own TF32 setting and a data loader of its
own) at two batch sizes, and the device's bf16 rate; certify against pyautoattack, each at several batch
sizes; hydra with and without S2AP at 90 and 99 %: prune, certify, export of each; the same steps compiled,
and certify once more with another seed; then harp, 95 %, another seed, more points. ``summary`` in the JSON
has the main figures. A piece that fails is marked in the JSON and not tried again (remove its file to do so).

Needs torch 2.11 or newer; what else the package needs and the machine lacks (pydantic and what it needs,
torch-pruning, pyautoattack) can be wheels in the folder ``--wheels``; no pip is needed.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import speed
from benchmarks.gpu.pieces import ROOT, Bench, OutOfTime, divide, restore
from benchmarks.lib import commands

WANTED_FIRST = 4  # networks of the plan that come before everything else about speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=ROOT.parent / "shared/data/cifar10-jpeg.tar.xz")
    parser.add_argument("--work", type=Path, default=ROOT / "work/gpu")
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
    bench = Bench(args, speed.summary)
    if args.kept is not None:
        restore(bench, args.kept)
    try:
        everything(bench)
    except OutOfTime:
        bench.write()
        print("the budget is used up: call again to go on")
    else:
        print("all is done")


def everything(bench: Bench) -> None:
    """All pieces in their order."""
    from benchmarks.lib.images import unpack  # needs what --wheels may bring

    per_class = bench.scale.per_class
    unpack(bench.args.archive, bench.data, per_class and {"train": per_class, "test": per_class})
    if bench.piece("dense", lambda: dense(bench)) is None:
        (bench.pieces / "dense.json").unlink()
        raise SystemExit("without a dense network there is nothing to measure")
    points = bench.scale.points
    bench.piece("dense-certificate", lambda: certificate(bench, bench.dense, "dense-certificate", points))
    speed.steps(bench)
    bench.piece("bf16-rate", lambda: speed.rate(bench))
    speed.certify_trials(bench)
    networks = list(itertools.islice(plan(), bench.scale.variants))
    for network in networks[:WANTED_FIRST]:
        bench.piece(network.name, lambda network=network: pruned(bench, network))
    speed.compiled_steps(bench)
    speed.certify_pair(bench)
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


def dense(bench: Bench) -> dict[str, Any]:
    """Adversarial training from scratch."""
    scale = bench.scale
    found = bench.tool(
        "pretrain",
        *("--arch", scale.arch, "--data", f"imagefolder:{bench.data}", "--eps", "8/255"),
        *("--epochs", scale.dense_epochs, "--batch-size", scale.batch),
        run="dense",
    )
    shutil.copy(bench.work / "dense/pretrain/model.safetensors", bench.dense)
    divide(bench.dense, bench.parts)
    history = commands.read(bench.work / "dense/pretrain/history.json")
    best = found["pretrain"]["best"]
    return {"best": best, "history": history, **sessions(bench.work / "dense", "pretrain")}


def pruned(bench: Bench, network: Network) -> dict[str, Any]:
    """Search and fine-tuning, then the certificate of the result and its export."""
    scale, name = bench.scale, network.name
    bench.tool(
        "prune",
        bench.dense,
        *("--method", network.method, "--sparsity", network.sparsity),
        *("--s2ap" if network.s2ap else "--no-s2ap", "--seed", network.seed),
        *("--data", f"imagefolder:{bench.data}", "--batch-size", scale.batch),
        *("--search-epochs", scale.search_epochs, "--finetune-epochs", scale.finetune_epochs),
        run=name,
    )
    model = bench.work / name / "finetune/model.safetensors"
    certified = certificate(bench, model, f"{name}-certificate", scale.points)
    if not (bench.work / name / "export/report.json").exists():
        bench.tool("export", "--onnx", run=name, device=False)
    report = commands.read(bench.work / name / "export/report.json")
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
        model,
        *("--n", points, "--protocol", bench.scale.protocol, "--full"),
        *("--data", f"imagefolder:{bench.data}"),
        run=run,
    )
    return {"formal_guarantee": found["formal_guarantee"], "certify": found["certify"]}  # not where it lies


def sessions(run: Path, stage: str) -> dict[str, Any]:
    """How long a stage took, and what it computed with."""
    record = commands.stages(run)[stage]
    return {"seconds": record["seconds"], "environment": record["sessions"][-1]["environment"]}


def results(run: Path, stage: str) -> Any:
    """What a stage reports, without its list of layers."""
    found = commands.stages(run)[stage]["results"]
    return {name: value for name, value in found.items() if name != "layers"}


def add_wheels(folder: Path, site: Path) -> None:
    """Unpack wheels, which are archives, and import from them; what this machine has comes first."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path.append(str(site))


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require_torch() -> None:
    """Leave with a sentence where torch is missing or older than 2.11."""
    try:
        import torch
    except ImportError:
        raise SystemExit("this benchmark needs torch 2.11 or newer; there is none here") from None
    major, minor = map(int, torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        raise SystemExit(f"this benchmark needs torch 2.11 or newer, not {torch.__version__}")
