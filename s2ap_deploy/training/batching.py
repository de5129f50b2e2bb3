"""Batches split over ranks and micro-batches, and the sums that put their results together.

Micro-batch p of P takes the rows p, p + P, p + 2P, ... of the batch. Its loss is its mean times its share of
the rows, so that gradients *summed* over micro-batches are those of the batch mean, also where a last batch
does not divide evenly. Random numbers are drawn for the whole batch and cut to the micro-batch: the noise of
a sample does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ap_deploy.data.splits import Split
from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.errors import UsageError


class RowStream(torch.Generator):
    """Draw for a batch of ``n`` rows, of which micro-batch ``index`` of ``of`` keeps its own."""

    n: int
    index: int
    of: int


def row_stream(whole: torch.Generator, *, n: int, index: int, of: int) -> torch.Generator:
    """Cut the batch's stream, from its beginning, to a micro-batch; ``whole`` itself if ``of`` is 1."""
    if of == 1:
        return whole
    stream = RowStream(device=whole.device)
    stream.manual_seed(whole.initial_seed())
    stream.n, stream.index, stream.of = n, index, of
    return stream


def rand(shape: torch.Size | tuple[int, ...], stream: torch.Generator, device: torch.device) -> Tensor:
    """Draw uniform numbers in [0, 1) for the rows of this micro-batch."""
    return _own_rows(torch.rand(_whole(shape, stream), generator=stream, device=device), stream)


def randn(shape: torch.Size | tuple[int, ...], stream: torch.Generator, device: torch.device) -> Tensor:
    """Draw normal numbers for the rows of this micro-batch."""
    return _own_rows(torch.randn(_whole(shape, stream), generator=stream, device=device), stream)


def _whole(shape: torch.Size | tuple[int, ...], stream: torch.Generator) -> tuple[int, ...]:
    return (stream.n, *shape[1:]) if isinstance(stream, RowStream) else tuple(shape)


def _own_rows(drawn: Tensor, stream: torch.Generator) -> Tensor:
    if not isinstance(stream, RowStream):
        return drawn
    rows = drawn[stream.index :: stream.of]
    return rows if len(rows) else drawn[:1]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The rows ``index::of`` of a batch of ``n``: images [b, C, H, W] and labels [b].

    Where fewer samples than ranks are left, a micro-batch without rows holds the batch's first sample as
    padding and weighs nothing: every rank has to take part in the collectives.
    """

    images: Tensor
    labels: Tensor
    n: int
    index: int = 0
    of: int = 1

    @property
    def is_padding(self) -> bool:
        return self.index >= self.n

    @property
    def weight(self) -> float:
        """The fraction of the batch's rows in this micro-batch."""
        return 0.0 if self.is_padding else len(self.labels) / self.n

    def scaled(self, mean: Tensor) -> Tensor:
        """Turn a mean over the micro-batch into its contribution to the mean over the batch."""
        return mean if self.of == 1 else mean * self.weight

    def stream(self, whole: torch.Generator) -> torch.Generator:
        """Cut the batch's stream, which has not been drawn from, to the micro-batch."""
        return row_stream(whole, n=self.n, index=self.index, of=self.of)


@dataclass(frozen=True, eq=False)
class RankBatch:
    """The rows ``rank::size`` of a batch of ``n`` (None: the whole batch): images [b, C, H, W], labels [b].

    A rank works through them in at most ``accumulate`` micro-batches.
    """

    images: Tensor
    labels: Tensor
    n: int | None = None
    rank: int = 0
    size: int = 1
    accumulate: int = 1

    def micro_batches(self) -> list[MicroBatch]:
        """Split the rows into micro-batches of two samples or more, where there are as many."""
        n = len(self.labels) if self.n is None else self.n
        count = max(1, min(self.accumulate, n // (2 * self.size)))
        of = count * self.size
        return [
            MicroBatch(self.images[j::count], self.labels[j::count], n, j * self.size + self.rank, of)
            for j in range(count)
        ]


def rank_batches(
    split: Split,
    batch_size: int,
    *,
    ranks: Ranks,
    seed: int,
    epoch: int,
    device: torch.device,
    accumulate: int = 1,
) -> Iterator[RankBatch]:
    """Yield one epoch of augmented training batches, of each only this rank's rows.

    ``batch_size`` is that of all ranks together. Raises UsageError where a batch has fewer rows than
    there are ranks.
    """
    if min(batch_size, len(split)) < ranks.size:
        raise UsageError(
            f"a batch of {min(batch_size, len(split))} images cannot be split over {ranks.size} ranks",
            code="batch-smaller-than-ranks",
            hint="raise the batch size or use fewer ranks",
        )
    batches = split.train_batches(
        batch_size, seed=seed, epoch=epoch, augment=True, device=device, share=(ranks.rank, ranks.size)
    )
    for step, (images, labels) in enumerate(batches):
        n = min(batch_size, len(split) - step * batch_size)
        ranks.present = ranks.rank < n
        yield RankBatch(images, labels, n, ranks.rank, ranks.size, accumulate)


class Accumulator:
    """Sum losses and gradients of one step over its micro-batches, then over ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.loss = torch.zeros(())
        self.count = 0
        self.gradients: dict[str, Tensor] = {}

    def add(self, loss: Tensor, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Add one micro-batch's contribution to the batch mean, and its gradients."""
        # The first loss as it is: a sum with 0 would be one more operation on the device.
        self.loss = loss.detach() if self.count == 0 else self.loss + loss.detach()
        self.count += 1
        for name, gradient in (gradients or {}).items():
            # Not 0 + g: a single gradient stays as it is, to the bit.
            found = self.gradients.get(name)
            self.gradients[name] = gradient if found is None else found + gradient

    def summed(self) -> dict[str, Tensor]:
        """Return the gradients of the mean over the whole batch, on every rank."""
        self.ranks.sum_([*self.gradients.values()])
        return self.gradients


def mean_loss(losses: list[Tensor], ranks: Ranks) -> float:
    """Average the batch losses, to which every rank has contributed, over steps; the same on all ranks."""
    steps = torch.stack(losses)
    ranks.sum_([steps])
    return float(steps.mean())
