"""Measure the whole path on one GPU: CIFAR-10 with a ResNet-18, and how fast it is. Needs no network.

    python -m benchmarks gpu --budget 9 --out OUT          (again and again, until it prints "all is done")
    python -m benchmarks gpu --smoke --device cpu          (a few minutes: tiny subset, tiny schedules)

Each call works for at most ``--budget`` minutes and continues where the last one stopped: a finished piece is
in ``WORK/pieces``, an unfinished stage in its run folder. After every piece ``results/gpu.json`` is rewritten
and copied to ``--out``, with the dense network in compressed parts of 15 MiB; on another machine ``--kept
FOLDER`` restores both. Order: CIFAR-10; a dense network trained adversarially and certified; search and
fine-tuning steps against the plain loop at two batch sizes, and the device's bf16 rate; certify against
pyautoattack; hydra with and without S2AP at 90 and 99 %: prune, certify, export of each; the same steps
compiled; then harp, 95 %, another seed, more points. A piece that fails is marked in the JSON and not tried
again (remove its file to do so). Without a network, first ``pip install --no-index --no-deps wheels/*.whl``
what the machine lacks.
"""

import argparse
import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import speed
from benchmarks.gpu.pieces import ROOT, Bench, OutOfTime, divide, restore
from benchmarks.lib import commands
from benchmarks.lib.images import ARCHIVE, unpack

WANTED_FIRST = 4  # networks of the plan that come before everything else about speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=ROOT.parent / "shared" / ARCHIVE)
    parser.add_argument("--work", type=Path, default=ROOT / "work/gpu")
    parser.add_argument("--budget", type=float, default=9.0, help="minutes that this call may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="also leave the JSON and the dense network here")
    parser.add_argument("--kept", type=Path, help="what an earlier machine left with --out")
    args = parser.parse_args()
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
    per_class = bench.scale.per_class
    unpack(bench.args.archive, bench.data, {"train": per_class, "test": per_class})
    if bench.piece("dense", lambda: dense(bench)) is None:
        (bench.pieces / "dense.json").unlink()
        raise SystemExit("without a dense network there is nothing to measure")
    points = bench.scale.points
    bench.piece("dense-certificate", lambda: certificate(bench, bench.dense, "dense-certificate", points))
    speed.steps(bench)
    bench.piece("bf16-rate", lambda: speed.rate(bench))
    speed.certify(bench)
    networks = list(itertools.islice(plan(), bench.scale.variants))
    for network in networks[:WANTED_FIRST]:
        bench.piece(network.name, partial(pruned, bench, network))
    speed.compiled_steps(bench)
    for network in networks[WANTED_FIRST:]:
        bench.piece(network.name, partial(pruned, bench, network))
    for network in networks:
        model = bench.work / network.name / "finetune/model.safetensors"
        if model.exists():  # not on a machine that only took up the pieces
            more = f"{network.name}-more"
            bench.piece(more, partial(certificate, bench, model, more, bench.scale.more_points))


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
    facts = stage_facts(bench.work / "dense", "pretrain")
    return {"best": found["pretrain"]["best"], "history": history, **facts}


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
    stages = {stage: stage_facts(bench.work / name, stage) for stage in ("search", "finetune")}
    return {"certificate": certified, "stages": stages, "export": report}


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


def stage_facts(run: Path, stage: str) -> dict[str, Any]:
    """The time, environment and results of a stage, without its list of layers."""
    record = commands.stages(run)[stage]
    results = {name: value for name, value in record["results"].items() if name != "layers"}
    environment = record["sessions"][-1]["environment"]
    return {"seconds": record["seconds"], "environment": environment, "results": results}
