import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from s2ap_deploy.data import datasets
from s2ap_deploy.data.splits import Augmentation, MemorySplit, train_steps
from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import derive_seed

REPOSITORY = Path(__file__).resolve().parents[2]

# One epoch of augmented training batches of a data set, as a number.
DIGEST = """
import hashlib
from s2ap_deploy.data import datasets

def digest():
    found = hashlib.sha256()
    train = datasets.load("digits").train
    for images, labels in train.train_batches(100, seed=3, epoch=2, augment=True, device="cpu"):
        found.update(images.numpy().tobytes() + labels.numpy().tobytes())
    return found.hexdigest()
"""


def numbered(n: int, augmentation: Augmentation | None = None) -> MemorySplit:
    """Image k is filled with the value k, its label is k % 3."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 8, 8).contiguous()
    ids = [f"train/{k:05d}" for k in range(n)]
    return MemorySplit(images, torch.arange(n) % 3, ids, augmentation or Augmentation())


def epoch(split: MemorySplit, batch_size: int = 7, *, epoch: int = 0, augment: bool = False) -> list[int]:
    batches = split.train_batches(batch_size, seed=1, epoch=epoch, augment=augment, device="cpu")
    return [round(255 * float(image.max())) for images, _ in batches for image in images]


def test_images_are_float_in_the_unit_interval_with_their_labels() -> None:
    for images, labels in numbered(200).train_batches(32, seed=0, epoch=0, augment=False, device="cpu"):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        values = (images[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(values % 3, labels)
        assert torch.equal(images[:, 0, 0, 0], values / 255)


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    first, second = epoch(numbered(20)), epoch(numbered(20), epoch=1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first == epoch(numbered(20))


@pytest.mark.parametrize(("n", "seen"), [(14, 14), (15, 14), (16, 16)])
def test_a_last_batch_of_one_is_left_out(n, seen) -> None:
    assert len(epoch(numbered(n))) == seen
    batches = list(numbered(n).train_batches(7, seed=0, epoch=0, augment=False, device="cpu"))
    assert len(batches) == train_steps(n, 7)


def test_batches_of_one_are_kept_when_asked_for() -> None:
    assert len(epoch(numbered(5), batch_size=1)) == train_steps(5, 1) == 5


def test_evaluation_takes_all_in_order() -> None:
    images = torch.cat([images for images, _ in numbered(15).batches(7, "cpu")])
    assert (images[:, 0, 0, 0] * 255).round().tolist() == list(range(15))


def test_tensors_is_everything_at_once() -> None:
    images, labels = numbered(15).tensors()
    assert images.shape == (15, 3, 8, 8)
    assert torch.equal(labels, torch.arange(15) % 3)


def test_augmentation_of_a_sample_does_not_depend_on_the_batch_size() -> None:
    noise = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    split = MemorySplit(noise, torch.zeros(12).long(), list(map(str, range(12))), Augmentation(2, True))
    one, other = (
        torch.cat([x for x, _ in split.train_batches(size, seed=5, epoch=1, augment=True, device="cpu")])
        for size in (3, 4)
    )
    plain = torch.cat([x for x, _ in split.train_batches(3, seed=5, epoch=1, augment=False, device="cpu")])
    assert torch.equal(one, other)
    assert not torch.equal(one, plain)


def test_loading_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    epoch(numbered(20, Augmentation(1, True)), augment=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_subset_keeps_images_labels_and_ids_together() -> None:
    part = numbered(20).subset([4, 19, 0])
    assert part.ids == ("train/00004", "train/00019", "train/00000")
    assert part.labels.tolist() == [1, 1, 0]
    assert (part.tensors()[0][:, 0, 0, 0] * 255).round().tolist() == [4, 19, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: numbered(3).batches(0, "cpu"),
        lambda: numbered(3).train_batches(-1, seed=0, epoch=0, augment=False, device="cpu"),
        lambda: train_steps(10, 0),
    ],
)
def test_impossible_batch_size(call) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "batch-size-out-of-range"):
        call()


def test_fingerprint_is_that_of_the_content() -> None:
    split = numbered(20)
    same, changed, relabeled = numbered(20), numbered(20), numbered(20)
    changed.images[3, 0, 0, 0] += 1
    relabeled.labels[3] += 1
    assert len(split.fingerprint()) == 64
    assert split.fingerprint() == same.fingerprint()
    assert split.subset([1, 2]).fingerprint() == same.subset([1, 2]).fingerprint()
    others = (changed, relabeled, split.subset(range(19)), split.subset(range(20)[::-1]))
    assert len({split.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_pixels_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        MemorySplit(torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), ["a", "b"], Augmentation())
    with pytest.raises(ValueError, match="2 labels for 1 ids"):
        MemorySplit(torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).long(), ["a"], Augmentation())


def test_two_processes_see_the_same_epoch() -> None:
    here: dict[str, Any] = {}
    exec(DIGEST, here)
    command = [sys.executable, "-c", f"{DIGEST}\nprint(digest())"]
    there = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert there.stdout.strip() == here["digest"](), there.stderr


def test_order_follows_the_documented_stream() -> None:
    split = datasets.load("digits").validation
    stream = torch.Generator().manual_seed(derive_seed(9, "order", 4))
    order = torch.randperm(len(split), generator=stream)
    batches = split.train_batches(len(split), seed=9, epoch=4, augment=False, device="cpu")
    assert torch.equal(next(batches)[1], split.labels[order])


def test_shares_of_the_ranks_are_the_batches() -> None:
    split = numbered(23)
    whole = list(split.batches(5, "cpu"))
    for of in (2, 4):
        for rank in range(of):
            mine = list(split.batches(5, "cpu", (rank, of)))
            expected = [batch for batch in whole if len(batch[1]) > rank]
            assert len(mine) == len(expected)
            for (images, labels), (all_images, all_labels) in zip(mine, expected, strict=True):
                assert torch.equal(labels, all_labels[rank::of])
                assert torch.equal(images, all_images[rank::of])
