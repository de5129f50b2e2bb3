"""A certificate as an in-toto Statement, ready to be signed.

The layout is that of the in-toto Attestation Framework (github.com/in-toto/attestation, file
spec/v1/statement.md): ``predicate`` holds what is attested, ``subject`` the digests of the files it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:x-s2ap-deploy:attack-certificate:v1"
_LEFT_OUT = {"samples", "points", "seconds"}


def statement(
    certificate: Certificate,
    *,
    subjects: Sequence[tuple[str, str]],
    verification: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the unsigned Statement as JSON values.

    ``subjects`` are names and SHA-256 hashes of files that the certificate covers. The predicate holds
    the certificate without its samples, the hash of its file, which binds them, and ``verification`` (JSON
    values): the result of ``s2ap-deploy verify``. Raises UsageError for no subjects.
    """
    if not subjects:
        raise UsageError(
            "the certificate names no file that a statement could cover",
            code="certificate-without-file",
            hint="certify again",
        )
    predicate: dict[str, Any] = {
        "certificate": {"sha256": certificate.sha256},
        "formalGuarantee": False,
        "result": certificate.model_dump(mode="json", exclude=_LEFT_OUT, exclude_none=True),
    }
    if verification is not None:
        predicate["verification"] = dict(verification)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
