"""What a certificate can have besides attacks at one eps: proofs, and accuracy over all eps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.bounds.relaxation import provably_robust
from s2ap_deploy.evaluation.minimum_norm import fmn
from s2ap_deploy.evaluation.minimum_norm.security_curve import SecurityCurve, capped, security_curve
from s2ap_deploy.evaluation.samples import Proven
from s2ap_deploy.evaluation.workers.pool import WorkerSpec
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.spec import ThreatModel


def prove(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    device: torch.device,
    recorder: Recorder,
) -> Proven:
    """What linear relaxation proves about images [n, C, H, W] and labels [n].

    Raises ArchitectureError for a network that bounds cannot go through.
    """
    done = 0

    def told(now: int, total: int) -> None:
        nonlocal done
        recorder.advance(now - done)
        done = now

    recorder.begin("prove", len(images), "image")
    result = provably_robust(network, images, labels, threat=threat, device=device, progress=told)
    recorder.end()
    return Proven.of(
        result.proven.nonzero().flatten().tolist(),
        len(images),
        method=result.method,
        tolerance=result.tolerance,
    )


def check_curve(threat: ThreatModel) -> None:
    """Raise UsageError for a norm in which there is no minimum-norm attack."""
    if threat.norm not in fmn.NORMS:
        raise UsageError(
            f"a security curve needs {' or '.join(fmn.NORMS)}, not {threat.norm}", hint="leave --curve out"
        )


def trace_curve(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    broken_by: Sequence[str | None],
    path: Path,
    *,
    threat: ThreatModel,
    seed: int,
    device: torch.device,
    workers: WorkerSpec,
    record: Path,
    deadline: float | None,
    recorder: Recorder,
) -> SecurityCurve:
    """Write the curve of a minimum-norm attack to ``path``.

    What AutoAttack broke (``broken_by``) counts as broken at eps: there the curve is the worst of both. A
    killed attack continues from ``record``. Raises OutOfTimeError when ``deadline`` has passed.
    """
    found = fmn.attack(
        network,
        images,
        labels,
        threat_norm="L2" if threat.norm == "L2" else "Linf",
        seed=seed,
        device=device,
        workers=workers,
        record=record,
        deadline=deadline,
        recorder=recorder,
    )
    distances = capped(found.distances.tolist(), [by is not None for by in broken_by], threat.radius)
    curve = security_curve(
        distances,
        norm=threat.norm,
        facts={"attack": "FMN", "seed": seed, "autoattack_eps": threat.eps, "flags": list(found.flags)},
    )
    curve.save(path)
    return curve
