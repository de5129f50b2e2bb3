"""The lock of a run folder: one process at a time, which the kernel releases when it dies."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Self

from s2ap_deploy.errors import RunFolderError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = ".lock"
_HINT = "wait for it to end, or choose another folder with --run"

# (device, inode) of every folder that this process holds, and the process id that entered it: a
# forked child inherits this table but not the locks.
_held: dict[tuple[int, int], int] = {}
_guard = threading.Lock()


class FolderLock:
    """An exclusive POSIX record lock on ``<folder>/.lock``.

    Such a lock is not inherited by forked or spawned workers, so that an orphan cannot keep a folder
    locked. Caution: closing *any* descriptor of the file releases it. Nothing else in the
    process may open ``.lock``, and a second lock on the same folder is refused before opening it.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises RunFolderError when it is held, StorageError when it cannot be made."""
        if fcntl is None:
            raise RunFolderError(
                "run folders need POSIX file locks, which this system lacks",
                code="locks-unsupported",
                hint="use WSL",
            )
        status = folder.stat()
        self._folder = (status.st_dev, status.st_ino)
        self._descriptor: int | None = None
        with _guard:
            if _held.get(self._folder) == os.getpid():
                raise RunFolderError(f"{folder} is already open in this process", code="run-folder-in-use")
            descriptor = _open(folder / FILE_NAME)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            except (BlockingIOError, PermissionError) as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                who = f"process {holder}" if holder.isdigit() else "another process"
                raise RunFolderError(
                    f"{folder} is in use by {who}", code="run-folder-in-use", hint=_HINT
                ) from error
            except OSError as error:
                os.close(descriptor)
                raise StorageError(
                    f"cannot lock {folder}: {error.strerror}", code="folder-not-locked"
                ) from error
            self._descriptor = descriptor
            _held[self._folder] = os.getpid()

    def release(self) -> None:
        """Release the lock; a second call does nothing. The file stays: removing it would race."""
        with _guard:
            # A forked child holds a copy of this object, but the lock is its parent's.
            if self._descriptor is not None and _held.get(self._folder) == os.getpid():
                del _held[self._folder]
                os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _open(path: Path) -> int:
    # O_NOFOLLOW: a folder from elsewhere may hold a link there, and its target would be overwritten.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise RunFolderError(
                f"{path} is a link; a run folder's lock is a plain file", code="path-is-link"
            ) from error
        raise StorageError(f"cannot create {path}: {error.strerror}", code="file-not-created") from error
