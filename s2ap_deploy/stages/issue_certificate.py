"""The certificate of an attack in a run folder: what every one says of samples, seeds and machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from s2ap_deploy import runtime
from s2ap_deploy.evaluation.autoattack.outcome import AttackOutcome
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.certificate import Certificate, PointsFile, Subject
from s2ap_deploy.evaluation.interval import EarlyDecision
from s2ap_deploy.evaluation.issuing import issue
from s2ap_deploy.evaluation.samples import AttackRow, Proven
from s2ap_deploy.stages.context import RunContext


@dataclass(frozen=True, eq=False)
class Samples:
    """The held-out images that every network of a run faces: pixels [n, C, H, W], labels [n], ids."""

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]


def certificate_of(
    job: RunContext,
    samples: Samples,
    outcome: AttackOutcome,
    *,
    subject: Subject,
    class_names: Sequence[str],
    points: PointsFile,
    seconds: float,
    flags: Sequence[str] = (),
    proven: Proven | None = None,
    decision: EarlyDecision | None = None,
    mask_sha256: str | None = None,
    recipe_sha256: str | None = None,
) -> Certificate:
    """The certificate of ``outcome``; ``flags`` come on top of its own."""
    section, images = job.recipe.certify, job.images(None)
    return issue(
        subject=subject,
        threat=job.recipe.threat,
        data=images.spec.name,
        split="test",
        sample_ids=samples.ids,
        labels=samples.labels.tolist(),
        class_names=class_names,
        clean_prediction=outcome.clean_prediction,
        adversarial_prediction=outcome.adversarial_prediction,
        broken_by=outcome.broken_by,
        attacks=[
            AttackRow(name=row.name, n_in=row.n_in, n_broken=row.n_broken, seconds=row.seconds)
            for row in outcome.counts
        ],
        protocol=outcome.protocol,
        flags=(*outcome.flags, *flags),
        attack_seed=section.attack_seed,
        sample_seed=section.sample_seed,
        block_size=default_block_size(samples.images, job.machine.device),
        points=points,
        versions=runtime.versions(),
        environment=runtime.environment(job.machine.device),
        seconds=seconds,
        proven=proven,
        decision=decision,
        mask_sha256=mask_sha256,
        recipe_sha256=recipe_sha256,
    )
