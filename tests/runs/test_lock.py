"""One process at a time holds a folder, and a dead one holds nothing."""

import os
import signal
import subprocess
import sys

import pytest

from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.runs.folder import FolderLock

HOLD = (
    "import sys, time; from pathlib import Path; from s2ap_deploy.runs.folder import FolderLock\n"
    "held = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


def test_another_process_is_refused_with_the_holder_named_and_let_in_after_its_death(tmp_path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            with pytest.raises(
                RunFolderError, check=lambda error: error.code == "run-folder-in-use"
            ) as caught:
                FolderLock(tmp_path)
            assert caught.value.hint is not None
        finally:
            holder.send_signal(signal.SIGKILL)
    FolderLock(tmp_path).release()


def test_the_same_process_is_refused_and_keeps_its_lock(tmp_path) -> None:
    """A second descriptor in this process would drop the lock when it is closed."""
    with FolderLock(tmp_path):
        (tmp_path.parent / "alias").symlink_to(tmp_path)
        for path in (tmp_path, tmp_path.parent / "alias"):
            with pytest.raises(RunFolderError, check=lambda error: error.code == "run-folder-in-use"):
                FolderLock(path)
        done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, timeout=60)
        assert b"is in use by process" in done.stderr
    FolderLock(tmp_path).release()


def test_a_forked_child_neither_holds_nor_releases_it(tmp_path) -> None:
    held = FolderLock(tmp_path)
    answer, tell = os.pipe()
    wait, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        held.release()
        try:
            FolderLock(tmp_path)
            os.write(tell, b"taken")
        except RunFolderError:
            os.write(tell, b"refused")
        os.read(wait, 1)  # outlives the parent's lock: ends when the parent closes the pipe
        os._exit(0)
    try:
        assert os.read(answer, 7) == b"refused"
        held.release()
        FolderLock(tmp_path).release()  # the orphan does not keep the folder locked
    finally:
        os.close(end)
        os.waitpid(child, 0)
        for descriptor in (answer, tell, wait):
            os.close(descriptor)


def test_release_twice_does_not_release_the_next_holder(tmp_path) -> None:
    first = FolderLock(tmp_path)
    first.release()
    with FolderLock(tmp_path):
        first.release()
        with pytest.raises(RunFolderError):
            FolderLock(tmp_path)


def test_a_link_in_its_place_is_refused_and_its_target_untouched(tmp_path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "path-is-link"):
        FolderLock(tmp_path / "run")
    assert precious.read_text() == "keep"


def test_a_lock_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, check=lambda error: error.code == "file-not-created"):
        FolderLock(tmp_path)
