"""How a batch is shared: over ranks, and on each rank over micro-batches that fit its memory.

Part p of P takes the rows p, p + P, p + 2P, ... of the batch. Every part's loss is its mean times its
share of the rows, so that gradients *summed* over parts are those of the batch's mean, also where a last
batch does not divide evenly. Random numbers are drawn for the whole batch and cut to the part's rows:
the noise of a sample does not depend on how many share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ap_deploy.data.splits import Split
from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.errors import UsageError


class PartStream(torch.Generator):
    """A generator that draws for a batch of ``n`` rows, of which part ``index`` of ``of`` keeps its own."""

    n: int
    index: int
    of: int


def part_stream(whole: torch.Generator, *, n: int, index: int, of: int) -> torch.Generator:
    """The stream of a batch of ``n``, from its beginning, for one part; itself where there is but one."""
    if of == 1:
        return whole
    stream = PartStream(device=whole.device)
    stream.manual_seed(whole.initial_seed())
    stream.n, stream.index, stream.of = n, index, of
    return stream


def rand(shape: torch.Size | tuple[int, ...], stream: torch.Generator, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) for the rows at hand."""
    return _own_rows(torch.rand(_whole(shape, stream), generator=stream, device=device), stream)


def randn(shape: torch.Size | tuple[int, ...], stream: torch.Generator, device: torch.device) -> Tensor:
    """Normal numbers for the rows at hand."""
    return _own_rows(torch.randn(_whole(shape, stream), generator=stream, device=device), stream)


def _whole(shape: torch.Size | tuple[int, ...], stream: torch.Generator) -> tuple[int, ...]:
    return (stream.n, *shape[1:]) if isinstance(stream, PartStream) else tuple(shape)


def _own_rows(drawn: Tensor, stream: torch.Generator) -> Tensor:
    if not isinstance(stream, PartStream):
        return drawn
    rows = drawn[stream.index :: stream.of]
    return rows if len(rows) else drawn[:1]


@dataclass(frozen=True, eq=False)
class Part:
    """The rows ``index::of`` of a batch of ``n``: images [b, C, H, W] and labels [b].

    A part without rows, where fewer samples than ranks are left, stands in with the batch's first
    sample and weighs nothing: every rank has to take part in what the others wait for.
    """

    images: Tensor
    labels: Tensor
    n: int
    index: int = 0
    of: int = 1

    @property
    def stands_in(self) -> bool:
        return self.index >= self.n

    @property
    def weight(self) -> float:
        """The part's share of the batch's rows."""
        return 0.0 if self.stands_in else len(self.labels) / self.n

    def scaled(self, mean: Tensor) -> Tensor:
        """A mean over the part as its contribution to the mean over the batch."""
        return mean if self.of == 1 else mean * self.weight

    def stream(self, whole: torch.Generator) -> torch.Generator:
        """The batch's stream, which has not been drawn from, cut to the part."""
        return part_stream(whole, n=self.n, index=self.index, of=self.of)


@dataclass(frozen=True)
class Share:
    """What rank ``rank`` of ``size`` has of a batch of ``n``, in at most ``accumulate`` micro-batches."""

    n: int
    rank: int = 0
    size: int = 1
    accumulate: int = 1

    def parts(self, images: Tensor, labels: Tensor) -> list[Part]:
        """The rank's rows of the batch, in parts of two samples or more where there are as many."""
        count = max(1, min(self.accumulate, self.n // (2 * self.size)))
        of = count * self.size
        return [
            Part(images[j::count], labels[j::count], self.n, j * self.size + self.rank, of)
            for j in range(count)
        ]


def shares(
    split: Split,
    batch_size: int,
    *,
    ranks: Ranks,
    seed: int,
    epoch: int,
    device: torch.device,
    accumulate: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Share]]:
    """One epoch of augmented training batches: of each this rank's images and labels. No other row is read.

    Raises UsageError where a batch has not a row for every rank.
    """
    if min(batch_size, len(split)) < ranks.size:
        raise UsageError(
            f"a batch of {min(batch_size, len(split))} images cannot be shared by {ranks.size} ranks",
            hint="raise the batch size or use fewer ranks",
        )
    batches = split.train_batches(
        batch_size, seed=seed, epoch=epoch, augment=True, device=device, share=(ranks.rank, ranks.size)
    )
    for step, (images, labels) in enumerate(batches):
        n = min(batch_size, len(split) - step * batch_size)
        ranks.present = ranks.rank < n
        yield images, labels, Share(n, ranks.rank, ranks.size, accumulate)


class Total:
    """Losses and gradients of one step, added up over its parts and then over ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.loss = torch.zeros(())
        self.parts = 0
        self.gradients: dict[str, Tensor] = {}

    def add(self, loss: Tensor, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Take in one part's contribution to the batch mean, and its gradients."""
        # The first part's loss as it is: a sum with 0 would be one more operation on the device.
        self.loss = loss.detach() if self.parts == 0 else self.loss + loss.detach()
        self.parts += 1
        for name, gradient in (gradients or {}).items():
            # Not 0 + g: what there is but one of stays as it is, to the bit.
            found = self.gradients.get(name)
            self.gradients[name] = gradient if found is None else found + gradient

    def summed(self) -> dict[str, Tensor]:
        """The gradients of the mean over the whole batch, on every rank."""
        self.ranks.sum_([*self.gradients.values()])
        return self.gradients


def mean_loss(losses: list[Tensor], ranks: Ranks) -> float:
    """The mean over steps of the batch losses to which each rank has contributed; the same on all."""
    steps = torch.stack(losses)
    ranks.sum_([steps])
    return float(steps.mean())
