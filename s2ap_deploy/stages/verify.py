"""Verify: a certificate held against every file that it names, and against attacks that it has not seen.

Nothing is written and no lock is taken: the run folder may belong to somebody else, or be read-only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.data.sampling import choose
from s2ap_deploy.errors import DataError, DeployError, UsageError
from s2ap_deploy.evaluation import points
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.gating.policy import EXIT_CODES, Verdict
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.pruning.tensors import load_tensors
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import RECIPE_FILE
from s2ap_deploy.runs.manifest import Manifest
from s2ap_deploy.spec import Record
from s2ap_deploy.stages.certify_file import CERTIFICATE, COPY
from s2ap_deploy.stages.context import MODEL, read_images
from s2ap_deploy.stages.execution import ExecutionConfig
from s2ap_deploy.stages.prune import MASKS
from s2ap_deploy.stages.verification_target import VerificationTarget, suspect_file, suspect_network
from s2ap_deploy.stages.verify_attacks import check, fresh_attacks, fresh_proofs, listed, stored_points

_STAGES = {"dense": "pretrain", "pruned": "finetune"}
_FILE = "file"


class SubjectFile(Record):
    """A file for which the certificate speaks; ``name`` is relative to the run folder."""

    name: str
    sha256: str


class Verification(Record):
    """What :func:`verify` found; ``attacked`` is the number of images that were attacked anew."""

    certificate: str
    certificate_sha256: str
    status: Status
    exit_code: int
    seed: int
    attacked: int
    checks: tuple[Check, ...]
    subjects: tuple[SubjectFile, ...]


class _CertificateLocation(NamedTuple):
    """Where the certificate's files lie: the run folder, its manifest, and what was attacked there.

    ``role`` is that of a network, or ``file`` for an exported file.
    """

    folder: Path
    contents: Manifest
    role: str

    @property
    def stage(self) -> str:
        """The folder of the certificate and of its points."""
        return "artifact" if self.role == _FILE else "certify"

    @property
    def certificate(self) -> str:
        return f"artifact/{CERTIFICATE}" if self.role == _FILE else f"certify/{self.role}.json"

    def attacked(self, certificate: Certificate) -> str:
        """The path of what was attacked; for a file, wherever the run has recorded its hash."""
        if certificate.subject.artifact is None:
            return f"{_STAGES[self.role]}/{MODEL}"
        sha256 = certificate.subject.artifact.sha256
        named = (name for name, found in _recorded(self.contents).items() if found == sha256)
        return next(named, f"artifact/{COPY}")


class _Evidence(NamedTuple):
    """Images, labels and attacked points in the certificate's order, from its own file or from the data."""

    clean: Tensor
    attacked: Tensor | None


def verify(
    path: Path, folder: Path | None, *, k: int, seed: int, machine: ExecutionConfig, recorder: Recorder
) -> Verification:
    """Recompute what the certificate at ``path`` claims, and attack ``k`` of its survivors anew.

    ``folder`` is its run folder (None: the one around the certificate). The survivors are drawn by ``seed``,
    and the attacks are the same with other random numbers and in other blocks. A file that is not there makes
    the answer inconclusive; another one in its place, a point that does not do what it is said to, and a
    survivor that falls now make it a failure. Raises InputError for what is no certificate, UsageError where
    no run folder is found, CheckpointError and ArchitectureError for a network that cannot be read.
    """
    certificate = Certificate.load(path)
    place = _place(path, run_folder(path, folder), certificate)
    digest = files.sha256(path)
    checks = [_own_hash(place, certificate, digest), *_file_checks(place, certificate)]
    attacked = 0
    suspect = _suspect(place, machine, certificate, checks)
    evidence = _evidence(place, machine, suspect, certificate, checks, recorder)
    if suspect is not None and evidence is not None:
        if evidence.attacked is not None:
            checks += stored_points(
                suspect.judge(machine), machine, certificate, evidence.clean, evidence.attacked
            )
        standing = [index for index, stands in enumerate(certificate.standing) if stands]
        chosen = [standing[position] for position in choose(len(standing), k, seed=seed)] if k else []
        attacked = len(chosen)
        checks += fresh_attacks(suspect, machine, certificate, evidence.clean, chosen, seed, recorder)
        checks += fresh_proofs(suspect.network, machine, certificate, evidence.clean, k, seed, recorder)
    verdict = Verdict.of(checks)
    return Verification(
        certificate=str(path),
        certificate_sha256=digest,
        status=verdict.status,
        exit_code=EXIT_CODES[verdict.status],
        seed=seed,
        attacked=attacked,
        checks=tuple(checks),
        subjects=_subjects(place, certificate, digest),
    )


def run_folder(path: Path, folder: Path | None = None) -> Path:
    """``folder``, or the run folder around the certificate at ``path``. Raises UsageError if it is none."""
    if not path.is_file():
        raise UsageError(
            f"there is no certificate at {path}", hint="certificates lie in RUN/certify and RUN/artifact"
        )
    place = path.resolve().parent.parent if folder is None else folder
    if not (place / manifest.FILE_NAME).is_file():
        raise UsageError(
            f"there is no run folder around {path}" if folder is None else f"there is no run in {folder}",
            hint="name the run folder of the certificate with --run",
        )
    return place


def _place(path: Path, around: Path, certificate: Certificate) -> _CertificateLocation:
    contents = Manifest.load(around)
    if certificate.subject.artifact is not None:
        return _CertificateLocation(around, contents, _FILE)
    named = _recorded(contents)
    by_network = {
        role
        for role, stage in _STAGES.items()
        if named.get(f"{stage}/{MODEL}") == certificate.subject.checkpoint_sha256
    }
    # A certificate that was renamed is held against the network that it names.
    role = path.stem if path.stem in _STAGES or not by_network else by_network.pop()
    return _CertificateLocation(around, contents, role if role in _STAGES else "pruned")


def _recorded(contents: Manifest) -> dict[str, str]:
    """The hash of every file that the manifest lists."""
    return {output.path: output.sha256 for record in contents.stages.values() for output in record.outputs}


def _own_hash(place: _CertificateLocation, certificate: Certificate, digest: str) -> Check:
    """The file is what the run wrote, and nothing but its own contents."""
    name = "certificate"
    if digest != certificate.sha256:
        return check(name, "fail", f"{name}: its bytes are not the canonical text of what it says")
    recorded = _recorded(place.contents).get(place.certificate)
    if recorded is None:
        of = "an exported file" if place.role == _FILE else f"its {place.role} network"
        return check(name, "inconclusive", f"{name}: the run has recorded none of {of}")
    if recorded != digest:
        return check(name, "fail", f"{name}: not the one that the run recorded (SHA-256 {digest})")
    return check(name, "pass", f"{name}: contradicts itself nowhere, as recorded (SHA-256 {digest})")


def _file_checks(place: _CertificateLocation, certificate: Certificate) -> list[Check]:
    """Every file whose hash the certificate holds."""
    named = {place.attacked(certificate): _subject_sha256(certificate)}
    if certificate.points is not None:
        named[f"{place.stage}/{certificate.points.name}"] = certificate.points.sha256
    named |= {f"search/{MASKS}": certificate.mask_sha256, f"certify/{RECIPE_FILE}": certificate.recipe_sha256}
    return [_hashed(place.folder, name, sha256) for name, sha256 in named.items() if sha256 is not None]


def _hashed(folder: Path, name: str, sha256: str) -> Check:
    label = f"file {plain(name, 100)}"
    path = files.within(folder, name)
    if not path.is_file():
        return check(label, "inconclusive", f"{label} is missing")
    if files.sha256(path) != sha256:
        return check(label, "fail", f"{label} is not the one that the certificate names")
    return check(label, "pass", f"{label} has the SHA-256 that the certificate names")


def _subject_sha256(certificate: Certificate) -> str | None:
    """The hash of the file that was attacked."""
    artifact = certificate.subject.artifact
    return certificate.subject.checkpoint_sha256 if artifact is None else artifact.sha256


def _suspect(
    place: _CertificateLocation, machine: ExecutionConfig, certificate: Certificate, checks: list[Check]
) -> VerificationTarget | None:
    """What was attacked if it has the certified weights, and whether it obeys its masks."""
    path = files.within(place.folder, place.attacked(certificate))
    named = _subject_sha256(certificate)
    if not path.is_file() or named not in (None, files.sha256(path)):
        return None
    suspect = suspect_file(path) if place.role == _FILE else suspect_network(path, machine)
    if suspect.weights_sha256 != certificate.subject.weights_sha256:
        checks.append(check("weights", "fail", "weights: not the ones that were attacked"))
        return None
    checks.append(
        check("weights", "pass", "weights: the tensors in the file are the ones that were attacked")
    )
    masks = files.within(place.folder, f"search/{MASKS}")
    if masks.is_file() and files.sha256(masks) == certificate.mask_sha256:
        checks.append(_masked(suspect.network, masks))
    return suspect


def _masked(classifier: nn.Module, masks: Path) -> Check:
    """Whether every weight that the masks take away is zero."""
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
    place: _CertificateLocation,
    machine: ExecutionConfig,
    suspect: VerificationTarget | None,
    certificate: Certificate,
    checks: list[Check],
    recorder: Recorder,
) -> _Evidence | None:
    """The clean and the attacked points, held against the data set where that can be read."""
    stored = None
    if certificate.points is not None:
        path = files.within(place.folder / place.stage, certificate.points.name)
        if path.is_file() and files.sha256(path) == certificate.points.sha256:
            stored = points.load(path, certificate.points)
    if stored is not None and len(stored[0]) != certificate.n:
        words = f"points: {len(stored[0])} in the file, {certificate.n} in the certificate"
        checks.append(check("points", "fail", words))
        return None
    clean = _from_data(place, machine, suspect, certificate, checks, recorder)
    if clean is not None and stored is not None:
        if not torch.equal(clean, stored[0]):
            checks.append(check("images", "fail", "images: the stored ones are not those of the data set"))
            return None
        checks.append(check("images", "pass", "images: the stored ones are those of the data set"))
    if stored is not None:
        return _Evidence(*stored)
    return _Evidence(clean, None) if clean is not None else None


def _from_data(
    place: _CertificateLocation,
    machine: ExecutionConfig,
    suspect: VerificationTarget | None,
    certificate: Certificate,
    checks: list[Check],
    recorder: Recorder,
) -> Tensor | None:
    """The certified images from the data set itself, by their ids; None where it cannot be read here."""
    recipe_file = place.folder / "certify" / RECIPE_FILE
    recipe_file = recipe_file if recipe_file.is_file() else place.folder / RECIPE_FILE
    if not recipe_file.is_file():
        checks.append(check("samples", "inconclusive", "samples: no recipe says where the data are"))
        return None
    recipe = catalog.load(str(recipe_file))
    try:
        test = read_images(recipe, machine, suspect.size if suspect is not None else None, recorder).test
    except DataError as error:
        words = f"samples: the data cannot be read here: {error.message}"
        checks.append(check("samples", "inconclusive", words))
        return None
    places = {name: position for position, name in enumerate(test.ids)}
    unknown = [sample.id for sample in certificate.samples if sample.id not in places]
    if unknown:
        words = f"samples: {len(unknown)} are not in {certificate.data}: {listed(unknown)}"
        checks.append(check("samples", "fail", words))
        return None
    subset = test.subset([places[sample.id] for sample in certificate.samples])
    wrong = [
        sample.id
        for sample, label in zip(certificate.samples, subset.labels.tolist(), strict=True)
        if sample.label != label
    ]
    status: Status = "fail" if wrong else "pass"
    words = (
        f"have another label in the data: {listed(wrong)}" if wrong else "ids and labels are the data set's"
    )
    checks.append(check("samples", status, f"samples: {len(wrong) or certificate.n} {words}"))
    return subset.tensors()[0]


def _subjects(place: _CertificateLocation, certificate: Certificate, digest: str) -> tuple[SubjectFile, ...]:
    """The attacked network, and the exported file if it gave the certificate's answers on every point."""
    found = []
    attacked = _subject_sha256(certificate)
    if attacked is not None:
        found.append(SubjectFile(name=place.attacked(certificate), sha256=attacked))
    if place.role == _FILE:
        return tuple(found)
    record, report_file = place.contents.stages.get("export"), place.folder / "export" / "report.json"
    if record is None or record.status != "finished" or not report_file.is_file():
        return tuple(found)
    try:
        report = ExportReport.load(report_file)
        path = files.within(place.folder / "export", report.file)
    except DeployError:  # the gate's business; here the file is merely not spoken for
        return tuple(found)
    covered = any(
        answer.certificate_sha256 == digest
        and answer.n == certificate.n
        and answer.disagreements <= answer.ties
        for answer in report.rejudgments
    )
    if covered and path.is_file() and files.sha256(path) == report.sha256:
        found.append(SubjectFile(name=f"export/{report.file}", sha256=report.sha256))
    return tuple(found)
