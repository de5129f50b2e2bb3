"""Sign a run folder, and check its signature, with OpenSSF's model-signing library and a key pair.

A hash shows that files agree with each other; a signature shows that the holder of a key vouched for them.
The library is the extra ``signing``, and nothing is fetched: keys are files.
"""

from __future__ import annotations

import base64
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.formatting import plain
from s2ap_deploy.gating.check import Check, Status
from s2ap_deploy.runs import folder as run_folder

SIGNATURE = "signature.json"
"""The signature of a run folder: a Sigstore bundle that lists the SHA-256 of every file."""
REQUIREMENTS = '"model-signing>=1.1,<2" "pyOpenSSL>=24,<28"'
"""The extra ``signing``; model-signing 1.1.1 imports pyOpenSSL without asking for it."""
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_KEYS = (
    {"mediaType", "verificationMaterial", "dsseEnvelope"},
    {"payload", "payloadType", "signatures"},
    {"publicKey", "tlogEntries"},
    {"sig"},
)
_IGNORED = (run_folder.FILE_NAME, SIGNATURE)


def sign(folder: Path, private_key: Path, password: str | None = None) -> Path:
    """Sign every file of the run folder and return the signature's path.

    Args:
        folder: the run folder, which nothing else may be writing.
        private_key: an elliptic-curve key in PEM.
        password: of the key, if it has one.

    Raises:
        UsageError: the library is missing, the key cannot be used, or the folder holds a link.
        StorageError: the signature cannot be written.
    """
    signing = _library().signing
    files.check_regular(private_key)
    target = folder / SIGNATURE
    with _explained("signing-failed", f"{folder} cannot be signed with {private_key}"):
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=password)
        config.set_hashing_config(_hashing(folder))
        with tempfile.TemporaryDirectory() as outside:  # a new file in the folder would be signed too
            config.sign(folder, Path(outside) / SIGNATURE)
            content = files.read_bytes(Path(outside) / SIGNATURE)
    files.write_bytes(target, content)
    return target


def check(folder: Path, public_key: Path) -> Check:
    """Check that the holder of the key signed every file of the folder as it is now.

    A missing signature is inconclusive, any other one, and any file changed, added or removed since, fails.
    Raises UsageError where the library is missing or ``public_key`` cannot be used.
    """
    verifying = _library().verifying
    files.check_regular(public_key)
    with _explained("public-key-invalid", f"{public_key} is not a public key that can be used"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    path = folder / SIGNATURE
    if not path.is_file():
        return _answer("inconclusive", f"there is none in the run folder ({SIGNATURE})", "missing")
    config.set_hashing_config(_hashing(folder))
    try:
        signed = _ignored(path)
        config.verify(folder, path)
    except Exception as error:  # of the library, for whatever a stranger's file holds
        return _answer("fail", f"does not hold: {plain(str(error) or repr(error), 300)}")
    if not signed <= set(_IGNORED):
        return _answer("fail", f"leaves out {plain(', '.join(sorted(signed - set(_IGNORED))), 300)}")
    return _answer("pass", f"every file of the run folder is as the holder of {public_key.name} signed it")


def _answer(status: Status, message: str, reason: str | None = None) -> Check:
    reason = "signature" if status == "fail" else reason
    return Check(
        rule="signature",
        name="signature",
        status=status,
        message=f"signature: {message}",
        path=SIGNATURE,
        reason=reason,
    )


def _library() -> Any:
    try:
        import model_signing
        from model_signing import signing, verifying  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(
            "signatures need the libraries model-signing and pyOpenSSL, which are not installed",
            code="signing-not-installed",
            hint=f"pip install {REQUIREMENTS}: the extra signing of s2ap-deploy",
        ) from None
    return model_signing


def _hashing(folder: Path) -> Any:
    from model_signing import hashing

    ignored = [path for name in _IGNORED if (path := folder / name).exists()]
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _ignored(path: Path) -> set[str]:
    """Return the names that a signature leaves out, as its signed statement says.

    Raises ValueError for a bundle that holds more or less than :func:`sign` writes: the rest is not signed.
    """
    bundle = files.parse_json(files.read_bytes(path, limit=files.LARGEST_JSON))
    material, (signature,) = bundle["verificationMaterial"], bundle["dsseEnvelope"]["signatures"]
    keys = (set(bundle), set(bundle["dsseEnvelope"]), set(material), set(signature) - {"keyid"})
    unsigned = (bundle["mediaType"], material["tlogEntries"], signature.get("keyid", ""))
    if keys != _KEYS or unsigned != (_MEDIA_TYPE, [], "") or not material["publicKey"]["hint"]:
        raise ValueError("it is not a bundle with one signature and the name of its key")
    statement = files.parse_json(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return set(map(str, statement["predicate"]["serialization"].get("ignore_paths", [])))


@contextlib.contextmanager
def _explained(code: str, message: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the libraries, for whatever a key file holds
        raise UsageError(
            f"{message}: {plain(str(error) or repr(error), 300)}",
            code=code,
            hint="see docs/gates.md for keys",
        ) from error
