"""A batch in parts: every row once, weights that add up, noise and gradients as of the whole batch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_deploy.data.splits import Augmentation, MemorySplit
from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.batching import (
    Accumulator,
    MicroBatch,
    RankBatch,
    mean_loss,
    rand,
    randn,
    rank_batches,
)
from s2ap_deploy.training.pgd import pgd_accuracy, random_start

CPU = torch.device("cpu")
OnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]


def numbered(n: int, padding: int = 0) -> MemorySplit:
    images = torch.arange(n * 16, dtype=torch.int64).remainder(256).to(torch.uint8).view(n, 1, 4, 4)
    return MemorySplit(
        images, torch.arange(n), [str(i) for i in range(n)], Augmentation(padding, padding > 0)
    )


def own(rank: int, size: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


def all_parts(n: int, size: int, accumulate: int) -> list[MicroBatch]:
    images, labels = torch.zeros(n, 1, 2, 2), torch.arange(n)
    found = []
    for rank in range(size):
        rows = slice(rank, None, size) if rank < n else slice(0, 1)
        found += RankBatch(images[rows], labels[rows], n, rank, size, accumulate).micro_batches()
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(1, 7), st.integers(1, 9))
def test_parts_hold_every_row_once_and_weigh_one_together(n, size, accumulate) -> None:
    parts = all_parts(n, size, accumulate)
    rows = [int(label) for part in parts if not part.is_padding for label in part.labels]
    assert sorted(rows) == list(range(n))
    for part in parts:
        if not part.is_padding:
            assert part.labels.tolist() == list(range(part.index, n, part.of))
        assert len(part.labels) >= 1
        assert len(part.labels) >= 2 or n < 2 * size or part.of > n // 2
    assert sum(part.weight for part in parts) == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 20), st.integers(2, 5), st.sampled_from(["Linf", "L2"]))
def test_noise_of_a_sample_is_the_same_in_any_part(n, of, norm) -> None:
    threat = ThreatModel(norm=norm, eps="0.25")
    images = torch.full((n, 1, 3, 3), 0.5)
    whole = random_start(images, threat, generator(7))
    normal = randn(images.shape, generator(7), images.device)
    for index in range(min(of, n)):
        part = MicroBatch(images[index::of], torch.zeros(len(images[index::of])), n, index, of)
        assert torch.equal(random_start(part.images, threat, part.stream(generator(7))), whole[index::of])
        drawn = randn(part.images.shape, part.stream(generator(7)), images.device)
        assert torch.equal(drawn, normal[index::of])


def test_a_part_without_rows_still_draws_its_stand_in() -> None:
    part = MicroBatch(torch.zeros(1, 1, 2, 2), torch.zeros(1), 2, 3, 4)
    assert part.is_padding
    assert part.weight == 0
    assert rand(part.images.shape, part.stream(generator(1)), torch.device("cpu")).shape == (1, 1, 2, 2)


def test_a_lone_part_gets_the_very_stream_and_loss() -> None:
    (part,) = RankBatch(torch.zeros(4, 1, 2, 2), torch.zeros(4)).micro_batches()
    stream, loss = generator(3), torch.tensor(0.1)
    assert part.stream(stream) is stream
    assert part.scaled(loss) is loss


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 30), st.integers(1, 4), st.integers(2, 12))
def test_ranks_see_their_rows_of_the_batches_of_one_process(n, size, batch_size) -> None:
    split = numbered(n, padding=1)
    if min(batch_size, n) < size:
        with pytest.raises(UsageError, check=lambda error: error.code == "batch-smaller-than-ranks"):
            next(
                rank_batches(
                    split, batch_size, ranks=own(0, size), seed=1, epoch=2, device=torch.device("cpu")
                )
            )
        return
    whole = list(split.train_batches(batch_size, seed=1, epoch=2, augment=True, device="cpu"))
    for rank in range(size):
        mine = list(
            rank_batches(
                split, batch_size, ranks=own(rank, size), seed=1, epoch=2, device=torch.device("cpu")
            )
        )
        assert len(mine) == len(whole)
        for batch, (all_images, all_labels) in zip(mine, whole, strict=True):
            assert batch.n == len(all_labels)
            rows = slice(rank, None, size) if rank < batch.n else slice(0, 1)
            assert torch.equal(batch.images, all_images[rows])
            assert torch.equal(batch.labels, all_labels[rows])


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 24), st.integers(1, 6))
def test_accumulated_gradients_are_those_of_the_whole_batch(n, accumulate) -> None:
    torch.manual_seed(n)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    images, labels = torch.randn(n, 1, 2, 2).double(), torch.randint(0, 3, (n,))

    def gradients(parts: list[MicroBatch]) -> Accumulator:
        total = Accumulator(Ranks())
        for part in parts:
            loss = part.scaled(nn.functional.cross_entropy(model(part.images), part.labels))
            found = torch.autograd.grad(loss, list(model.parameters()))
            total.add(loss, {str(i): g for i, g in enumerate(found)})
        return total

    whole = gradients(RankBatch(images, labels).micro_batches())
    pieces = gradients(RankBatch(images, labels, accumulate=accumulate).micro_batches())
    torch.testing.assert_close(pieces.loss, whole.loss)
    for name, expected in whole.summed().items():
        torch.testing.assert_close(pieces.gradients[name], expected)


def test_the_mean_loss_is_that_of_all_ranks(on_ranks) -> None:
    found = on_ranks(2, lambda ranks: mean_loss([torch.tensor(1.0 + ranks.rank), torch.tensor(3.0)], ranks))
    assert found == [4.5, 4.5]


@pytest.mark.parametrize("size", [2, 3])
def test_accuracy_by_shards_is_accuracy(on_ranks, stripes, size) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    options: dict[str, Any] = {"threat": ThreatModel(eps="0.1"), "steps": 3, "seed": 5, "batch_size": 20}

    def measure(ranks: Ranks) -> Any:
        # ``attacked`` changes modes and gradients of the network: each thread needs its own.
        network, device = copy.deepcopy(model), torch.device("cpu")
        return pgd_accuracy(network, stripes(61), device=device, ranks=ranks, **options)

    alone = measure(Ranks())
    assert alone.n == 61
    assert 0 < alone.robust <= alone.clean
    assert on_ranks(size, measure) == [alone] * size
