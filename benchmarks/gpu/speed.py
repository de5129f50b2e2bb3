"""Pieces of ``gpu.py``: speed of training steps and certification, and the share of the device's rate."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.gpu.pieces import Bench
from benchmarks.lib import commands

KINDS = ("search", "finetune")
TARGETS = {"step_speed_up": 4.0, "certify_speed_up": 2.0}
# NVIDIA's data sheets: dense bf16 products, in 10^12 operations per second.
DATA_SHEET = {"H200": 989.5, "H100": 989.5, "A100": 312.0}
FIRST_TRIAL = 150.0  # seconds that must be left for the first attack; later ones are known by then
FIRST_COMPILE = 240.0


def steps(bench: Bench) -> None:
    """Both training steps at the usual batch size, and at a large one that keeps the device busy."""
    for batch in (bench.scale.batch, bench.scale.large_batch):
        for kind in KINDS:
            if batch is not None:
                bench.piece(step_name(kind, batch), lambda kind=kind, batch=batch: step(bench, kind, batch))


def compiled_steps(bench: Bench) -> None:
    """The same through ``torch.compile``, whose start takes minutes."""
    batch = bench.scale.large_batch
    for kind in KINDS:
        if batch is not None:
            name = step_name(kind, batch, compiled=True)
            bench.piece(name, lambda kind=kind: step(bench, kind, batch, compiled=True), least=FIRST_COMPILE)


def step_name(kind: str, batch: int, compiled: bool = False) -> str:
    return f"{kind}-step-{batch}" + ("-compiled" if compiled else "")


def step(bench: Bench, kind: str, batch: int, compiled: bool = False) -> dict[str, Any]:
    """``training-step`` on this device, and images per second of both loops."""
    from benchmarks.lib import results

    scale = bench.scale
    name = f"{bench.name}-{step_name(kind, batch, compiled)}"
    path = results.FOLDER / f"{name}.json"
    path.unlink(missing_ok=True)
    options = {"stage": kind, "network": scale.arch, "name": name, "batch": batch, "steps": scale.steps}
    options |= {"warm-up": scale.warm_up, "loader": scale.loader, "device": bench.args.device}
    command = [sys.executable, "-m", "benchmarks", "training-step", *(["--compile"] if compiled else [])]
    # It exits with 1 where gradients differ by more than a CPU's would: the figures show by how much.
    bench.process([*command, *(f"--{key}={value}" for key, value in options.items())], accepted=(0, 1))
    found = commands.read(path)
    path.unlink()  # it becomes a piece
    timed = found["step"]
    seconds = {"ours": timed["ours_seconds"]["median"], "plain": timed["other_seconds"]["median"]}
    rates = {each: round(batch / value, 1) for each, value in seconds.items()}
    # Of pairs, as everywhere: other load on the machine slows both alike.
    return {**found, "images_per_second": rates, "speed_up": round(1 / timed["ratio"]["median"], 2)}


def rate(bench: Bench) -> dict[str, Any]:
    """What the device does in a large bf16 product, and the arithmetic of one image in a step."""
    import torch

    from benchmarks.lib import networks, timing
    from benchmarks.training.training_step import ATTACK_STEPS

    device = torch.device(bench.args.device)
    classifier, size = networks.network(bench.scale.arch)
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [timing.timed(lambda: left @ right, device).clock for _ in range(13)][3:]
    return {
        "multiplications_per_image": multiplications(classifier, size),
        # One forward pass is a unit, a backward pass to the input another, one to the weights another: the
        # clean images once for the attack, PGD there and back, then both batches there and back in full.
        "forward_units_per_step": 1 + 2 * ATTACK_STEPS + 2 * 3,
        "product_tflops": round(2 * side**3 / statistics.median(times) / 1e12, 4),
        "data_sheet_tflops": data_sheet(bench.device["name"]),
    }


def data_sheet(name: str) -> float | None:
    """What a device's maker promises for bf16, in 10^12 operations per second; None for an unknown one."""
    return next((tflops for part, tflops in DATA_SHEET.items() if part in name), None)


def share(figures: Mapping[str, Any], device: Mapping[str, Any]) -> dict[str, float | None]:
    """A step's arithmetic over its time, beside the rates of the ``device`` (see :func:`rate`)."""
    operations = 2 * device["multiplications_per_image"] * device["forward_units_per_step"] * figures["batch"]
    tflops = operations / figures["step"]["ours_seconds"]["median"] / 1e12
    sheet = device["data_sheet_tflops"]
    return {
        "tflops": round(tflops, 4),
        "share_of_product": round(tflops / device["product_tflops"], 4),
        "share_of_data_sheet": None if sheet is None else round(tflops / sheet, 4),
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


class Duel:
    """Our cascade and pyautoattack's own driver on the same points, float32 without TF32 for both."""

    def __init__(self, bench: Bench) -> None:
        import torch

        from s2ap_deploy.data import datasets
        from s2ap_deploy.models.checkpoints import checkpoint
        from s2ap_deploy.training.precision import allow_tf32

        allow_tf32(False, False)
        self.device, points = torch.device(bench.args.device), bench.scale.speed_points
        network, _, _ = checkpoint.load(bench.dense)
        self.network = network.to(self.device).eval()
        images, labels = datasets.load(f"imagefolder:{bench.data}", size=(3, 32, 32)).test.tensors()
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:points]
        self.images, self.labels = images[chosen], labels[chosen]
        with torch.no_grad():  # what the first call of a device costs is nobody's
            self.network(self.images[:2].to(self.device))

    def timed(self, who: str, size: int, seed: int) -> dict[str, Any]:
        """Seconds for all points in batches of ``size``, and the points that no attack broke."""
        from benchmarks.lib import attacks, timing

        found: list[set[int]] = []
        points = (self.network, self.images, self.labels, "8/255")
        ours = {"seed": seed, "device": self.device, "workers": 1, "block_size": size}
        package = {"seed": seed, "device": str(self.device), "batch": size}
        attack = partial(attacks.ours, **ours) if who == "ours" else partial(attacks.package, **package)
        span = timing.timed(lambda: found.append(attack(*points)), self.device)
        seconds = round(span.clock, 2)
        return {"who": who, "batch": size, "seed": seed, "seconds": seconds, "standing": sorted(found[0])}


def certify_trials(bench: Bench) -> None:
    """Both attacks at several batch sizes, each a piece; the next begins only if it may be done in time."""
    points = bench.scale.speed_points
    duel: list[Duel] = []  # made when the first piece needs it
    longest = 0.0
    for size in sorted({max(points // 2, 1), points}):
        for who in ("package", "ours"):
            found = bench.piece(
                f"certify-trial-{who}-{size}",
                lambda who=who, size=size: ready(duel, bench).timed(who, size, 0),
                least=1.3 * longest if longest else FIRST_TRIAL,
            )
            longest = max(longest, found["seconds"] if found is not None else 0.0)


def certify_pair(bench: Bench) -> None:
    """Both at their best batch sizes with another seed, one right after the other."""
    trials = bench.done("certify-trial-")
    if {each["who"] for each in trials.values()} != {"ours", "package"}:
        return
    best = {who: fastest(trials, who) for who in ("ours", "package")}
    needed = 1.3 * sum(each["seconds"] for each in best.values())
    duel: list[Duel] = []
    bench.piece(
        "certify-pair",
        lambda: {w: ready(duel, bench).timed(w, best[w]["batch"], 1) for w in ("package", "ours")},
        least=needed,
    )


def ready(duel: list[Duel], bench: Bench) -> Duel:
    if not duel:
        duel.append(Duel(bench))
    return duel[0]


def fastest(trials: Mapping[str, dict[str, Any]], who: str) -> dict[str, Any]:
    return min((each for each in trials.values() if each["who"] == who), key=lambda each: each["seconds"])


def summary(bench: Bench) -> dict[str, Any]:
    """The figures that somebody looks for first, from the pieces that there are."""
    found: dict[str, Any] = {"targets": TARGETS}
    measured = bench.done("search-step-", "finetune-step-")
    if measured:
        found["steps"] = {
            name: {
                "images_per_second": figures["images_per_second"],
                "speed_up": figures["speed_up"],
                "precision": figures["precision"],
                "plain_tf32": figures["plain_tf32"],
                "plain_loader_workers": figures["plain_loader_workers"],
            }
            for name, figures in measured.items()
        }
        found["best_speed_up"] = {
            kind: max((f["speed_up"] for name, f in measured.items() if name.startswith(kind)), default=None)
            for kind in KINDS
        }
    for device in bench.done("bf16-rate").values():
        found["bf16"] = {**device, "achieved": {name: share(each, device) for name, each in measured.items()}}
    trials = bench.done("certify-trial-")
    if {each["who"] for each in trials.values()} == {"ours", "package"}:
        found["certify"] = certified(bench, trials)
    return found


def certified(bench: Bench, trials: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds per point at the best batch size of each, and how far the verdicts agree."""
    best = {who: fastest(trials, who) for who in ("ours", "package")}
    points = bench.scale.speed_points
    figures: dict[str, Any] = {
        "points": points,
        "tf32": False,
        "batch": {who: each["batch"] for who, each in best.items()},
        "seconds_per_point": {who: round(each["seconds"] / points, 4) for who, each in best.items()},
        "speed_up": round(best["package"]["seconds"] / best["ours"]["seconds"], 2),
        "standing": {who: len(each["standing"]) for who, each in best.items()},
        "differing_points": differing(best["ours"], best["package"]),
    }
    for pair in bench.done("certify-pair").values():
        figures["speed_up_paired"] = round(pair["package"]["seconds"] / pair["ours"]["seconds"], 2)
        figures["differing_points_paired"] = differing(pair["ours"], pair["package"])
        # Two seeds of the package on the same points: what a difference has to be seen beside.
        figures["differing_points_two_seeds_of_package"] = differing(pair["package"], best["package"])
    return figures


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return len(set(one["standing"]) ^ set(other["standing"]))
