"""Check a certificate against the files of its run folder, without running a network."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError, InputError, UsageError
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.gating.check import Check, Status, Verdict
from s2ap_deploy.gating.devices import RECORD, Device, DeviceRecord
from s2ap_deploy.gating.file_checks import NamedFiles
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.field_types import TEST_IMAGES
from s2ap_deploy.records import PointsCheck
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import CERTIFICATE, COPY, MASKS, MODEL, RECIPE_FILE
from s2ap_deploy.runs.manifest import Manifest, StageName, StageRecord
from s2ap_deploy.spec import Record

FILE = "file"
"""The role of an exported file; those of networks are the keys of STAGES."""
STAGES: dict[str, StageName] = {"dense": "pretrain", "pruned": "finetune"}
REPORT = "report.json"
UNFINISHED = "unfinished"
"""The reason of a check of a stage that began and did not end."""
STEPS = "steps"
"""The folder of the run folders that iterative pruning went through."""
_LINKS: dict[str, tuple[str, ...]] = {
    "search": ("dense",),
    "finetune": ("search", "masks"),
    "certify": ("dense", "pruned"),
    "export": ("checkpoint", "certificate", "scores"),
    "artifact": ("file",),
    "device": ("certificate", "file"),
}
"""The inputs of each stage that are hashes of files which the run itself has recorded."""


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
        """Check the certificate, its facts, and every file that it, the manifest or the report names."""
        named = recorded_files(self.folder, self.contents)
        self.expect(named, "the certificate")
        return [
            self._own_hash(),
            *named.checks(),
            *stage_checks(self.folder, self.contents, named),
            *self.fact_checks(named),
        ]

    def expect(self, named: NamedFiles, by: str) -> None:
        """Add the files that the certificate names. Raises RunFolderError for one outside of the folder."""
        certificate = self.certificate
        found = {self.attacked_name: self.attacked_sha256}
        if certificate.points is not None:
            files.within(self.folder / self._stage, certificate.points.name)
            found[f"{self._stage}/{certificate.points.name}"] = certificate.points.sha256
        found[f"search/{MASKS}"] = certificate.mask_sha256
        found[f"certify/{RECIPE_FILE}"] = certificate.recipe_sha256
        for name, sha256 in found.items():
            if sha256 is not None:
                named.expect(name, sha256, by)

    def fact_checks(self, named: NamedFiles) -> list[Check]:
        """Compare the certificate's facts with the files that are as named: recipe, stage, points, counts."""
        return [
            *self._requested(),
            *self._recipe(named),
            *self._points_count(named),
            *self._sparsity(named),
        ]

    def _requested(self) -> list[Check]:
        """Check that the inputs of the stage that issued the certificate match it."""
        stage = self._stage
        record = self.contents.stages.get(stage)
        if record is None:
            return []
        asked, section = record.inputs, record.inputs.get("certify")
        data = asked.get("data")
        wanted: dict[str, tuple[Any, Any]] = {
            "threat": (asked.get("threat"), self.certificate.threat.model_dump())
        }
        if isinstance(data, dict):
            wanted["data"] = (_kind(str(data.get("name"))), _kind(self.certificate.data))
        if isinstance(section, dict):
            wanted |= _settings(section, self.certificate)
        if STAGES.get(self.role) is not None:
            wanted[self.role] = (asked.get(self.role), self.attacked_sha256)
        return _compared(
            "stage", f"the manifest's {stage}", {k: v for k, v in wanted.items() if v[0] is not None}
        )

    def _recipe(self, named: NamedFiles) -> list[Check]:
        """Check that the recipe of the run matches the certificate."""
        name, certificate = f"certify/{RECIPE_FILE}", self.certificate
        if certificate.recipe_sha256 is None:
            if self.role == FILE or name not in self.recorded:
                return []
            why = "recipe: the run has recorded one, and the certificate names none"
            return [check("recipe", "inconclusive", why)]
        if named.sha256(name) != certificate.recipe_sha256:
            return []
        try:
            recipe = catalog.load(str(self.folder / name))
        except DeployError as error:  # such as a target of a plug-in that is not installed here
            return [check("recipe", "inconclusive", f"recipe: cannot be read: {error.message}")]
        wanted: dict[str, tuple[Any, Any]] = {
            "data.name": (_kind(recipe.data.name), _kind(certificate.data)),
            "threat": (recipe.threat, certificate.threat),
        }
        section = recipe.certify.model_dump()
        wanted |= {f"certify.{key}": pair for key, pair in _settings(section, certificate).items()}
        return _compared("recipe", "the recipe", wanted)

    def _points_count(self, named: NamedFiles) -> list[Check]:
        """Check that the points file holds a clean and an attacked point per sample."""
        points, n = self.certificate.points, self.certificate.n
        if points is None or named.sha256(f"{self._stage}/{points.name}") != points.sha256:
            return []
        _, tensors = _header(self.folder / self._stage / points.name)
        counts = [tensors.get(name, _NOTHING).shape[:1] for name in ("clean", "attacked")]
        if counts != [(n,), (n,)]:
            return [
                check("points", "fail", f"points: the file does not hold {n} clean and {n} attacked points")
            ]
        return [check("points", "pass", f"points: the file holds {n} clean and {n} attacked points")]

    def _sparsity(self, named: NamedFiles) -> list[Check]:
        """Compare the stated sparsity with the network's file and the masks, and those with each other."""
        certificate, stated = self.certificate, self.certificate.subject.sparsity
        if self.role == FILE or named.sha256(self.attacked_name) != self.attacked_sha256:
            return []
        network = self.folder / self.attacked_name
        facts, weights = _header(network)
        wrong = [] if _same(facts.get("sparsity"), stated) else [f"{self.attacked_name} states another"]
        masks = f"search/{MASKS}"
        if certificate.mask_sha256 is not None and named.sha256(masks) == certificate.mask_sha256:
            kept = _counts(self.folder / masks, "BOOL")
            size = sum(total for _, total in kept.values())
            if not _same(1 - sum(ones for ones, _ in kept.values()) / max(size, 1), stated):
                wrong.append(f"{masks} keeps another share")
            left = _counts(network, "F32", kept)
            if any(left[name][0] > kept[name][0] for name in left) or not kept.keys() <= weights.keys():
                wrong.append(f"{self.attacked_name} has other weights than {masks} keeps")
        shown = "none" if stated is None else f"{stated:.4%}"
        if wrong:
            return [check("sparsity", "fail", f"sparsity: {shown} is certified, but {' and '.join(wrong)}")]
        return [check("sparsity", "pass", f"sparsity: {shown}, as the files of the network have it")]

    def _own_hash(self) -> Check:
        """Check that the certificate is canonical JSON and the file that the run recorded."""
        name = "certificate"
        if self.digest != self.certificate.sha256:
            return check(name, "fail", f"{name}: its bytes are not the canonical form of its content")
        recorded = self.recorded.get(
            f"{self._stage}/{CERTIFICATE}" if self.role == FILE else f"certify/{self.role}.json"
        )
        if recorded is None:
            of = "an exported file" if self.role == FILE else f"its {self.role} network"
            return check(name, "inconclusive", f"{name}: the run has recorded none for {of}")
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
        try:
            report = export_report(self.folder, self.contents, NamedFiles(self.folder), stage)
            if report is None:
                return
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
    return run.verification(run.file_checks(), scope="files", seed=None, attacked=0)


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
            hint="set the run folder of the certificate with --run",
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


def recorded_files(folder: Path, contents: Manifest) -> NamedFiles:
    """Return the files that the manifest lists, those of the steps of iterative pruning, and the report's.

    The verdict is left out: judging again replaces it. Raises RunFolderError for a name that leads outside.
    """
    named = NamedFiles(folder)
    _expect_outputs(named, "", contents)
    steps = folder / STEPS
    for step in sorted(steps.iterdir()) if steps.is_dir() and not steps.is_symlink() else ():
        if (step / manifest.FILE_NAME).is_file():
            _expect_outputs(named, f"{STEPS}/{step.name}/", Manifest.load(step))
    for stage in contents.of_kind("export"):
        report = export_report(folder, contents, named, stage)
        for name, sha256 in report.named_files.items() if report is not None else ():
            files.within(folder / stage, name)
            named.expect(f"{stage}/{name}", sha256, f"{stage}/{REPORT}")
    return named


def _expect_outputs(named: NamedFiles, prefix: str, contents: Manifest) -> None:
    for stage, record in contents.stages.items():
        for output in record.outputs if stage != "gate" else ():
            named.expect(f"{prefix}{output.path}", output.sha256, f"{prefix}{manifest.FILE_NAME}")


def export_report(
    folder: Path, contents: Manifest, named: NamedFiles, stage: StageName
) -> ExportReport | None:
    """Load the report of an ``export`` stage, if it is the one that the manifest lists.

    Raises RunFolderError.
    """
    name = f"{stage}/{REPORT}"
    recorded = _recorded(contents).get(name)
    if recorded is None or named.sha256(name) != recorded:
        return None
    return ExportReport.load(files.within(folder, name))


def devices(
    folder: Path,
    contents: Manifest,
    certificates: Mapping[str, Certificate],
    reports: Mapping[StageName, ExportReport],
) -> list[Device]:
    """Return the devices of a run whose records are as recorded, judged by ``certificates``, by their hash.

    Raises InputError for a record that contradicts itself or its certificate.
    """
    found = []
    for stage, entry in contents.finished("device").items():
        path = files.within(folder, f"{stage}/{RECORD}")
        recorded = next(
            (output.sha256 for output in entry.outputs if output.path == f"{stage}/{RECORD}"), None
        )
        if recorded is None or not path.is_file() or files.sha256(path) != recorded:
            continue  # the check of recorded files says so
        record = DeviceRecord.load(path)
        certificate = certificates.get(record.certificate_sha256)
        report = reports.get(str(entry.inputs.get("export")))
        largest = 1.0 if report is None else report.agreement.largest_logit
        judged = None if certificate is None else judged_record(record, certificate, largest, str(path))
        seen = None if certificate is None else record.seen(certificate)
        found.append(Device(name=stage.removeprefix("device-"), record=record, judged=judged, seen=seen))
    return found


def judged_record(
    record: DeviceRecord, certificate: Certificate, largest_logit: float, source: str
) -> PointsCheck:
    """Judge the answers of the record in ``source``. Raises InputError where it contradicts itself."""
    try:
        return record.judged(certificate, largest_logit)
    except ValueError as error:
        raise InputError(
            f"{source}: {error}",
            code="device-record-wrong",
            hint="repeat python bundle.pyz on the device",
        ) from None


def stage_checks(folder: Path, contents: Manifest, named: NamedFiles) -> list[Check]:
    """Report stages that the manifest lacks although files, or inputs of other stages, speak of them."""
    checks = []
    there = {path.name for path in folder.iterdir() if path.is_dir() and manifest.is_stage(path.name)}
    for stage in sorted((there | contents.stages.keys()) - {"gate"}):
        record = contents.stages.get(stage)
        if record is not None and record.status == "finished":
            checks += _unlinked(stage, record, named)
        elif any(path.is_file() for path in (folder / stage).rglob("*")):
            what = "is not in the manifest" if record is None else "was not finished"
            message = f"stage {stage}: has files and {what}"
            missed = check("file", "inconclusive", message, name=f"stage {stage}")
            checks.append(missed if record is None else missed.model_copy(update={"reason": UNFINISHED}))
    return checks


def _unlinked(stage: StageName, record: StageRecord, named: NamedFiles) -> list[Check]:
    """Report inputs of a stage that are no recorded file."""
    return [
        check(
            "file",
            "inconclusive",
            f"stage {stage}: its input {key!r} is no file that the run has recorded",
            name=f"stage {stage}",
        )
        for key in _LINKS.get(manifest.kind_of(stage), ())
        if isinstance(sha256 := record.inputs.get(key), str) and not named.names(sha256)
    ]


class _Tensor(NamedTuple):
    """A tensor of a safetensors file; ``start`` and ``end`` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


_NOTHING = _Tensor("", (), 0, 0)
_BYTES = {"BOOL": 1, "F32": 4}


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file; empty if it is damaged. Raises StorageError."""
    return set(_header(path)[1])


def _header(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Read the facts that this tool keeps in a safetensors file, and where its tensors are; empty if damaged.

    Format: the header's length (8 bytes, little-endian), then JSON, then the tensors' bytes.
    """
    start = files.read_bytes(path, limit=8)[:8]
    length = 8 + int.from_bytes(start, "little")
    try:
        if length > files.LARGEST_JSON:
            return {}, {}
        header = files.parse_json(files.read_bytes(path, limit=length)[8:length])
        facts = header.pop("__metadata__", {})
        size = path.stat().st_size
        tensors = {name: _tensor(entry, length, size) for name, entry in header.items()}
        return dict(files.parse_json(facts["s2ap_deploy"])) if "s2ap_deploy" in facts else {}, tensors
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, {}


def _tensor(entry: dict[str, Any], start: int, size: int) -> _Tensor:
    """Return an entry of a header of ``start`` bytes; raises ValueError for one that its file cannot hold."""
    shape, (begin, end) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    found = _Tensor(str(entry["dtype"]), shape, start + begin, start + end)
    each = _BYTES.get(found.dtype, 0)
    if not 0 <= begin <= end <= size - start or min(shape, default=0) < 0:
        raise ValueError("a tensor leads out of its file")
    if each and math.prod(shape) * each != end - begin:
        raise ValueError("the shape of a tensor is not that of its bytes")
    return found


def _counts(path: Path, dtype: str, names: Any = None) -> dict[str, tuple[int, int]]:
    """Count the entries that are not zero, and all, of each tensor of ``dtype`` (BOOL or F32) in the file."""
    tensors = _header(path)[1]
    chosen = {name: each for name, each in tensors.items() if each.dtype == dtype}
    with files.open_regular(path) as stream:
        found = {}
        for name, each in chosen.items():
            if names is not None and name not in names:
                continue
            stream.seek(each.start)
            entries = array("B" if dtype == "BOOL" else "I", stream.read(max(0, each.end - each.start)))
            zeros = entries.count(0) + (entries.count(0x80000000) if dtype == "F32" else 0)
            found[name] = (len(entries) - zeros, len(entries))
    return found


def _settings(section: dict[str, Any], certificate: Certificate) -> dict[str, tuple[Any, Any]]:
    """Pair the settings of a ``certify`` section with those of the certificate."""
    pairs: dict[str, tuple[Any, Any]] = {
        "version": (section.get("version"), protocols.version(certificate.protocol)),
        "attack_seed": (section.get("attack_seed"), certificate.attack_seed),
        "sample_seed": (section.get("sample_seed"), certificate.sample_seed),
    }
    if "n" in section:
        n, there = section["n"], TEST_IMAGES.get(_kind(certificate.data))
        if there is not None:
            pairs["n"] = (there if n is None else min(n, there), certificate.n)
        elif n is not None:  # an image folder may have fewer images
            pairs["n"] = (n, max(n, certificate.n))
    if "provable" in section:
        pairs["provable"] = (section["provable"], certificate.proven is not None)
    return pairs


def _compared(rule: str, asked_by: str, wanted: dict[str, tuple[Any, Any]]) -> list[Check]:
    wrong = [key for key, (asked, done) in wanted.items() if asked != done]
    if wrong:
        return [check(rule, "fail", f"{rule}: {asked_by} differs in {', '.join(wrong)}")]
    return [check(rule, "pass", f"{rule}: {asked_by} matches the certified data, threat model and seeds")]


def _same(one: Any, other: float | None) -> bool:
    """Compare two shares up to rounding."""
    if one is None or other is None:
        return one is other
    return isinstance(one, int | float) and math.isclose(one, other, rel_tol=1e-12, abs_tol=1e-12)


def _kind(data: str) -> str:
    """Return the data set's name; that of an image folder without its machine-dependent path."""
    return data.partition(":")[0]
