"""Atomic file writes, canonical JSON, and paths and JSON from untrusted files. Every write goes through here.

A write goes to a temporary file in the same folder, is forced to the disk, and only then takes its
name (``os.replace`` is atomic within one file system). A kill therefore leaves the old file or the
new one, and at most a ``.tmp-*`` file that :func:`remove_leftovers` clears.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from s2ap_deploy.errors import RunFolderError, StorageError

TEMPORARY = ".tmp-"
LARGEST_JSON = 2**27  # ten times a certificate of 50,000 images
LARGEST_FILE = 2**32  # bytes, of any file that is read or hashed
_MOST_BITS = 128
_CODES = {"read": "file-not-read", "write": "file-not-written", "remove": "file-not-removed"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; it becomes ``path`` if the block ends without an error.

    The temporary file keeps the suffix of ``path``, because some writers choose a format by it.
    Raises StorageError when the disk refuses (also for an OSError raised inside the block).
    """
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}"
    try:
        # Created here rather than by the writer: O_EXCL follows no planted link, and 0o666 leaves
        # the permissions to the user's umask, which tempfile's 0o600 would not.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _storage_error("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what is there. Raises StorageError."""
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        stream.write(data)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 with its line ends unchanged. Raises StorageError."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write :func:`canonical_json` of ``value``. Raises StorageError, and ValueError for NaN or infinity."""
    write_text(path, canonical_json(value))


def canonical_json(value: Any) -> str:
    """Return JSON in which equal values have equal bytes: sorted keys, two spaces, a final newline.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: bytes | str) -> Any:
    """Parse JSON from an untrusted file, as far as :func:`canonical_json` could write it again.

    Raises ValueError for what is not JSON or longer than ``LARGEST_JSON``, for numbers that are not finite or
    of more than 128 bits, for text that cannot be encoded (half a surrogate pair), for a key that occurs
    twice in an object, and for content that is nested too deeply.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON >> 20} MiB")
    try:
        content = json.loads(
            text,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_bounded,
            object_pairs_hook=_unique,
        )
        # Rare enough that looking for the escape first saves nearly every file the second pass.
        if _SURROGATE.search(text if isinstance(text, bytes) else text.encode(errors="surrogatepass")):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string in it has an unpaired surrogate") from None
    return content


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):  # readers differ in which of the two counts
        raise ValueError("a key occurs twice in an object")
    return content


def _bounded(number: str) -> int:
    value = int(number)
    if value.bit_length() > _MOST_BITS:
        raise ValueError(f"a number of {value.bit_length()} bits")
    return value


@contextlib.contextmanager
def open_regular(path: Path | str) -> Iterator[BufferedReader]:
    """Yield the file at ``path`` for reading; every file from outside is opened here.

    A pipe, a socket or a device is refused before a byte is read: it could keep the reader waiting, or never
    end. So is a file of more than ``LARGEST_FILE`` bytes. Raises StorageError.
    """
    path = Path(path)
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise _special(path)
            if status.st_size > LARGEST_FILE:
                raise StorageError(
                    f"{path} has {status.st_size:,} bytes, more than the {LARGEST_FILE:,} that are read",
                    code="file-too-large",
                    hint="name a smaller file",
                )
            with open(descriptor, "rb", closefd=False) as stream:
                yield stream
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket
            raise _special(path) from error
        raise _storage_error("read", path, error) from error


def _special(path: Path) -> StorageError:
    return StorageError(
        f"{path} is a pipe, a socket or a device, not a file", code="file-special", hint="name a plain file"
    )


def check_regular(path: Path | str) -> None:
    """Raise StorageError, as :func:`open_regular` does, for what a library shall not open."""
    with open_regular(path):
        pass


def read_bytes(path: Path | str, *, limit: int | None = None) -> bytes:
    """Read ``path``, at most ``limit`` + 1 bytes of it. Raises StorageError."""
    with open_regular(path) as stream:
        return stream.read() if limit is None else stream.read(limit + 1)


def sha256(path: Path | str) -> str:
    """Hash the file's bytes with SHA-256, in hexadecimal. Raises StorageError."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def within(folder: Path | str, name: str) -> Path:
    """Return ``folder / name`` for a name that was read from a file and is therefore not trusted.

    Raises RunFolderError for an absolute name, for ``..``, and for a link that leads out of ``folder``.
    """
    folder = Path(folder)
    relative = PurePosixPath(name)
    if "\0" in name or "\\" in name or relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise RunFolderError(f"{name!r} is not a path inside {folder}", code="path-outside")
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise RunFolderError(f"{path} cannot be followed: {error}", code="path-outside") from error
    if not inside:
        raise RunFolderError(f"{path} leads out of {folder}", code="path-outside")
    return path


def link(source: Path, target: Path) -> None:
    """Make ``target`` a second name of ``source``, or a copy where the file system has no hard links.

    Only for files that are replaced and never changed in place, as all writes of this module are. Raises
    StorageError.
    """
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)


def remove(path: Path | str) -> None:
    """Remove a file, if it is there. Raises StorageError."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise _storage_error("remove", Path(path), error) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writers left directly inside ``folder``.

    Only for a folder whose lock is held: a living writer's temporary file looks the same.
    """
    for leftover in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            os.unlink(leftover)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Force the new name itself to the disk; a file's own fsync does not promise it."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(verb: str, path: Path, error: OSError) -> StorageError:
    if error.errno == errno.ENOSPC:
        return StorageError(
            f"no space left on the disk to {verb} {path}",
            code="disk-full",
            hint="free some space and try again",
        )
    return StorageError(f"cannot {verb} {path}: {error.strerror or error}", code=_CODES[verb])
