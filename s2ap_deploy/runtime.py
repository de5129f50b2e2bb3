"""Device, threads and random streams."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata

import torch

from s2ap_deploy.errors import UsageError

PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "pyautoattack", "numpy", "s2ap-deploy")


def device(name: str | None = None) -> torch.device:
    """Return the named device, or the best one present (CUDA, then CPU)."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used here: {reason}", code="device-unusable", hint="try --device cpu"
        ) from None
    return chosen


def derive_seed(*keys: int | str) -> int:
    """Derive a 63-bit seed from any keys, the same on every machine.

    Random streams are keyed by their purpose (seed, stage, epoch, step) instead of being drawn from one
    running state: a resumed epoch then draws the same numbers as an uninterrupted one.
    """
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by :func:`derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*keys))


def seed_layers(*keys: int | str) -> None:
    """Seed torch's global streams, which layers such as dropout draw from.

    All other code uses its own :func:`generator`. Seeding once per epoch makes an epoch after a kill draw
    the same numbers; ranks add their number as a key so that they draw different ones.
    """
    torch.manual_seed(derive_seed(*keys))


def versions() -> dict[str, str]:
    """Return the versions of all software that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(chosen: torch.device) -> dict[str, str | int | bool]:
    """Return facts about the machine that a result may depend on, without its name."""
    facts: dict[str, str | int | bool] = {
        "device": str(chosen),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "machine": platform.machine(),
        "system": platform.system(),
    }
    if chosen.type == "cuda":
        facts["device_name"] = torch.cuda.get_device_name(chosen)
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return facts
