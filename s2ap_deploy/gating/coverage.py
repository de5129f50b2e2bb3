"""Whether a certificate speaks for a file that is to be shipped. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from s2ap_deploy import files
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.gating.check import Check
from s2ap_deploy.spec import Record


class Rejudged(Record):
    """An exported file's own answers on the points of one certificate.

    ``disagreements`` counts answers (clean and attacked) that differ from the certificate's, ``ties``
    how many of these are rounding on points where two classes are equally likely.
    """

    certificate_sha256: str
    n: int
    clean_correct: int
    survived: int
    disagreements: int
    ties: int = 0


class ArtifactFact(Record):
    """A file that is to be shipped: its hash now (None: missing) and when it was recorded (None: never).

    A ``quantized`` one is another network than the one it was made from.
    """

    path: str
    sha256: str | None
    recorded_sha256: str | None
    rejudged: tuple[Rejudged, ...] = ()
    quantized: bool = False

    @classmethod
    def read(cls, path: Path, recorded_sha256: str | None, rejudged: Sequence[Rejudged] = ()) -> ArtifactFact:
        """Hash the file at ``path`` as it is now. Raises StorageError when it is there but unreadable."""
        return cls(
            path=str(path),
            sha256=files.sha256(path) if path.is_file() else None,
            recorded_sha256=recorded_sha256,
            rejudged=tuple(rejudged),
        )


def coverage(fact: ArtifactFact, certificate: Certificate, *others: Certificate) -> Check:
    """Whether the certificate, or one of the others, speaks for the file as it lies there now."""
    checks = [_coverage(fact, each) for each in (certificate, *others)]
    return next((check for check in checks if check.status == "pass"), checks[0])


def _coverage(fact: ArtifactFact, certificate: Certificate) -> Check:
    name = f"file {fact.path}"
    if fact.sha256 is None:
        return Check(name=name, status="inconclusive", words=f"{name} is missing")
    if fact.recorded_sha256 is not None and fact.sha256 != fact.recorded_sha256:
        words = f"{name} is not the one that was checked: its SHA-256 has changed"
        return Check(name=name, status="fail", words=words)
    if fact.sha256 == certificate.subject.checkpoint_sha256:
        return Check(name=name, status="pass", words=f"{name} is the attacked checkpoint")
    attacked = certificate.subject.artifact
    if attacked is not None and fact.sha256 == attacked.sha256:
        return Check(name=name, status="pass", words=f"{name} is the attacked file")
    if fact.quantized:
        words = (
            f"{name} holds rounded values, and points that were made for another network overstate it: "
            f"certify the file itself with s2ap-deploy certify --artifact RUN/{fact.path} --run RUN"
        )
        return Check(name=name, status="inconclusive", words=words)
    covering = [answer for answer in fact.rejudged if answer.certificate_sha256 == certificate.sha256]
    if fact.recorded_sha256 is None or not covering or covering[-1].n != certificate.n:
        words = f"{name}: no certificate and no re-judged points cover it"
        return Check(name=name, status="inconclusive", words=words)
    different = covering[-1].disagreements - covering[-1].ties
    if different > 0:
        words = f"{name} answers {different} points differently from the model that was attacked"
        return Check(name=name, status="inconclusive", words=words)
    words = f"{name} gives the certificate's answers on all {certificate.n} samples, clean and attacked"
    return Check(name=name, status="pass", words=words)
