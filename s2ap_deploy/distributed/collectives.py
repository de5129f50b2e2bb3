"""Collective operations of a training loop; with one process each of them does nothing.

A loop is written once: it calls its :class:`Ranks` to sum the results of each rank's rows of the batch.
With one rank the sum over ranks returns its input, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from s2ap_deploy.errors import DeployError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Result = TypeVar("Result")


class Ranks:
    """The only rank of a command, and the base of :class:`process_group.DistributedGroup`.

    ``rank`` counts from 0. Rank r of ``size`` works on the rows r, r + size, r + 2 size, ... of every batch,
    so that a row stays with its rank whatever the length of a batch. ``present`` says whether its rows
    count in the batch at hand (see ``training.batching``), and ``leading`` whether rank 0 is inside
    :meth:`on_first`, without the others.

    The methods are collective: every rank calls them, in the same order. They raise InconclusiveError when a
    rank is lost.
    """

    rank = 0
    size = 1
    present = True
    leading = False

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in one message per dtype and device."""
        import torch

        if self.size == 1:
            return
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in alike.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            self.reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in group])
            with torch.no_grad():
                for tensor, part in zip(group, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def reduce(self, flat: Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack the ranks' tensors, equal in shape: [size, ...]."""
        return tensor.unsqueeze(0)

    def broadcast(self, content: Result) -> Result:
        """Return rank 0's ``content`` on every rank. Tensors in it are on the CPU."""
        return content

    def scatter(self, contents: Sequence[Any]) -> Any:
        """Return on each rank its own item of rank 0's ``contents``; the other ranks' argument is ignored."""
        return contents[0]

    def collect(self, content: Result) -> list[Result]:
        """Return every rank's ``content`` on rank 0, in the order of ranks, and nothing on the others."""
        return [content]

    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with those of rank 0, so that replicas start equal."""

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on rank 0; return its result, or raise its error, on every rank.

        Inside ``function`` a call of this method is a plain call. The result is pickled.
        """
        if self.size == 1 or self.leading:
            return function()
        result: Any = None
        error: Exception | None = None
        if self.first:
            self.leading = True
            try:
                result = function()
            except Exception as caught:
                error = caught
            finally:
                self.leading = False
        sent = error if error is None or isinstance(error, DeployError) else _unforeseen(error)
        result, sent = self.broadcast((result, sent))
        if sent is not None:
            raise error or sent
        return result  # type: ignore[no-any-return]


def _unforeseen(error: Exception) -> DeployError:
    return DeployError(f"rank 0 failed with {type(error).__name__}: {error}", code="rank-failed")


SINGLE_PROCESS = Ranks()
