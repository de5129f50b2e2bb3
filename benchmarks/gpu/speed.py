"""Pieces of ``gpu.py``: speed of training steps and certification, and the share of the device's rate."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.pieces import Bench
from benchmarks.lib import networks, timing
from benchmarks.training.training_step import ATTACK_STEPS
from s2ap_deploy.models.channels.layer_channels import macs

KINDS = ("search", "finetune")
STEP_FIGURES = ("images_per_second", "speed_up", "precision", "plain_tf32", "plain_loader_workers")
TARGETS = {"step_speed_up": 4.0, "certify_speed_up": 2.0}
# NVIDIA's data sheets: dense bf16 products, in 10^12 operations per second.
DATA_SHEET = {"H200": 989.5, "H100": 989.5, "A100": 312.0}
FIRST_ATTACK = 240.0  # seconds that must be left
FIRST_COMPILE = 240.0


def steps(bench: Bench) -> None:
    """Both training steps at the usual batch size, and at a large one that keeps the device busy."""
    for batch in (bench.scale.batch, bench.scale.large_batch):
        for kind in KINDS:
            if batch:
                bench.piece(step_name(kind, batch), lambda kind=kind, batch=batch: step(bench, kind, batch))


def compiled_steps(bench: Bench) -> None:
    """The same through ``torch.compile``, whose start takes minutes."""
    batch = bench.scale.large_batch
    for kind in KINDS:
        if batch:
            name = step_name(kind, batch, compiled=True)
            bench.piece(name, lambda kind=kind: step(bench, kind, batch, compiled=True), least=FIRST_COMPILE)


def step_name(kind: str, batch: int, compiled: bool = False) -> str:
    return f"{kind}-step-{batch}" + ("-compiled" if compiled else "")


def step(bench: Bench, kind: str, batch: int, compiled: bool = False) -> dict[str, Any]:
    """``training-step`` on this device, and images per second of both loops."""
    scale = bench.scale
    options = {"stage": kind, "network": scale.arch, "batch": batch, "steps": scale.steps}
    options |= {"warm-up": scale.warm_up, "loader": scale.loader, "device": bench.args.device}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    # It exits with 1 where gradients differ by more than a CPU's would: the figures show by how much.
    found = bench.benchmark("training-step", *words, *(["--compile"] if compiled else []), accepted=(0, 1))
    timed = found["step"]
    seconds = {"ours": timed["ours_seconds"]["median"], "plain": timed["other_seconds"]["median"]}
    rates = {each: round(batch / value, 1) for each, value in seconds.items()}
    # Of pairs, as everywhere: other load on the machine slows both alike.
    return {**found, "images_per_second": rates, "speed_up": round(1 / timed["ratio"]["median"], 2)}


def rate(bench: Bench) -> dict[str, Any]:
    """What the device does in a large bf16 product, and the arithmetic of one image in a step."""
    device, name = torch.device(bench.args.device), bench.device["name"]
    classifier, size = networks.network(bench.scale.arch)
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [timing.timed(lambda: left @ right, device).clock for _ in range(13)][3:]
    return {
        "multiplications_per_image": macs(classifier, size),
        # One forward pass is a unit, a backward pass to the input another, one to the weights another: the
        # clean images once for the attack, PGD there and back, then both batches there and back in full.
        "forward_units_per_step": 1 + 2 * ATTACK_STEPS + 2 * 3,
        "product_tflops": round(2 * side**3 / statistics.median(times) / 1e12, 4),
        "data_sheet_tflops": next((DATA_SHEET[each] for each in DATA_SHEET if each in name), None),
    }


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


def certify(bench: Bench) -> None:
    """Our cascade against pyautoattack on the same points, float32 without TF32 for both."""
    points = bench.scale.speed_points
    options = ["--model", bench.dense, "--data", f"imagefolder:{bench.data}", "--device", bench.args.device]
    options += ["--n", points, "--batches", points, "--threads", 1, "--rounds", 1, "--workers", 1]
    bench.piece("certify-speed", lambda: bench.benchmark("certify-speed", *options), least=FIRST_ATTACK)


def summary(bench: Bench) -> dict[str, Any]:
    """The main figures of the finished pieces."""
    found: dict[str, Any] = {"targets": TARGETS}
    measured = bench.done("search-step-", "finetune-step-")
    if measured:
        found["steps"] = {
            name: {key: figures[key] for key in STEP_FIGURES} for name, figures in measured.items()
        }
        found["best_speed_up"] = {
            kind: max((f["speed_up"] for name, f in measured.items() if name.startswith(kind)), default=None)
            for kind in KINDS
        }
    for device in bench.done("bf16-rate").values():
        found["bf16"] = {**device, "achieved": {name: share(each, device) for name, each in measured.items()}}
    for figures in bench.done("certify-speed").values():
        found["certify"] = certified(figures["networks"])
    return found


def certified(networks: dict[str, Any]) -> dict[str, Any]:
    """Seconds per point of each, and how far the verdicts agree; two seeds of the package for comparison."""
    (row,) = networks.values()
    names = ("n", "survivors_ours", "survivors_package", "differing_points", "package_seed_noise_points")
    each = {name: round(row["pairs"][0][name] / row["n"], 4) for name in ("ours", "package")}
    return {"seconds_per_point": each, "speed_up": row["ratio_median"], **{name: row[name] for name in names}}
