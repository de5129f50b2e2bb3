"""What an attack found, brought into another run folder: the same network need not be attacked twice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from s2ap_deploy import files
from s2ap_deploy.errors import StorageError

_JOURNAL = ".jsonl"


def bring(record: Path, into: Path) -> None:
    """Make the record of an attack known in ``into``, unless one is there; nothing where there is none.

    Points are linked and journals copied, since those grow in place, and a journal only after the points that
    it names: a kill on the way leaves a folder without journals, which counts as none. Whether the record is
    of the attack that goes on from it is for the cascade to say, which holds every hash against it. Raises
    StorageError.
    """
    wanted = sorted(path for path in record.rglob("*") if path.is_file() and not path.is_symlink())
    for path in sorted(wanted, key=lambda each: (each.suffix == _JOURNAL, each)):
        target = into / path.relative_to(record)
        if target.exists():
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {target.parent}: {error.strerror or error}") from error
        if path.suffix == _JOURNAL:
            files.write_bytes(target, files.read_bytes(path))
        else:
            link(path, target)


def link(source: Path, target: Path) -> None:
    """``target`` as a second name of ``source``, or as a copy where the disk has no such names.

    Only for files that are replaced and never changed in place, as all writes through ``files`` are. Raises
    StorageError.
    """
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        with files.atomic(target) as temporary:
            shutil.copyfile(source, temporary)
