"""The ranks that share a training loop, as that loop sees them. One rank alone does nothing here.

A loop is written once: it asks its :class:`Ranks` to sum what each rank found in its own rows of the
batch. With one rank a sum over ranks is what is already there, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from s2ap_deploy.recorder import Snapshots

Result = TypeVar("Result")


class Ranks:
    """This process as the only rank, and the base of those that have company.

    ``rank`` counts from 0. Rank r of ``size`` works on the rows r, r + size, r + 2 size, ... of every
    batch, so that a row stays with its rank whatever the length of a batch. ``present`` says whether this
    rank's rows count in the batch at hand (see ``robust.sharing``).

    The verbs are collective: every rank calls them, in the same order. They raise InconclusiveError
    when a rank is gone.
    """

    rank = 0
    size = 1
    present = True

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in one message per type of number."""
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

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, equal in shape, stacked: [size, ...]."""
        return tensor.unsqueeze(0)

    def reduce(self, flat: Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks."""

    def broadcast(self, content: Result) -> Result:
        """Rank 0's ``content``, on every rank; the others' own is ignored. Tensors arrive on the CPU."""
        return content

    def call(
        self,
        function: Callable[..., Result],
        *,
        snapshots: Snapshots | None = None,
        **arguments: Any,
    ) -> Result:
        """Run ``function`` on every rank, from rank 0, and return what it gave here.

        ``function`` lives in a module; it takes ``ranks`` beside ``arguments``. With ``snapshots`` it
        takes these too: rank 0 keeps them, the others get what it loads. Arguments that only rank 0 can
        have (a recorder that draws) go through :meth:`Ranks.own`.
        """
        given = {name: value.here if isinstance(value, Own) else value for name, value in arguments.items()}
        if snapshots is not None:
            given["snapshots"] = snapshots
        return function(**given, ranks=self)


class Own:
    """An argument of which rank 0 has ``here`` and the other ranks have ``elsewhere``."""

    def __init__(self, here: Any, elsewhere: Any) -> None:
        self.here = here
        self.elsewhere = elsewhere


class SharedSnapshots:
    """Snapshots that rank 0 keeps: what it loads reaches every rank, what the others save is dropped."""

    def __init__(self, ranks: Ranks, kept: Snapshots | None) -> None:
        self.ranks = ranks
        self.kept = kept

    def load_snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        loaded = self.kept.load_snapshot() if self.kept is not None else None
        return self.ranks.broadcast(loaded)

    def save_snapshot(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        if self.kept is not None:
            self.kept.save_snapshot(tensors, state)


SINGLE_PROCESS = Ranks()
