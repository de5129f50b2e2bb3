"""A certificate made from what an attack found. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from s2ap_deploy.evaluation.certificate import WORDS, Certificate, PointsFile, Subject
from s2ap_deploy.evaluation.interval import UNDECIDED, EarlyDecision
from s2ap_deploy.evaluation.samples import (
    AttackRow,
    Proven,
    Sample,
    Share,
    correct,
    ids_sha256,
    per_class,
    robust_share,
)
from s2ap_deploy.spec import ThreatModel


def issue(
    *,
    subject: Subject,
    threat: ThreatModel,
    data: str,
    split: str,
    sample_ids: Sequence[str],
    labels: Sequence[int],
    class_names: Sequence[str],
    clean_prediction: Sequence[int],
    adversarial_prediction: Sequence[int],
    broken_by: Sequence[str | None],
    attacks: Sequence[AttackRow],
    protocol: str,
    flags: Sequence[str],
    attack_seed: int,
    sample_seed: int | None,
    block_size: int,
    points: PointsFile | None,
    versions: dict[str, str],
    environment: dict[str, str | int | bool],
    seconds: float,
    proven: Proven | None = None,
    decision: EarlyDecision | None = None,
    mask_sha256: str | None = None,
    recipe_sha256: str | None = None,
) -> Certificate:
    """A certificate from what an attack found for each sample; sequences are in sample order.

    The attack was complete, or ``decision`` says why it was not and which samples it leaves undecided.
    """
    left = set(decision.undecided) if decision is not None else set()
    broken_by = [UNDECIDED if index in left else by for index, by in enumerate(broken_by)]
    rows = zip(sample_ids, labels, clean_prediction, adversarial_prediction, broken_by, strict=True)
    samples = tuple(
        Sample(id=name, label=label, clean_prediction=clean, adversarial_prediction=attacked, broken_by=by)
        for name, label, clean, attacked, by in rows
    )
    n = len(samples)
    return Certificate.model_validate(
        {
            "statement": WORDS[protocol],
            "protocol": protocol,
            "threat": threat,
            "data": data,
            "split": split,
            "n": n,
            "sample_ids_sha256": ids_sha256(sample_ids),
            "samples": samples,
            "attack_seed": attack_seed,
            "sample_seed": sample_seed,
            "block_size": block_size,
            "subject": subject,
            "clean": Share.of(correct(samples), n),
            "robust": robust_share(samples, early=decision is not None),
            "per_class": per_class(samples, dict(enumerate(class_names)), early=decision is not None),
            "attacks": tuple(attacks),
            "flags": tuple(flags),
            "points": points,
            "versions": versions,
            "environment": environment,
            "seconds": seconds,
            "proven": proven,
            "decision": decision,
            "mask_sha256": mask_sha256,
            "recipe_sha256": recipe_sha256,
        }
    )
