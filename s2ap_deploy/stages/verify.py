"""Verify: compare a certificate with every file that it names, and repeat parts of its attack.

Nothing is written and no lock is taken: the run folder may belong to another user, or be read-only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.data.splits import choose
from s2ap_deploy.errors import DataError
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
from s2ap_deploy.evaluation.points import load_points
from s2ap_deploy.formatting import plain
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.gating.policy import DOUBTS
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.onnx_export.onnx_module import OnnxModule
from s2ap_deploy.pruning.masks import load_tensors
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runs.folder import MASKS, RECIPE_FILE
from s2ap_deploy.runtime import derive_seed
from s2ap_deploy.stages.certified_files import FILE, CertifiedRun, Verification, check
from s2ap_deploy.stages.context import ExecutionConfig, read_classifier, read_images
from s2ap_deploy.stages.early_certify import prove
from s2ap_deploy.stages.export_device import open_artifact

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
    opened = open_artifact(path)
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
        why = f"are not within {threat} and [0, 1], or were moved although nothing broke them"
        outside = _ids(certificate, ~inside)
        return [check("distances", "fail", f"points: {len(outside)} {why}: {listed(outside)}")]
    checks = [check("distances", "pass", f"points: all {len(samples)} are within {threat} and [0, 1]")]

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
        return [*checks, check("labels", "fail", "samples: a label is not a class of this network")]
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
        message += f"; not for {listed(wrong)}"
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
            f"; {listed(fell)} broke. Attacks are random: one of many may be chance, "
            "several mean that the certificate overstates robustness"
        )
    checks = [check("new-attacks", "fail" if fell else "pass", message)]
    for flag in outcome.flags:
        if flag in DOUBTS and flag not in certificate.flags:
            message = f"flag {flag}: {DOUBTS[flag]}; the certificate lacks this flag"
            checks.append(check("reliability", "inconclusive", message, name=f"flag {flag}"))
    return checks


def fresh_proofs(
    classifier: nn.Module,
    machine: ExecutionConfig,
    certificate: Certificate,
    clean: Tensor,
    recorder: Recorder,
) -> list[Check]:
    """Repeat every proof; as they are exact, all must hold again."""
    if certificate.proven is None or not certificate.proven.indices:
        return []
    chosen = list(certificate.proven.indices)
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


class _Points(NamedTuple):
    """Images, labels and attacked points in the certificate's order, from its own file or from the data."""

    clean: Tensor
    attacked: Tensor | None


def verify(
    path: Path, folder: Path | None, *, k: int, seed: int, machine: ExecutionConfig, recorder: Recorder
) -> Verification:
    """Recompute what the certificate at ``path`` claims, and attack ``k`` of its survivors again.

    The survivors are drawn by ``seed``, and the attacks are the same with other random numbers and in other
    blocks. Every proof is repeated, whatever ``k`` is. A missing file makes the answer inconclusive; a
    changed file, a stored point that does not reproduce, and a survivor that falls make it a failure.

    Args:
        path: the certificate.
        folder: its run folder (None: the one around the certificate).
        k: the number of survivors to attack.
        seed: draws the survivors and the random numbers of the attacks.
        machine: where data are and what computes.
        recorder: receives progress.

    Raises:
        InputError: not a certificate.
        UsageError: no run folder is found.
        CheckpointError, ArchitectureError: the network cannot be read.
    """
    run = CertifiedRun.load(path, folder)
    certificate = run.certificate
    checks = run.file_checks()
    attacked = 0
    target = _target(run, machine, checks)
    evidence = _evidence(run, machine, target, checks, recorder)
    if target is not None and evidence is not None:
        if evidence.attacked is not None:
            checks += stored_points(
                target.frozen(machine), machine, certificate, evidence.clean, evidence.attacked
            )
        robust = [index for index, survived in enumerate(certificate.robustness) if survived]
        chosen = [robust[position] for position in choose(len(robust), k, seed=seed)] if k else []
        attacked = len(chosen)
        checks += fresh_attacks(target, machine, certificate, evidence.clean, chosen, seed, recorder)
        checks += fresh_proofs(target.network, machine, certificate, evidence.clean, recorder)
    return run.verification(checks, scope="network", seed=seed, attacked=attacked)


def _target(run: CertifiedRun, machine: ExecutionConfig, checks: list[Check]) -> VerificationTarget | None:
    """Load what was attacked if it has the certified weights, and check its masks."""
    path = files.within(run.folder, run.attacked_name)
    if not path.is_file() or run.attacked_sha256 not in (None, files.sha256(path)):
        return None
    target = load_file(path) if run.role == FILE else load_network(path, machine)
    if target.weights_sha256 != run.certificate.subject.weights_sha256:
        checks.append(check("weights", "fail", "weights: differ from those attacked"))
        return None
    checks.append(check("weights", "pass", "weights: the tensors in the file are those attacked"))
    masks = files.within(run.folder, f"search/{MASKS}")
    if masks.is_file() and files.sha256(masks) == run.certificate.mask_sha256:
        checks.append(_masked(target.network, masks))
    return target


def _masked(classifier: nn.Module, masks: Path) -> Check:
    """Check that every masked weight is zero."""
    parameters = dict(classifier.named_parameters())
    loose = 0
    for name, mask in load_tensors(masks).items():
        weight = parameters.get(name)
        if weight is None or weight.shape != mask.shape:
            return check("masks", "fail", f"masks: {plain(name, 60)} is not a weight of this network")
        loose += int((weight.detach().cpu() * ~mask.bool()).count_nonzero())
    if loose:
        return check("masks", "fail", f"masks: {loose} weights outside of them are not zero")
    return check("masks", "pass", "masks: every weight outside of them is zero")


def _evidence(
    run: CertifiedRun,
    machine: ExecutionConfig,
    target: VerificationTarget | None,
    checks: list[Check],
    recorder: Recorder,
) -> _Points | None:
    """Load the clean and the attacked points, and compare them with the data set where it can be read."""
    stored, certificate, path = None, run.certificate, run.points
    if path is not None and certificate.points is not None:
        stored = load_points(path, certificate.points)
    if stored is not None and len(stored[0]) != certificate.n:
        message = f"points: {len(stored[0])} in the file, {certificate.n} in the certificate"
        checks.append(check("points", "fail", message))
        return None
    clean = _from_data(run, machine, target, checks, recorder)
    if clean is not None and stored is not None:
        if not torch.equal(clean, stored[0]):
            checks.append(check("images", "fail", "images: the stored ones are not those of the data set"))
            return None
        checks.append(check("images", "pass", "images: the stored ones are those of the data set"))
    if stored is not None:
        return _Points(*stored)
    return _Points(clean, None) if clean is not None else None


def _from_data(
    run: CertifiedRun,
    machine: ExecutionConfig,
    target: VerificationTarget | None,
    checks: list[Check],
    recorder: Recorder,
) -> Tensor | None:
    """Read the certified images from the data set by their ids; None where it cannot be read here."""
    certificate, recipe_file = run.certificate, run.folder / "certify" / RECIPE_FILE
    recipe_file = recipe_file if recipe_file.is_file() else run.folder / RECIPE_FILE
    if not recipe_file.is_file():
        checks.append(check("samples", "inconclusive", "samples: no recipe names the data"))
        return None
    recipe = catalog.load(str(recipe_file))
    try:
        test = read_images(recipe, machine, target.size if target is not None else None, recorder).test
    except DataError as error:
        message = f"samples: the data cannot be read: {error.message}"
        checks.append(check("samples", "inconclusive", message))
        return None
    places = {name: position for position, name in enumerate(test.ids)}
    unknown = [sample.id for sample in certificate.samples if sample.id not in places]
    if unknown:
        message = f"samples: {len(unknown)} are not in {certificate.data}: {listed(unknown)}"
        checks.append(check("samples", "fail", message))
        return None
    subset = test.subset([places[sample.id] for sample in certificate.samples])
    wrong = [
        sample.id
        for sample, label in zip(certificate.samples, subset.labels.tolist(), strict=True)
        if sample.label != label
    ]
    status: Status = "fail" if wrong else "pass"
    message = (
        f"have another label in the data: {listed(wrong)}" if wrong else "ids and labels are the data set's"
    )
    checks.append(check("samples", status, f"samples: {len(wrong) or certificate.n} {message}"))
    return subset.tensors()[0]
