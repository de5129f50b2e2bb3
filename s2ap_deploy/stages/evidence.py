"""The parts of a certificate: samples, proofs, security curve, and the certificate itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ap_deploy import runtime
from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation import samples as evaluated
from s2ap_deploy.evaluation.autoattack.scheduler import AttackOutcome, default_block_size
from s2ap_deploy.evaluation.bounds.relaxation import provably_robust
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.minimum_norm import fmn
from s2ap_deploy.evaluation.minimum_norm.fmn import FMNConfig
from s2ap_deploy.evaluation.minimum_norm.security_curve import SecurityCurve, capped, security_curve
from s2ap_deploy.evaluation.samples import Proven
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.stages.context import RunContext


@dataclass(frozen=True, eq=False)
class Samples:
    """The held-out images for every network of a run: pixels [n, C, H, W], labels [n], ids."""

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]


def certificate_of(
    job: RunContext, samples: Samples, outcome: AttackOutcome, *, flags: Sequence[str] = (), **facts: Any
) -> Certificate:
    """Build the certificate of ``outcome``.

    ``flags`` are added to those of the outcome; ``facts`` are the remaining fields of :class:`Certificate`,
    and ``class_names``.
    """
    section, device = job.recipe.certify, job.machine.device
    rows = evaluated.rows(
        samples.ids,
        samples.labels.tolist(),
        outcome.clean_prediction,
        outcome.adversarial_prediction,
        outcome.broken_by,
    )
    return Certificate.of(
        rows,
        protocol=outcome.protocol,
        threat=job.recipe.threat,
        data=job.images(None).spec.name,
        split="test",
        attacks=outcome.counts,
        flags=(*outcome.flags, *flags),
        attack_seed=section.attack_seed,
        sample_seed=section.sample_seed,
        block_size=default_block_size(samples.images, device),
        versions=runtime.versions(),
        environment=runtime.environment(device),
        **facts,
    )


def prove(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    device: torch.device,
    recorder: Recorder,
) -> Proven:
    """Prove robustness by linear relaxation for images [n, C, H, W] and labels [n].

    Raises ArchitectureError for a network whose layers cannot be bounded.
    """
    done = 0

    def progress(now: int, total: int) -> None:
        nonlocal done
        recorder.advance(now - done)
        done = now

    recorder.begin("prove", len(images), "image")
    result = provably_robust(network, images, labels, threat=threat, device=device, progress=progress)
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
            f"a security curve needs {' or '.join(fmn.NORMS)}, not {threat.norm}",
            code="curve-norm-unsupported",
            hint="leave --curve out",
        )


def trace_curve(
    job: RunContext,
    network: nn.Module,
    samples: Samples,
    broken_by: Sequence[str | None],
    path: Path,
    *,
    record: Path,
    deadline: float | None,
) -> SecurityCurve:
    """Write the security curve of a minimum-norm attack to ``path``.

    Samples that AutoAttack broke (``broken_by``) count as broken at eps: there the curve is the worst of both
    attacks. A killed attack continues from ``record``. Raises OutOfTimeError when ``deadline`` has passed.
    """
    threat, seed = job.recipe.threat, job.recipe.certify.attack_seed
    config = FMNConfig(
        norm="L2" if threat.norm == "L2" else "Linf", seed=seed, device=job.machine.device, record=record
    )
    found = fmn.attack(
        network,
        samples.images,
        samples.labels,
        config,
        workers=job.machine.workforce,
        deadline=deadline,
        recorder=job.recorder,
    )
    distances = capped(found.distances.tolist(), [by is not None for by in broken_by], threat.radius)
    curve = security_curve(
        distances,
        norm=threat.norm,
        facts={"attack": "FMN", "seed": seed, "autoattack_eps": threat.eps, "flags": list(found.flags)},
    )
    curve.save(path)
    return curve
