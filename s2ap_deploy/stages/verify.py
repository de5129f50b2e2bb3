"""Verify: compare a certificate with every file that it names, and repeat parts of its attack.

Nothing is written and no lock is taken: the run folder may belong to another user, or be read-only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.errors import DataError
from s2ap_deploy.evaluation import points
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.pruning.masks import load_tensors
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runs.folder import MASKS, RECIPE_FILE
from s2ap_deploy.stages.certified_files import FILE, CertifiedRun, Verification, check
from s2ap_deploy.stages.context import read_images
from s2ap_deploy.stages.execution import ExecutionConfig
from s2ap_deploy.stages.verify_attacks import (
    VerificationTarget,
    fresh_attacks,
    fresh_proofs,
    listed,
    load_file,
    load_network,
    stored_points,
)


class _Points(NamedTuple):
    """Images, labels and attacked points in the certificate's order, from its own file or from the data."""

    clean: Tensor
    attacked: Tensor | None


def verify(
    path: Path, folder: Path | None, *, k: int, seed: int, machine: ExecutionConfig, recorder: Recorder
) -> Verification:
    """Recompute what the certificate at ``path`` claims, and attack ``k`` of its survivors again.

    The survivors are drawn by ``seed``, and the attacks are the same with other random numbers and in other
    blocks. A missing file makes the answer inconclusive; a changed file, a stored point that does not
    reproduce, and a survivor that falls make it a failure.

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
        checks += fresh_proofs(target.network, machine, certificate, evidence.clean, k, seed, recorder)
    return run.verification(checks, scope="network", seed=seed, attacked=attacked)


def _target(run: CertifiedRun, machine: ExecutionConfig, checks: list[Check]) -> VerificationTarget | None:
    """Load what was attacked if it has the certified weights, and check its masks."""
    path = files.within(run.folder, run.attacked_name)
    if not path.is_file() or run.attacked_sha256 not in (None, files.sha256(path)):
        return None
    target = load_file(path) if run.role == FILE else load_network(path, machine)
    if target.weights_sha256 != run.certificate.subject.weights_sha256:
        checks.append(check("weights", "fail", "weights: not the ones that were attacked"))
        return None
    checks.append(
        check("weights", "pass", "weights: the tensors in the file are the ones that were attacked")
    )
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
            return check("masks", "fail", f"masks: {plain(name, 60)} is no weight of this network")
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
        stored = points.load(path, certificate.points)
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
        checks.append(check("samples", "inconclusive", "samples: no recipe says where the data are"))
        return None
    recipe = catalog.load(str(recipe_file))
    try:
        test = read_images(recipe, machine, target.size if target is not None else None, recorder).test
    except DataError as error:
        message = f"samples: the data cannot be read here: {error.message}"
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
