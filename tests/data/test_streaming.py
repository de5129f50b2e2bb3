import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from s2ap_deploy.data import datasets
from s2ap_deploy.data.splits import MemorySplit
from s2ap_deploy.data.streaming import StreamedSplit
from s2ap_deploy.errors import DataError

MakeFolder = Callable[..., Path]
REPOSITORY = Path(__file__).resolve().parents[2]

# Holds a lock and two decoding workers, prints the workers' ids, then waits to be killed.
HOLDER = """
import fcntl, multiprocessing, sys, time
from s2ap_deploy.data import datasets
if __name__ == "__main__":
    lock = open(sys.argv[2], "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    data = datasets.load(f"imagefolder:{sys.argv[1]}", memory_limit_bytes=0, workers=2)
    batches = data.train.train_batches(4, seed=0, epoch=0, augment=True, device="cpu")
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def both(folder: Path, workers: int = 0) -> tuple[datasets.ImageData, datasets.ImageData]:
    name = f"imagefolder:{folder}"
    return datasets.load(name), datasets.load(name, memory_limit_bytes=0, workers=workers)


def same(first: object, second: object) -> bool:
    pairs = list(zip(first, second, strict=True))  # type: ignore[call-overload]
    return bool(pairs) and all(torch.equal(x, p) and torch.equal(y, q) for (x, y), (p, q) in pairs)


def test_the_memory_limit_decides_and_changes_no_pixel(make_folder) -> None:
    folder = make_folder(per_class=12, shape=(16, 16, 3))
    held, streamed = both(folder)
    assert isinstance(held.train, MemorySplit)
    assert isinstance(streamed.train, StreamedSplit)
    bytes_in_all = 2 * 2 * 12 * 3 * 16 * 16
    at_limit = datasets.load(f"imagefolder:{folder}", memory_limit_bytes=bytes_in_all)
    assert isinstance(at_limit.train, MemorySplit)

    assert streamed.spec == held.spec
    assert streamed.validation.ids == held.validation.ids
    assert same(streamed.test.batches(5, "cpu"), held.test.batches(5, "cpu"))
    for epoch in (0, 1):
        ours, theirs = (
            data.train.train_batches(5, seed=2, epoch=epoch, augment=True, device="cpu")
            for data in (streamed, held)
        )
        assert same(ours, theirs)


def test_subsets_stream_too(make_folder) -> None:
    held, streamed = both(make_folder())
    part, expected = streamed.test.subset([7, 0, 3]), held.test.subset([7, 0, 3])
    assert part.ids == expected.ids
    assert same([part.tensors()], [expected.tensors()])


def test_a_changed_or_missing_file_changes_the_fingerprint(make_folder) -> None:
    folder = make_folder()
    path = folder / "test" / "cat" / "03.png"
    _, before = both(folder)
    first = before.test.fingerprint()
    assert both(folder)[1].test.fingerprint() == first
    os.utime(path, (1, 1))
    assert before.test.fingerprint() != first
    path.unlink()
    with pytest.raises(DataError, match=r"03\.png", check=lambda error: error.code == "image-unreadable"):
        before.test.fingerprint()


def test_workers_give_the_same_batches_and_readable_errors(make_folder) -> None:
    folder = make_folder(per_class=12)
    held, streamed = both(folder, workers=2)
    before = torch.get_rng_state()
    ours, theirs = (
        data.train.train_batches(4, seed=2, epoch=0, augment=True, device="cpu") for data in (streamed, held)
    )
    assert same(ours, theirs)
    assert torch.equal(torch.get_rng_state(), before)

    (folder / "test" / "dog" / "05.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, check=lambda error: error.code == "image-unreadable") as caught:
        streamed.test.tensors()
    assert caught.value.hint == "repair or remove the file"
    assert "test/dog/05.png" in caught.value.message


def test_a_dead_worker_is_explained(make_folder) -> None:
    import multiprocessing

    _, streamed = both(make_folder(per_class=30), workers=1)
    batches = streamed.train.batches(1, "cpu")
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, check=lambda error: error.code == "image-worker-lost") as caught:
        list(batches)
    assert "memory" in (caught.value.hint or "")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_die_with_their_parent_and_hold_no_lock(make_folder, tmp_path) -> None:
    import fcntl

    script, lock = tmp_path / "holder.py", tmp_path / "lock"
    script.write_text(HOLDER)
    holder = subprocess.Popen(
        [sys.executable, str(script), str(make_folder(per_class=30)), str(lock)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    workers = [int(word) for word in holder.stdout.readline().split()]
    assert len(workers) == 2
    holder.send_signal(signal.SIGKILL)
    holder.wait()

    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    end = time.monotonic() + 60
    while alive := [pid for pid in workers if _running(pid)]:
        assert time.monotonic() < end, f"still running: {alive}"
        time.sleep(0.05)


def _running(pid: int) -> bool:
    """Alive; a zombie that nobody has waited for yet does not count."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
