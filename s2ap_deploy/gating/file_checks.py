"""Checks of files: whether a certificate covers them, and their size, sparsity, latency and age."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path, PurePosixPath

from s2ap_deploy import files
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.formatting import LONGEST_PATH, age_text, plain
from s2ap_deploy.gating.check import Check, Status, inconclusive
from s2ap_deploy.records import ExportFacts, PointsCheck
from s2ap_deploy.spec import Record

RUNNABLE: Mapping[str, tuple[str, ...]] = {
    "ONNX": (".onnx", ".ort"),
    "PyTorch": (".pt", ".pt2", ".pth", ".ptl", ".safetensors"),
    "ExecuTorch": (".pte", ".ptd"),
    "TensorFlow Lite": (".tflite",),
    "Core ML": (".mlpackage", ".mlmodel", ".mlmodelc"),
    "OpenVINO": (".xml", ".bin", ".blob"),
    "ncnn": (".param", ".bin"),
    "MNN": (".mnn",),
    "TensorRT": (".engine", ".plan"),
    "C": (".c", ".h", ".so", ".a", ".o", ".dll", ".dylib"),
}
"""The kinds of file that a device can run or load a network from, by runtime.

A suffix counts anywhere in a name (``model.onnx.bak``) and in the name of a folder (``model.mlpackage``).
"""
_SUFFIXES = frozenset(suffix for suffixes in RUNNABLE.values() for suffix in suffixes)
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_CLOCK_SKEW = timedelta(hours=1)
_UNMEASURED = ("not-measured", "was not measured")


class ShippedFile(Record):
    """A file that may be shipped: its hash and size now (None: missing), and what was recorded of it.

    ``recorded_sha256`` is None for a file that no stage wrote. ``points_checks`` are its answers on the
    points of certificates; ``rounded`` weights make it another network than the one it was exported from;
    ``export`` holds the facts of its export report, ``folder`` is the run folder, for messages.
    """

    path: str
    folder: str = "RUN"
    sha256: str | None
    recorded_sha256: str | None
    bytes: int | None = None
    points_checks: tuple[PointsCheck, ...] = ()
    rounded: bool = False
    export: ExportFacts | None = None

    @classmethod
    def read(cls, path: Path, recorded_sha256: str | None) -> ShippedFile:
        """Hash the file at ``path`` as it is now. Raises StorageError when it exists but is unreadable."""
        there = path.is_file()
        return cls(
            path=str(path),
            sha256=files.sha256(path) if there else None,
            recorded_sha256=recorded_sha256,
            bytes=path.stat().st_size if there else None,
        )


def is_runnable(name: str) -> bool:
    """Return whether a device could run the file, or the folder around it, by its path in the run folder."""
    if name.startswith("gate/") and name.endswith(".xml"):
        return False  # a JUnit report; OpenVINO's graphs load their weights from a .bin file
    parts = PurePosixPath(name.lower()).parts
    return any(not _SUFFIXES.isdisjoint(PurePosixPath(part).suffixes) for part in parts)


def runnable_files(folder: Path) -> Iterator[str]:
    """Yield the names, relative to ``folder``, of the files below it that a device could run, in order.

    A link to a folder is yielded as well: what it leads to is not looked at.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() and path.is_dir()) or (not path.is_dir() and is_runnable(name)):
            yield name


def coverage(file: ShippedFile, *certificates: Certificate) -> Check:
    """Check whether one of the certificates covers the file as it is now; the first one gives the reason."""
    checks = [_coverage(file, each) for each in certificates]
    return next((check for check in checks if check.status == "pass"), checks[0])


def _on_processors(file: ShippedFile, processors: tuple[str, ...] | None) -> Check:
    """Check whether the certificate of the attacked file holds for the processors that it is for."""
    if processors is None:
        return _file_check(file.path, "pass", "is the attacked file")
    wanted = set(file.export.processors if file.export is not None else ())
    if processors and wanted <= set(processors):
        return _file_check(
            file.path, "pass", f"is the attacked file, on processors with {' or '.join(processors)}"
        )
    why = (
        "holds 8-bit weights, and was attacked on a processor "
        + (f"with {', '.join(processors)}, not {', '.join(wanted)}" if processors else "that may overflow")
        + ": certify it on the processor it is for, or export with --weight-bits 7"
    )
    return _file_check(file.path, "inconclusive", why, "processor-differs")


def _coverage(file: ShippedFile, certificate: Certificate) -> Check:
    if file.sha256 is None:
        return _file_check(file.path, "inconclusive", "is missing", "missing")
    if file.recorded_sha256 is not None and file.sha256 != file.recorded_sha256:
        return _file_check(
            file.path, "fail", "is not the one that was checked: its SHA-256 has changed", "changed"
        )
    attacked = certificate.subject.artifact
    if file.sha256 == certificate.subject.checkpoint_sha256:
        return _file_check(file.path, "pass", "is the attacked checkpoint")
    if attacked is not None and file.sha256 == attacked.sha256:
        return _on_processors(file, attacked.processors)
    if file.rounded:
        lacking = file.export.uncovered if file.export is not None else ()
        why = "holds rounded values, and points that were made for another network overstate it: " + (
            f"certify --artifact cannot attack {', '.join(lacking)}: export it in float32"
            if lacking
            else "certify the file itself with "
            f"s2ap-deploy certify --artifact {file.folder}/{file.path} --run {file.folder}"
        )
        return _file_check(file.path, "inconclusive", why, "not-certified")
    covering = [check for check in file.points_checks if check.certificate_sha256 == certificate.sha256]
    if file.recorded_sha256 is None or not covering or covering[-1].n != certificate.n:
        return _file_check(
            file.path, "inconclusive", "is covered by no certificate and no checked points", "not-covered"
        )
    if not covering[-1].explained:
        different = covering[-1].disagreements - covering[-1].ties
        return _file_check(
            file.path,
            "inconclusive",
            f"answers {different} points differently from the model that was attacked",
            "answers-differ",
        )
    return _file_check(
        file.path,
        "pass",
        f"gives the certificate's answers on all {certificate.n} samples, clean and attacked",
    )


class NamedFiles:
    """The files of a run folder that its evidence names, with the SHA-256 that each source names for them.

    Every file is hashed once, however often it is named.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._expected: dict[str, dict[str, str]] = {}
        self._found: dict[str, str | None] = {}

    def expect(self, name: str, sha256: str, by: str) -> None:
        """Add a file, relative to the folder, that ``by`` names. Raises RunFolderError for one outside."""
        files.within(self._folder, name)
        self._expected.setdefault(name, {})[by] = sha256

    def lists(self, name: str) -> bool:
        """Return whether the file is named."""
        return name in self._expected

    def names(self, sha256: str) -> bool:
        """Return whether some file is expected to have this hash."""
        return any(sha256 in expected.values() for expected in self._expected.values())

    def sha256(self, name: str) -> str | None:
        """Return the hash of the file as it is now, None where it is missing. Raises StorageError."""
        if name not in self._found:
            path = files.within(self._folder, name)
            self._found[name] = files.sha256(path) if path.is_file() else None
        return self._found[name]

    def check(self, name: str) -> Check:
        """Check that a file has the hash that every record of it names."""
        shown, sha256 = plain(name, LONGEST_PATH), self.sha256(name)
        expected = self._expected.get(name, {})
        if sha256 is None:
            return _file_check(shown, "inconclusive", "is missing", "missing")
        wrong = [by for by, wanted in expected.items() if wanted != sha256]
        if wrong:
            message = f"is not the one recorded in {' and '.join(wrong)}: its SHA-256 has changed"
            return _file_check(shown, "fail", message, "changed")
        return _file_check(shown, "pass", f"has the SHA-256 recorded in {' and '.join(expected)}")

    def checks(self) -> list[Check]:
        """Check every file, in order of the names."""
        return [self.check(name) for name in sorted(self._expected)]


def _file_check(path: str, status: Status, message: str, reason: str | None = None) -> Check:
    name = f"file {path}"
    return Check(
        rule="file",
        name=name,
        status=status,
        message=f"{name} {message}",
        path=path,
        reason=reason,
    )


@dataclass(frozen=True)
class FileLimit:
    """A quantity of an exported file with a largest allowed value; ``name`` and ``text`` are for messages."""

    rule: str
    name: str
    text: str
    measured: Callable[[ShippedFile, ExportFacts], float | None]


LIMITS = {
    "max_bytes": FileLimit("size", "size", "{:,.0f} bytes", lambda file, _: file.bytes),
    "max_latency_ms": FileLimit("latency", "latency", "{:g} ms", lambda _, facts: facts.latency_ms),
    "max_latency_ratio": FileLimit(
        "latency", "latency ratio", "{:.3g} of the dense file's time", lambda _, facts: facts.latency_ratio
    ),
}
"""The quantities by the threshold that limits them."""


def limits(threshold: str, limit: float, exported: Sequence[ShippedFile]) -> list[Check]:
    """Check the quantity that ``threshold`` (a key of ``LIMITS``) limits, for each exported file."""
    kind = LIMITS[threshold]
    checks = []
    for file in exported:
        assert file.export is not None
        value = kind.measured(file, file.export)
        if value is None or not 0 <= value < math.inf:  # NaN too
            reason, why = ("missing", "is missing") if file.bytes is None else _UNMEASURED
            checks.append(_about(file, kind.rule, kind.name, limit, why, reason=reason))
            continue
        message = f"{kind.text.format(value)}; allowed {kind.text.format(limit)}"
        status: Status = "pass" if value <= limit else "fail"
        checks.append(_about(file, kind.rule, kind.name, limit, message, status=status, observed=value))
    return checks or [_no_file(kind.rule, kind.name, limit)]


def sparsity_floors(threshold: float, exported: Sequence[ShippedFile]) -> list[Check]:
    """Check the zeros of each exported file; one may be missing, as a budget is a whole number."""
    checks = []
    for file in exported:
        facts = file.export
        assert facts is not None
        if not 0 <= facts.nonzeros <= facts.weights or facts.weights < 1:
            why = "its report counts no weights"
            checks.append(_about(file, "sparsity", "sparsity", threshold, why, reason=_UNMEASURED[0]))
            continue
        zeros = facts.weights - facts.nonzeros
        enough = zeros + 1 > Fraction(str(threshold)) * facts.weights
        share = zeros / facts.weights
        message = f"{zeros:,} zeros of {facts.weights:,} weights = {share:.2%}; required {threshold:.2%}"
        status: Status = "pass" if enough else "fail"
        checks.append(_about(file, "sparsity", "sparsity", threshold, message, status=status, observed=share))
    return checks or [_no_file("sparsity", "sparsity", threshold)]


def _about(
    file: ShippedFile,
    rule: str,
    quantity: str,
    threshold: float,
    message: str,
    *,
    status: Status = "inconclusive",
    reason: str | None = None,
    observed: float | None = None,
) -> Check:
    name = f"{quantity} of {file.path}"
    return Check(
        rule=rule,
        name=name,
        status=status,
        message=f"{name}: {message}",
        path=file.path,
        reason=reason,
        threshold=threshold,
        observed=observed,
        bound=observed,
    )


def _no_file(rule: str, name: str, threshold: float) -> Check:
    return inconclusive(rule, name, "there is no exported file", reason="export-missing", threshold=threshold)


def age_limit(limit: str, age: timedelta | None) -> Check:
    """Check the age of the certificate. Old evidence shows no defect, so it is inconclusive."""
    name, allowed = "age of the certificate", int(limit[:-1]) * _UNITS[limit[-1]]
    if age is None:
        return inconclusive("age", name, "the run folder does not say when it was made", reason="unknown")
    if age < -_CLOCK_SKEW:
        return inconclusive(
            "age", name, "its date is in the future, or this clock is wrong", reason="unknown"
        )
    old = max(age, timedelta(0))
    recent = old <= allowed
    hours = old / timedelta(hours=1)
    return Check(
        rule="age",
        name=name,
        status="pass" if recent else "inconclusive",
        message=f"{name}: {age_text(old)}; allowed {age_text(allowed)}"
        + ("" if recent else ": certify again"),
        reason=None if recent else "too-old",
        threshold=allowed / timedelta(hours=1),
        observed=hours,
        bound=hours,
    )
