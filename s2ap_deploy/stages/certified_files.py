"""Check a certificate against the files of its run folder, without running a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError, UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Interval
from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.formatting import plain
from s2ap_deploy.gating.check import Check, Status, Verdict
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe import catalog
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import CERTIFICATE, COPY, MASKS, MODEL, RECIPE_FILE
from s2ap_deploy.runs.manifest import Manifest
from s2ap_deploy.spec import Record

FILE = "file"
"""The role of an exported file; those of networks are the keys of STAGES."""
STAGES = {"dense": "pretrain", "pruned": "finetune"}
_LARGEST_HEADER = 2**20  # bytes; that of a points file has some hundred


class SubjectFile(Record):
    """A file that the certificate covers; ``name`` is relative to the run folder."""

    name: str
    sha256: str


class Verification(Record):
    """The result of a verification.

    ``scope`` is ``files`` where no network was run. ``attacked`` is the number of images attacked
    again, drawn with ``seed``; None if none were drawn.
    """

    certificate: str
    certificate_sha256: str
    scope: Literal["network", "files"]
    status: Status
    exit_code: int
    seed: int | None
    attacked: int
    checks: tuple[Check, ...]
    subjects: tuple[SubjectFile, ...]


class CertifiedRun(NamedTuple):
    """A certificate with its run folder; ``role`` is that of a network, or ``file`` for an exported file."""

    path: Path
    certificate: Certificate
    digest: str
    folder: Path
    contents: Manifest
    role: str

    @classmethod
    def load(cls, path: Path, folder: Path | None) -> CertifiedRun:
        """Read the certificate at ``path`` and the manifest of its run folder (None: the one around it).

        Raises InputError for a file that is not a certificate, UsageError where no run folder is found.
        """
        certificate = Certificate.load(path)
        around = run_folder(path, folder)
        contents = Manifest.load(around)
        role = _role(path, contents, certificate)
        return cls(path, certificate, files.sha256(path), around, contents, role)

    @property
    def points(self) -> Path | None:
        """The file of attacked points, if it has the hash that the certificate names."""
        named = self.certificate.points
        if named is None:
            return None
        path = files.within(self.folder / self._stage, named.name)
        return path if path.is_file() and files.sha256(path) == named.sha256 else None

    @property
    def attacked_name(self) -> str:
        """The path of what was attacked; for a file, wherever the run has recorded its hash."""
        if self.certificate.subject.artifact is None:
            return f"{STAGES[self.role]}/{MODEL}"
        named = (name for name, sha256 in self.recorded.items() if sha256 == self.attacked_sha256)
        return next(named, f"{self._stage}/{COPY}")

    @property
    def attacked_sha256(self) -> str | None:
        """The hash of the file that was attacked."""
        artifact = self.certificate.subject.artifact
        return self.certificate.subject.checkpoint_sha256 if artifact is None else artifact.sha256

    @property
    def recorded(self) -> dict[str, str]:
        """The hash of every file that the manifest lists."""
        return _recorded(self.contents)

    @property
    def _stage(self) -> str:
        """The folder of the certificate and of its points; of a copy elsewhere, that of the recorded one."""
        if self.role != FILE:
            return "certify"
        stages = self.contents.of_kind("artifact")
        own = self.path.resolve().parent.name
        by_hash = (
            name
            for name, record in stages.items()
            if any(output.sha256 == self.digest for output in record.outputs)
        )
        return own if own in stages else next(by_hash, "artifact")

    def file_checks(self) -> list[Check]:
        """Check the certificate itself, and hash every file that it names."""
        certificate = self.certificate
        named = {self.attacked_name: self.attacked_sha256}
        if certificate.points is not None:
            named[f"{self._stage}/{certificate.points.name}"] = certificate.points.sha256
        named[f"search/{MASKS}"] = certificate.mask_sha256
        named[f"certify/{RECIPE_FILE}"] = certificate.recipe_sha256
        return [
            self._own_hash(),
            _intervals(certificate),
            *(_hashed(self.folder, name, sha256) for name, sha256 in named.items() if sha256 is not None),
        ]

    def _own_hash(self) -> Check:
        """Check that the certificate is canonical JSON and the file that the run recorded."""
        name = "certificate"
        if self.digest != self.certificate.sha256:
            return check(name, "fail", f"{name}: its bytes are not the canonical text of its content")
        recorded = self.recorded.get(
            f"{self._stage}/{CERTIFICATE}" if self.role == FILE else f"certify/{self.role}.json"
        )
        if recorded is None:
            of = "an exported file" if self.role == FILE else f"its {self.role} network"
            return check(name, "inconclusive", f"{name}: the run has recorded none of {of}")
        if recorded != self.digest:
            return check(name, "fail", f"{name}: not the one that the run recorded (SHA-256 {self.digest})")
        return check(name, "pass", f"{name}: consistent, and as recorded (SHA-256 {self.digest})")

    def subjects(self) -> tuple[SubjectFile, ...]:
        """Return the attacked network, and exported files that matched the certificate on every point."""
        found = []
        if self.attacked_sha256 is not None:
            found.append(SubjectFile(name=self.attacked_name, sha256=self.attacked_sha256))
        exports = () if self.role == FILE else self.contents.finished("export")
        return (*found, *(file for stage in exports for file in self._covered(stage)))

    def _covered(self, stage: str) -> Iterator[SubjectFile]:
        """Yield the file of an ``export`` stage if the certificate covers it."""
        report_file = self.folder / stage / "report.json"
        if not report_file.is_file():
            return
        try:
            report = ExportReport.load(report_file)
            path = files.within(self.folder / stage, report.file)
        except DeployError:  # the gate reports it; here the file is only not covered
            return
        covered = any(
            answer.certificate_sha256 == self.digest and answer.n == self.certificate.n and answer.explained
            for answer in report.points_checks
        )
        if covered and path.is_file() and files.sha256(path) == report.sha256:
            yield SubjectFile(name=f"{stage}/{report.file}", sha256=report.sha256)

    def verification(
        self, checks: list[Check], *, scope: Literal["network", "files"], seed: int | None, attacked: int
    ) -> Verification:
        """Summarize ``checks``."""
        verdict = Verdict.of(checks)
        return Verification(
            certificate=str(self.path),
            certificate_sha256=self.digest,
            scope=scope,
            status=verdict.status,
            exit_code=verdict.exit_code,
            seed=seed,
            attacked=attacked,
            checks=tuple(checks),
            subjects=self.subjects(),
        )


def verify_files(path: Path, folder: Path | None) -> Verification:
    """Check the certificate at ``path`` as far as possible from files alone.

    Counts and intervals are computed again from the samples, every named file is hashed, the points file must
    hold one point per sample, and the recipe must ask for this data set and threat model. No network is run.

    Raises:
        InputError: the file is not a certificate.
        UsageError: there is no run folder around it.
    """
    run = CertifiedRun.load(path, folder)
    checks = [*run.file_checks(), *_points_count(run), *_recipe(run)]
    return run.verification(checks, scope="files", seed=None, attacked=0)


def run_folder(path: Path, folder: Path | None = None) -> Path:
    """Return ``folder``, or the run folder around the certificate at ``path``. Raises UsageError."""
    if not path.is_file():
        raise UsageError(
            f"there is no certificate at {path}",
            code="certificate-missing",
            hint="certificates are in RUN/certify and RUN/artifact",
        )
    place = path.resolve().parent.parent if folder is None else folder
    if not (place / manifest.FILE_NAME).is_file():
        raise UsageError(
            f"there is no run folder around {path}" if folder is None else f"there is no run in {folder}",
            code="run-folder-missing",
            hint="name the run folder of the certificate with --run",
        )
    return place


def check(
    rule: str, status: Status, message: str, *, name: str | None = None, path: str | None = None
) -> Check:
    """Build a check without a threshold; its name is the rule unless ``name`` is given."""
    return Check(rule=rule, name=name or rule, status=status, message=message, path=path)


def _role(path: Path, contents: Manifest, certificate: Certificate) -> str:
    if certificate.subject.artifact is not None:
        return FILE
    named = _recorded(contents)
    by_network = {
        role
        for role, stage in STAGES.items()
        if named.get(f"{stage}/{MODEL}") == certificate.subject.checkpoint_sha256
    }
    # The network decides for a certificate that was renamed.
    role = path.stem if path.stem in STAGES or not by_network else by_network.pop()
    return role if role in STAGES else "pruned"


def _recorded(contents: Manifest) -> dict[str, str]:
    return {output.path: output.sha256 for record in contents.stages.values() for output in record.outputs}


def _hashed(folder: Path, name: str, sha256: str) -> Check:
    shown = plain(name, 100)
    label, path = f"file {shown}", files.within(folder, name)
    status: Status = "pass"
    message = "has the SHA-256 that the certificate names"
    if not path.is_file():
        status, message = "inconclusive", "is missing"
    elif files.sha256(path) != sha256:
        status, message = "fail", "is not the one that the certificate names"
    return check("file", status, f"{label} {message}", name=label, path=shown)


def _intervals(certificate: Certificate) -> Check:
    """Compute the exact intervals and the counts of broken samples again."""
    shares = {"clean": certificate.clean, "robust": certificate.robust}
    wrong = [
        name
        for name, share in shares.items()
        if not isinstance(share, Interval)
        and not _close(share.interval, clopper_pearson(share.k, share.n, share.level))
    ]
    broken = [sample.broken_by for sample in certificate.samples]
    wrong += [
        f"attack {plain(row.name, 60)}"
        for row in certificate.attacks
        if row.n_broken != broken.count(row.name)
    ]
    if wrong:
        return check("figures", "fail", f"figures: do not follow from the samples: {', '.join(wrong)}")
    return check("figures", "pass", "figures: counts and intervals follow from the samples")


def _close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Compare two intervals up to the rounding of another machine's mathematical library."""
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(one, other, strict=True))


def _points_count(run: CertifiedRun) -> list[Check]:
    """Check that the points file holds a clean and an attacked point per sample."""
    path, n = run.points, run.certificate.n
    if path is None:
        return []
    shapes = _shapes(path)
    counts = [shapes.get(name, [0])[:1] for name in ("clean", "attacked")]
    if counts != [[n], [n]]:
        return [check("points", "fail", f"points: the file does not hold {n} clean and {n} attacked points")]
    return [check("points", "pass", f"points: the file holds {n} clean and {n} attacked points")]


def _shapes(path: Path) -> dict[str, list[int]]:
    """Read the shape of each tensor from the header of a safetensors file; empty for a damaged file.

    Format: the header's length (8 bytes, little-endian), then JSON, then the tensors' bytes.
    """
    data = files.read_bytes(path, limit=_LARGEST_HEADER)
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _recipe(run: CertifiedRun) -> list[Check]:
    """Check that the recipe of the run asks for what the certificate says was done."""
    path, certificate = run.folder / "certify" / RECIPE_FILE, run.certificate
    if not path.is_file() or files.sha256(path) != certificate.recipe_sha256:
        return []
    try:
        recipe = catalog.load(str(path))
    except DeployError as error:  # such as a target of a plug-in that is not installed here
        return [check("recipe", "inconclusive", f"recipe: cannot be read here: {error.message}")]
    section = recipe.certify
    wanted = {
        "data.name": (_kind(recipe.data.name), _kind(certificate.data)),
        "threat": (recipe.threat, certificate.threat),
        "certify.attack_seed": (section.attack_seed, certificate.attack_seed),
        "certify.sample_seed": (section.sample_seed, certificate.sample_seed),
    }
    wrong = [key for key, (asked, done) in wanted.items() if asked != done]
    if section.n is not None and section.n < certificate.n:
        wrong.append("certify.n")
    if wrong:
        return [check("recipe", "fail", f"recipe: asks for something else: {', '.join(wrong)}")]
    return [check("recipe", "pass", "recipe: asks for the certified data, threat model and seeds")]


def _kind(data: str) -> str:
    """Return the data set's name; that of an image folder without its machine-dependent path."""
    return data.partition(":")[0]
