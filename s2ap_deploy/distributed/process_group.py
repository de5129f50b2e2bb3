"""The ranks of one command over torch.distributed: gloo between CPUs, NCCL between GPUs.

There are two groups. Collectives of a training step, in which all ranks do equal work, give up on a silent
rank after a minute. Control messages between stages wait for as long as rank 0 works alone, which may be
hours; a rank that died is noticed there by its closed connection, and by the launcher.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from s2ap_deploy.distributed import environment
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import InconclusiveError, UsageError

Result = TypeVar("Result")

RESUME = "run the same command with --resume; the number of ranks may differ"
LOST = "rank-lost"
_CONTROL_TIMEOUT = timedelta(days=365)

_group: DistributedGroup | None = None


class DistributedGroup(Ranks):
    """One of several ranks, made by :func:`init_process_group`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._control: Any = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)

    def reduce(self, flat: Tensor) -> None:
        with self._collective_errors():
            dist.all_reduce(flat)

    def gather(self, tensor: Tensor) -> Tensor:
        whole = tensor.new_empty((self.size, *tensor.shape))
        with self._collective_errors():
            dist.all_gather(list(whole.unbind()), tensor.contiguous())
        return whole

    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        with self._collective_errors():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def broadcast(self, content: Result) -> Result:
        box = [content if self.first else None]
        with self._collective_errors():
            dist.broadcast_object_list(box, src=0, group=self._control)
        return content if self.first else box[0]  # type: ignore[return-value]

    def scatter(self, contents: Sequence[Any]) -> Any:
        box: list[Any] = [None]
        with self._collective_errors():
            dist.scatter_object_list(box, list(contents) if self.first else None, group=self._control)
        return box[0]

    def collect(self, content: Result) -> list[Result]:
        box: list[Any] | None = [None] * self.size if self.first else None
        with self._collective_errors():
            dist.gather_object(content, box, group=self._control)
        return box or []

    @contextmanager
    def _collective_errors(self) -> Iterator[None]:
        """Turn a closed connection, or a rank that is silent for a minute, into InconclusiveError."""
        try:
            yield
        except RuntimeError as error:
            raise InconclusiveError(
                f"one of the {self.size} ranks has ended; finished work is saved", code=LOST, hint=RESUME
            ) from error


def current_group(device: torch.device) -> Ranks:
    """Return the ranks that work on ``device``: only this process if it was started alone.

    Raises UsageError if a rank cannot have a GPU of its own.
    """
    if environment.size() == 1:
        return SINGLE_PROCESS
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"--device {device} is one GPU, but there are {environment.size()} ranks",
                code="device-shared",
                hint="give --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES",
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", environment.size()))
        if here > torch.cuda.device_count():
            raise UsageError(
                f"{here} ranks need as many GPUs, and there are {torch.cuda.device_count()}",
                code="gpus-too-few",
                hint="use fewer --devices, or --device cpu",
            )
    return init_process_group()


def init_process_group() -> DistributedGroup:
    """Return the group that this process belongs to by its environment, joined on the first call.

    Raises InconclusiveError when the ranks do not find each other within a minute.
    """
    global _group
    if _group is not None:
        return _group
    rank, size = environment.rank(), environment.size()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(environment.local_rank() % gpus)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus > environment.local_rank() else "gloo",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=environment.TIMEOUT_SECONDS),
        )
        _group = DistributedGroup(rank, size)
    except (RuntimeError, ValueError) as error:
        raise InconclusiveError(
            f"rank {rank} of {size} cannot reach the other ranks: {error}",
            code="ranks-unreachable",
            hint=RESUME,
        ) from None
    return _group


def shutdown() -> None:
    """Leave the process group, if there is one, after all ranks have finished their work."""
    global _group
    if _group is not None:
        _group.broadcast(None)
        dist.destroy_process_group()
        _group = None
