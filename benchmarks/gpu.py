"""One command for a GPU: the whole path on CIFAR-10 with a ResNet-18, and how fast it is. No network needed.

    python benchmarks/gpu.py --budget 9 --out OUT          (again and again, until it says that all is done)
    python benchmarks/gpu.py --smoke --device cpu          (a few minutes: tiny subset, tiny schedules)

Each call works for at most ``--budget`` minutes and goes on where the last one stopped: a finished piece is
in ``WORK/pieces``, an unfinished stage in its run folder, which ``--resume`` continues. After every piece
``results/gpu.json`` is written anew, and again into ``--out``, with the dense network in parts of 15 MiB
(compressed). On another machine ``--kept FOLDER`` takes both up again.

Order: CIFAR-10 unpacked; a dense network trained adversarially (PGD-10, bf16) and certified; search and
fine-tuning steps against the plain loop in float32 (whose one batch lies on the device), share of the
device's bf16 rate; certify against pyautoattack; then hydra with and without S2AP at 90 and 99 %, harp at the
same, 95 %, another seed, more points: prune, certify, export of each. Needs torch 2.11 or newer; what else
the package needs and the machine lacks (pydantic and what it needs, torch-pruning, pyautoattack) can lie as
wheels in a folder that ``--wheels`` names; no pip is needed.
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


class Scale(NamedTuple):
    """How large everything is."""

    arch: str
    per_class: int | None  # images of each class that are unpacked, None: all
    dense_epochs: int
    search_epochs: int
    finetune_epochs: int
    batch: int
    points: int
    more_points: int
    steps: int
    speed_points: int
    protocol: str
    variants: int | None  # how many networks are pruned, None: all of the plan


FULL = Scale("cifar-resnet18", None, 30, 5, 10, 256, 500, 2000, 20, 256, "standard", None)
SMOKE = Scale("cifar-resnet20", 8, 1, 2, 1, 16, 4, 6, 1, 2, "quick", 2)


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
        self.name = "gpu-smoke" if args.smoke else "gpu"

    @property
    def left(self) -> float:
        """Seconds that work may still take."""
        return self.end - time.monotonic() - RESERVE

    def piece(self, name: str, make: Callable[[], Any]) -> Any:
        """The piece from an earlier call, or made now. Raises OutOfTime."""
        path = self.pieces / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["figures"]
        if self.left < LEAST:
            raise OutOfTime
        print(f"{name} ({self.left / 60:.1f} minutes left)", flush=True)
        started = time.monotonic()
        figures = make()
        seconds = round(time.monotonic() - started, 1)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"figures": figures, "seconds": seconds}), encoding="utf-8")
        partial.rename(path)
        self.write()
        return figures

    def write(self) -> None:
        """All pieces so far as one JSON, in ``results`` and in ``--out``."""
        import result

        found = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(self.pieces.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        }
        content = {"smoke": self.args.smoke, "scale": self.scale._asdict(), "device": facts(self.args.device)}
        path = result.write(self.name, {**content, "pieces": found})
        if self.args.out is not None:
            self.args.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.args.out / path.name)

    def tool(self, *arguments: str, run: str, device: bool = True) -> dict[str, Any]:
        """A command of the tool in a run folder of ours; what it prints as JSON."""
        command = [sys.executable, "-m", "s2ap_deploy", *arguments]
        command += ["--run", str(self.work / run), "--resume", "--json", "--quiet"]
        if device:
            command += ["--device", self.args.device]
        return json.loads(self.process(command))  # type: ignore[no-any-return]

    def process(self, command: list[str]) -> str:
        """Standard output of a process, which is stopped in time to save its state. Raises OutOfTime."""
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
        if child.returncode != 0:
            raise SystemExit(f"{' '.join(command[2:5])} ended with {child.returncode}: see above")
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
    scale = bench.scale
    if not bench.data.exists():
        unpack(bench.args.archive, bench.data, scale.per_class)
    bench.piece("dense", lambda: dense(bench))
    bench.piece(
        "dense-certificate", lambda: certificate(bench, bench.dense, "dense-certificate", scale.points)
    )
    for kind in ("search", "finetune"):
        bench.piece(f"{kind}-step", lambda kind=kind: step(bench, kind))
    bench.piece("bf16-share", lambda: share(bench))
    bench.piece("certify-speed", lambda: certify_speed(bench))
    for method, sparsity, s2ap, seed in itertools.islice(plan(), scale.variants):
        name = f"{method}-{sparsity:g}-{'s2ap' if s2ap else 'plain'}-{seed}"
        bench.piece(
            name, lambda chosen=(method, sparsity, s2ap, seed), name=name: pruned(bench, name, *chosen)
        )
    for method, sparsity, s2ap, seed in itertools.islice(plan(), scale.variants):
        name = f"{method}-{sparsity:g}-{'s2ap' if s2ap else 'plain'}-{seed}"
        model = bench.work / name / "finetune/model.safetensors"
        if model.exists():  # not on a machine that only took up the pieces
            more = f"{name}-more"
            bench.piece(
                more, lambda model=model, more=more: certificate(bench, model, more, scale.more_points)
            )


def plan() -> Iterator[tuple[str, float, bool, int]]:
    """Method, sparsity, with S2AP or without, seed; the most wanted first."""
    for seed in (0, 1):
        for sparsities, methods in (((0.9, 0.99), ("hydra", "harp")), ((0.95,), ("hydra", "harp"))):
            for method, sparsity, s2ap in itertools.product(methods, sparsities, (False, True)):
                yield method, sparsity, s2ap, seed


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
    if bench.args.out is not None:
        leave(bench.dense, bench.args.out)
    history = json.loads((bench.work / "dense/pretrain/history.json").read_text(encoding="utf-8"))
    return {
        "best": found["pretrain"]["best"],
        "history": history,
        **sessions(bench.work / "dense", "pretrain"),
    }


def pruned(bench: Bench, name: str, method: str, sparsity: float, s2ap: bool, seed: int) -> dict[str, Any]:
    """Search and fine-tuning, then the certificate of the result and its export."""
    scale = bench.scale
    bench.tool(
        "prune",
        str(bench.dense),
        *("--method", method, "--sparsity", str(sparsity), "--s2ap" if s2ap else "--no-s2ap"),
        *("--data", f"imagefolder:{bench.data}", "--seed", str(seed), "--batch-size", str(scale.batch)),
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


def step(bench: Bench, kind: str) -> dict[str, Any]:
    """``search_step.py`` or ``finetune_step.py`` on this device."""
    import result

    scale, name = bench.scale, f"{bench.name}-{kind}-step"
    command = [sys.executable, str(HERE / f"{kind}_step.py"), "--network", scale.arch, "--name", name]
    command += ["--batch", str(scale.batch), "--steps", str(scale.steps), "--device", bench.args.device]
    bench.process(command)
    path = result.FOLDER / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()  # it is a piece of ours
    timed = found["step"]
    seconds = {"ours": timed["ours_seconds"]["median"], "plain": timed["other_seconds"]["median"]}
    rates = {each: round(scale.batch / value, 1) for each, value in seconds.items()}
    return {**found, "images_per_second": rates, "speed_up": round(rates["ours"] / rates["plain"], 2)}


def share(bench: Bench) -> dict[str, Any]:
    """Arithmetic of a search step over its time, beside the rate of a large bf16 product on this device."""
    import interleave
    import torch
    from search_step import STEPS, network

    device = torch.device(bench.args.device)
    classifier, size, _ = network(bench.scale.arch)
    macs = multiplications(classifier, size)
    # One forward pass is a unit, a backward pass to the input another, one to the weights another: the clean
    # images once for the attack, PGD there and back, then both batches there and back in full.
    units = 1 + 2 * STEPS + 2 * 3
    timed = bench.piece("search-step", dict)["step"]["ours_seconds"]["median"]
    achieved = 2 * macs * units * bench.scale.batch / timed
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [interleave.timed(lambda: left @ right, device).clock for _ in range(13)][3:]
    rate = 2 * side**3 / sorted(times)[len(times) // 2]
    return {
        "multiplications_per_image": macs,
        "forward_units_per_step": units,
        "achieved_tflops": round(achieved / 1e12, 4),
        "product_tflops": round(rate / 1e12, 4),
        "share": round(achieved / rate, 4),
    }


def multiplications(classifier: Any, size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image in convolutions and linear layers."""
    import torch
    from torch import nn

    total = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    layers = [module for module in classifier.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        classifier.eval()(torch.zeros(1, *size))
    for handle in handles:
        handle.remove()
    return total


def certify_speed(bench: Bench) -> dict[str, Any]:
    """Our cascade and pyautoattack's own driver on the same points, float32 without TF32 for both."""
    import copy

    import interleave
    import torch
    from pyautoattack import AutoAttack

    from s2ap_deploy.certify.attacks import cascade
    from s2ap_deploy.data import datasets
    from s2ap_deploy.models import checkpoint
    from s2ap_deploy.robust.precision import allow_tf32
    from s2ap_deploy.spec import ThreatModel

    device, points = torch.device(bench.args.device), bench.scale.speed_points
    allow_tf32(False, False)
    network, _, _ = checkpoint.load(bench.dense)
    network = network.to(device).eval()
    images, labels = datasets.load(f"imagefolder:{bench.data}", size=(3, 32, 32)).test.tensors()
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:points]
    images, labels = images[chosen], labels[chosen]
    threat = ThreatModel(eps="8/255")

    def ours(size: int | None) -> set[int]:
        outcome = cascade.attack(
            network, images, labels, threat=threat, seed=0, device=device, workers=1, block_size=size
        )
        return {index for index, by in enumerate(outcome.broken_by) if by is None}

    def theirs(size: int) -> set[int]:
        private = copy.deepcopy(network)
        here = images.to(device), labels.to(device)
        driver = AutoAttack(
            private, norm="Linf", eps=threat.radius, seed=0, version="standard", device=bench.args.device
        )
        moved, _ = driver.run_standard_evaluation(*here, batch_size=size)
        with torch.no_grad():
            standing = (private(here[0]).argmax(1) == here[1]) & (private(moved).argmax(1) == here[1])
        return set(standing.nonzero().flatten().tolist())

    sizes = sorted({max(points // 2, 1), points})
    trials: list[dict[str, Any]] = []
    left: dict[str, set[int]] = {}
    for who, attack in (("ours", ours), ("package", theirs)):
        for size in sizes:
            found: list[set[int]] = []
            span = interleave.timed(
                lambda attack=attack, size=size, found=found: found.append(attack(size)), device
            )
            trials.append({"who": who, "batch": size, "seconds": round(span.clock, 2)})
            left[who] = found[0]
    best = {who: min(t["seconds"] for t in trials if t["who"] == who) for who in left}
    return {
        "points": points,
        "tf32": False,
        "trials": trials,
        "seconds_per_point": {who: round(seconds / points, 4) for who, seconds in best.items()},
        "speed_up": round(best["package"] / best["ours"], 2),
        "survivors": {who: len(found) for who, found in left.items()},
        "differing_points": len(left["ours"] ^ left["package"]),
    }


def sessions(run: Path, stage: str) -> dict[str, Any]:
    """How long a stage took, and what it computed with."""
    record = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"][stage]
    return {"seconds": record["seconds"], "environment": record["sessions"][-1]["environment"]}


def results(run: Path, stage: str) -> Any:
    """What a stage reports, without its list of layers."""
    found = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"][stage]["results"]
    return {name: value for name, value in found.items() if name != "layers"}


def leave(path: Path, folder: Path) -> None:
    """A file in compressed parts that a small channel takes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = lzma.compress(path.read_bytes(), preset=1)
    for index, start in enumerate(range(0, len(data), PART)):
        (folder / f"{path.name}.xz.{index}").write_bytes(data[start : start + PART])


def take_up(bench: Bench, folder: Path) -> None:
    """Pieces and dense network of an earlier machine, where this one has none."""
    kept = folder / f"{bench.name}.json"
    if kept.exists():
        for name, piece in json.loads(kept.read_text(encoding="utf-8"))["pieces"].items():
            path = bench.pieces / f"{name}.json"
            if not path.exists():
                path.write_text(json.dumps(piece), encoding="utf-8")
    parts = sorted(folder.glob(f"{bench.dense.name}.xz.*"), key=lambda path: int(path.suffix[1:]))
    if parts and not bench.dense.exists():
        bench.dense.write_bytes(lzma.decompress(b"".join(part.read_bytes() for part in parts)))
    if not bench.dense.exists():
        (bench.pieces / "dense.json").unlink(missing_ok=True)


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
