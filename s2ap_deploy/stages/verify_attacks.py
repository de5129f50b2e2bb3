"""Verification by computation: stored points, new attacks and new proofs on the certified network or file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ap_deploy.data.sampling import choose
from s2ap_deploy.evaluation.autoattack import cascade, protocols
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig
from s2ap_deploy.evaluation.autoattack.frozen_model import (
    TOLERANCE,
    FrozenModel,
    LogitsFn,
    OnnxModel,
    distances,
    exact_arithmetic,
)
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.gating.policy import DOUBTS
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.onnx_export import onnx_file
from s2ap_deploy.onnx_export.torch_backend.onnx_module import OnnxModule
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.stages.certified_files import check
from s2ap_deploy.stages.context import read_classifier
from s2ap_deploy.stages.evidence import prove
from s2ap_deploy.stages.execution import ExecutionConfig

_TIE, _TIE_ELSEWHERE = 1e-5, 1e-4
"""Two logits that differ by less, relative to the largest one, may swap places: float32 sums in another
order, and on another kind of device."""
_NAMED = 5  # ids in a sentence


@dataclass(frozen=True, eq=False)
class VerificationTarget:
    """The subject of a certificate: a network, or a file with its differentiable twin.

    ``answers`` are the file's. ``size`` is (C, H, W).
    """

    network: nn.Module
    answers: LogitsFn | None
    size: tuple[int, int, int]
    weights_sha256: str

    def frozen(self, machine: ExecutionConfig) -> FrozenModel:
        """Freeze the network, or the file, as the attack did."""
        if self.answers is None:
            return FrozenModel(self.network, machine.device)
        return OnnxModel(self.network, self.answers, machine.device)


def load_network(path: Path, machine: ExecutionConfig) -> VerificationTarget:
    """Load the network in the checkpoint at ``path``."""
    classifier, info = read_classifier(path, machine)
    return VerificationTarget(classifier, None, info.preprocessing.size, weights_hash(classifier))


def load_file(path: Path) -> VerificationTarget:
    """Load the exported file at ``path``, for answers, and its twin, for gradients."""
    opened = onnx_file.load(path)
    twin = OnnxModule(opened.model)
    judge = OnnxModel(twin, opened.answers, torch.device("cpu"))
    return VerificationTarget(twin, opened.answers, opened.input_size, weights_hash(judge.network))


def stored_points(
    judge: FrozenModel, machine: ExecutionConfig, certificate: Certificate, clean: Tensor, attacked: Tensor
) -> list[Check]:
    """Check that stored points are within the threat model and get the recorded answers from ``judge``."""
    threat, samples = certificate.threat, certificate.samples
    limit = threat.radius + TOLERANCE * max(1.0, threat.radius)
    broken = torch.tensor(
        [
            robust is False and sample.broken_by != "clean"
            for sample, robust in zip(samples, certificate.robustness, strict=True)
        ]
    )
    flat = attacked.flatten(1)
    inside = flat.isfinite().all(dim=1) & (flat >= 0).all(dim=1) & (flat <= 1).all(dim=1)
    inside &= distances(clean, attacked, threat.norm) <= limit
    inside &= (flat == clean.flatten(1)).all(dim=1) | broken
    if not bool(inside.all()):
        why = f"are not within {threat} and [0, 1], or moved though nothing broke them"
        outside = _ids(certificate, ~inside)
        return [check("distances", "fail", f"points: {len(outside)} {why}: {listed(outside)}")]
    checks = [check("distances", "pass", f"points: all {len(samples)} lie within {threat} and [0, 1]")]

    size = default_block_size(clean, machine.device)
    with exact_arithmetic(machine.device):
        logits = {"clean": judge.logits(clean, size), "attacked": judge.logits(attacked, size)}
    recorded = {
        "clean": torch.tensor([sample.clean_prediction for sample in samples]),
        "attacked": torch.tensor([sample.adversarial_prediction for sample in samples]),
    }
    tie = _TIE if certificate.environment.get("device") == str(machine.device) else _TIE_ELSEWHERE
    checks += [_answers(which, certificate, logits[which], recorded[which], tie) for which in logits]
    labels = torch.tensor([sample.label for sample in samples])
    if int(labels.max()) >= logits["clean"].shape[1]:
        return [*checks, check("labels", "fail", "samples: a label is no class of this network")]
    still = broken & ~_ahead(logits["attacked"], labels, tie)
    message = f"breaks: {int(still.sum())} of {int(broken.sum())} reproduce from their stored points"
    return [*checks, check("breaks", "pass" if torch.equal(still, broken) else _doubt(certificate), message)]


def _answers(which: str, certificate: Certificate, logits: Tensor, recorded: Tensor, tie: float) -> Check:
    """Check that the network's answers are the recorded ones, but for classes that are equally likely."""
    different = _behind(logits, recorded, tie)
    wrong = _ids(certificate, different)
    ties = int(((logits.argmax(dim=1) != recorded) & ~different).sum())
    tied = f" ({ties} tied)" if ties else ""
    message = f"answers: {certificate.n - len(wrong)} of {certificate.n} {which} images as recorded{tied}"
    if wrong:
        message += f"; not so {listed(wrong)}"
    status = _doubt(certificate) if wrong else "pass"
    return check("answers", status, message, name=f"answers, {which}")


def _ahead(logits: Tensor, labels: Tensor, tie: float) -> Tensor:
    """Return whether the label's logit, [n], exceeds the others by more than a tie."""
    rest = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    gap = logits.gather(1, labels[:, None]).squeeze(1) - rest
    return gap > 2 * tie * max(1.0, float(logits.abs().max()))


def _behind(logits: Tensor, classes: Tensor, tie: float) -> Tensor:
    """Return whether the logit of the class, [n], is below the largest one by more than a tie, or missing."""
    there = (classes >= 0) & (classes < logits.shape[1])
    mine = logits.gather(1, torch.where(there, classes, 0)[:, None]).squeeze(1)
    gap = torch.where(there, logits.amax(dim=1) - mine, torch.inf)
    return gap > 2 * tie * max(1.0, float(logits.abs().max()))


def fresh_attacks(
    target: VerificationTarget,
    machine: ExecutionConfig,
    certificate: Certificate,
    clean: Tensor,
    chosen: list[int],
    seed: int,
    recorder: Recorder,
) -> list[Check]:
    """Repeat the whole cascade on survivors with other random numbers."""
    if not chosen:
        return []
    labels = torch.tensor([certificate.samples[index].label for index in chosen])
    config = AttackConfig(
        threat=certificate.threat,
        seed=derive_seed("verify", seed),
        device=machine.device,
        version=_version(certificate),
        answers=target.answers,
    )
    outcome = cascade.attack(
        target.network, clean[chosen], labels, config, workers=machine.workers, recorder=recorder
    )
    fell = [certificate.samples[index].id for index, by in zip(chosen, outcome.broken_by, strict=True) if by]
    survivors = certificate.robustness.count(True)
    message = f"new attacks: {len(chosen) - len(fell)} of {len(chosen)} images withstand again, "
    message += f"drawn from {survivors} that are recorded as robust (seed {seed})"
    if fell:
        message += (
            f"; {listed(fell)} fell. Attacks are random: one in many is bad luck, "
            "several say that the certificate overstates"
        )
    checks = [check("new-attacks", "fail" if fell else "pass", message)]
    for flag in outcome.flags:
        if flag in DOUBTS and flag not in certificate.flags:
            message = f"flag {flag}: {DOUBTS[flag]}; the certificate does not say so"
            checks.append(check("reliability", "inconclusive", message, name=f"flag {flag}"))
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
    """Repeat ``k`` proofs; as they are exact, all must hold again."""
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
    message = f"proofs: {again.count} of {len(chosen)} hold again"
    return [check("proofs", "pass" if again.count == len(chosen) else "fail", message)]


def _version(certificate: Certificate) -> protocols.Version:
    """Return the protocol that the certificate names, so that the same attacks are made."""
    num_classes = certificate.subject.num_classes
    named = (
        each for each in protocols.VERSIONS if protocols.label(each, num_classes) == certificate.protocol
    )
    return next(named, "standard")


def _doubt(certificate: Certificate) -> Status:
    """Judge a different answer: inconclusive for a network that is flagged as randomized."""
    return "inconclusive" if "randomized" in certificate.flags else "fail"


def _ids(certificate: Certificate, chosen: Tensor) -> list[str]:
    return [sample.id for sample, wanted in zip(certificate.samples, chosen.tolist(), strict=True) if wanted]


def listed(ids: Sequence[str]) -> str:
    """List the first few ids, without control characters: they come from a file."""
    shown = ", ".join(plain(each, 60) for each in ids[:_NAMED])
    return shown + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
