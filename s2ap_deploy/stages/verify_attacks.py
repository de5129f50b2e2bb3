"""What a network does today with the points of a certificate, and under attacks that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2ap_deploy.data.sampling import choose
from s2ap_deploy.evaluation.autoattack import cascade, protocols
from s2ap_deploy.evaluation.autoattack.frozen_model import TOLERANCE, FrozenModel, distances, exact_arithmetic
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.gating.policy import DOUBTS
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.stages.certified_files import check
from s2ap_deploy.stages.evidence import prove
from s2ap_deploy.stages.execution import ExecutionConfig
from s2ap_deploy.stages.verification_target import VerificationTarget

_TIE, _TIE_ELSEWHERE = 1e-5, 1e-4
"""Two logits that differ by less, relative to the largest one, may swap places: float32 sums in another
order, and on another kind of device."""
_NAMED = 5  # ids in a sentence


def stored_points(
    judge: FrozenModel, machine: ExecutionConfig, certificate: Certificate, clean: Tensor, attacked: Tensor
) -> list[Check]:
    """Stored points are within the threat model, and ``judge`` answers to them as it is said to."""
    threat, samples = certificate.threat, certificate.samples
    limit = threat.radius + TOLERANCE * max(1.0, threat.radius)
    broken = torch.tensor(
        [
            stands is False and sample.broken_by != "clean"
            for sample, stands in zip(samples, certificate.standing, strict=True)
        ]
    )
    flat = attacked.flatten(1)
    inside = flat.isfinite().all(dim=1) & (flat >= 0).all(dim=1) & (flat <= 1).all(dim=1)
    inside &= distances(clean, attacked, threat.norm) <= limit
    inside &= (flat == clean.flatten(1)).all(dim=1) | broken
    if not bool(inside.all()):
        words = f"are not within {threat} and [0, 1], or moved though nothing broke them"
        outside = _ids(certificate, ~inside)
        return [check("distances", "fail", f"points: {len(outside)} {words}: {listed(outside)}")]
    checks = [check("distances", "pass", f"points: all {len(samples)} lie within {threat} and [0, 1]")]

    size = default_block_size(clean, machine.device)
    with exact_arithmetic(machine.device):
        logits = {"clean": judge.logits(clean, size), "attacked": judge.logits(attacked, size)}
    said = {
        "clean": torch.tensor([sample.clean_prediction for sample in samples]),
        "attacked": torch.tensor([sample.adversarial_prediction for sample in samples]),
    }
    tie = _TIE if certificate.environment.get("device") == str(machine.device) else _TIE_ELSEWHERE
    checks += [_answers(which, certificate, logits[which], said[which], tie) for which in logits]
    labels = torch.tensor([sample.label for sample in samples])
    if int(labels.max()) >= logits["clean"].shape[1]:
        return [*checks, check("labels", "fail", "samples: a label is no class of this network")]
    still = broken & ~_ahead(logits["attacked"], labels, tie)
    words = f"breaks: {int(still.sum())} of {int(broken.sum())} reproduce from their stored points"
    return [*checks, check("breaks", "pass" if torch.equal(still, broken) else _doubt(certificate), words)]


def _answers(which: str, certificate: Certificate, logits: Tensor, said: Tensor, tie: float) -> Check:
    """Whether the network's answers are the recorded ones, but for classes that are equally likely."""
    different = _behind(logits, said, tie)
    wrong, ties = _ids(certificate, different), int(((logits.argmax(dim=1) != said) & ~different).sum())
    tied = f" ({ties} tied)" if ties else ""
    words = f"answers: {certificate.n - len(wrong)} of {certificate.n} {which} images as recorded{tied}"
    if wrong:
        words += f"; not so {listed(wrong)}"
    return check(f"answers, {which}", _doubt(certificate) if wrong else "pass", words)


def _ahead(logits: Tensor, labels: Tensor, tie: float) -> Tensor:
    """Whether the label's logit, [n], is farther before the others than a tie."""
    rest = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    gap = logits.gather(1, labels[:, None]).squeeze(1) - rest
    return gap > 2 * tie * max(1.0, float(logits.abs().max()))


def _behind(logits: Tensor, classes: Tensor, tie: float) -> Tensor:
    """Whether the logit of the class, [n], is farther behind the largest one than a tie, or is none."""
    there = (classes >= 0) & (classes < logits.shape[1])
    mine = logits.gather(1, torch.where(there, classes, 0)[:, None]).squeeze(1)
    gap = torch.where(there, logits.amax(dim=1) - mine, torch.inf)
    return gap > 2 * tie * max(1.0, float(logits.abs().max()))


def fresh_attacks(
    suspect: VerificationTarget,
    machine: ExecutionConfig,
    certificate: Certificate,
    clean: Tensor,
    chosen: list[int],
    seed: int,
    recorder: Recorder,
) -> list[Check]:
    """The whole cascade once more on survivors, with other random numbers."""
    if not chosen:
        return []
    labels = torch.tensor([certificate.samples[index].label for index in chosen])
    outcome = cascade.attack(
        suspect.network,
        clean[chosen],
        labels,
        threat=certificate.threat,
        seed=derive_seed("verify", seed),
        device=machine.device,
        workers=machine.workers,
        version=_version(certificate),
        answers=suspect.answers,
        recorder=recorder,
    )
    fell = [certificate.samples[index].id for index, by in zip(chosen, outcome.broken_by, strict=True) if by]
    survivors = sum(stands is True for stands in certificate.standing)
    words = f"new attacks: {len(chosen) - len(fell)} of {len(chosen)} images withstand again, "
    words += f"drawn from {survivors} that are recorded as robust (seed {seed})"
    if fell:
        words += (
            f"; {listed(fell)} fell. Attacks are random: one in many is bad luck, "
            "several say that the certificate overstates"
        )
    checks = [check("new attacks", "fail" if fell else "pass", words)]
    for flag in outcome.flags:
        if flag in DOUBTS and flag not in certificate.flags:
            words = f"flag {flag}: {DOUBTS[flag]}; the certificate does not say so"
            checks.append(check(f"flag {flag}", "inconclusive", words))
    return checks


def fresh_proofs(
    classifier: nn.Module,
    machine: ExecutionConfig,
    certificate: Certificate,
    clean: Tensor,
    k: int,
    seed: int,
    recorder: Recorder,
) -> list[Check]:
    """Proofs are exact: those that are drawn must hold again."""
    if certificate.proven is None or not certificate.proven.indices or not k:
        return []
    indices = certificate.proven.indices
    chosen = [indices[position] for position in choose(len(indices), k, seed=seed)]
    labels = torch.tensor([certificate.samples[index].label for index in chosen])
    again = prove(
        classifier,
        clean[chosen],
        labels,
        threat=certificate.threat,
        device=machine.device,
        recorder=recorder,
    )
    words = f"proofs: {again.count} of {len(chosen)} hold again"
    return [check("proofs", "pass" if again.count == len(chosen) else "fail", words)]


def _version(certificate: Certificate) -> protocols.Version:
    """The protocol that the certificate names, so that the same attacks are made."""
    num_classes = certificate.subject.num_classes
    named = (
        each for each in protocols.VERSIONS if protocols.label(each, num_classes) == certificate.protocol
    )
    return next(named, "standard")


def _doubt(certificate: Certificate) -> Status:
    """What another answer means: nothing certain, for a network that is said to answer at random."""
    return "inconclusive" if "randomized" in certificate.flags else "fail"


def _ids(certificate: Certificate, chosen: Tensor) -> list[str]:
    return [sample.id for sample, wanted in zip(certificate.samples, chosen.tolist(), strict=True) if wanted]


def listed(ids: Sequence[str]) -> str:
    """The first few ids, made harmless: they come out of a file."""
    shown = ", ".join(plain(each, 60) for each in ids[:_NAMED])
    return shown + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
