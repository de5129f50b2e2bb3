"""How the ranks of one command find each other, and how they part."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from s2ap_deploy.distributed import environment
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.distributed.environment import TIMEOUT_SECONDS
from s2ap_deploy.distributed.presence import AGAIN, POLL_SECONDS
from s2ap_deploy.distributed.process_group import DistributedGroup
from s2ap_deploy.errors import DeployError, InconclusiveError, UsageError

LISTENER = "S2AP_LISTENER"  # the launcher's open socket, by its descriptor, for rank 0's store

_company: DistributedGroup | None = None


def join() -> DistributedGroup:
    """The company that this process belongs to by its environment, joined on the first call.

    A rank that is not the first waits for rank 0 to want company, for as long as its store lives. Raises
    InconclusiveError when the ranks do not find each other, and GroupClosed when rank 0 wants none.
    """
    global _company
    if _company is None:
        rank, size = environment.rank(), environment.size()
        store = _store(rank, size)
        if torch.cuda.is_available():
            torch.cuda.set_device(environment.local_rank() % torch.cuda.device_count())
        own_gpu = torch.cuda.is_available() and torch.cuda.device_count() > environment.local_rank()
        try:
            _meet(store, rank)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if own_gpu else "gloo",
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=TIMEOUT_SECONDS),
            )
        except (RuntimeError, ValueError) as error:
            raise _unreachable(rank, size, error) from None
        _company = DistributedGroup(store, rank, size)
    return _company


class GroupClosed(Exception):
    """Rank 0 has done its work alone."""


def _meet(store: Store, rank: int) -> None:
    """Rank 0 calls the others together; they wait for that, or for it to have done without them."""
    if rank == 0:
        store.set("meet", "1")
        return
    while not store.check(["meet"]):
        if store.check(["end"]):
            raise GroupClosed
        time.sleep(POLL_SECONDS[1])


def _unreachable(rank: int, size: int, error: Exception) -> InconclusiveError:
    return InconclusiveError(f"rank {rank} of {size} cannot reach the others: {error}", hint=AGAIN)


def present(device: torch.device) -> Ranks:
    """The ranks that work on ``device``; this process alone where nobody has started several.

    Raises UsageError where a rank cannot have a GPU of its own.
    """
    if environment.size() == 1:
        return SINGLE_PROCESS
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"--device {device} is one GPU, and there are {environment.size()} ranks",
                hint="give --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES",
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", environment.size()))
        if here > torch.cuda.device_count():
            raise UsageError(
                f"{here} ranks need as many GPUs, and there are {torch.cuda.device_count()}",
                hint="use fewer --devices, or --device cpu",
            )
    return join()


def farewell() -> None:
    """Rank 0 is done: the others, who may never have been asked for anything, may leave too."""
    try:
        if _company is not None:
            _company.dismiss()
            _company.leave()
        elif LISTENER not in os.environ:  # torchrun's; our own launcher ends the others itself
            store = _store(environment.rank(), environment.size())
            store.set("end", "1")
    except (RuntimeError, DeployError):
        return  # nobody is left to be told


def _store(rank: int, size: int) -> Store:
    """Our launcher's store, or torchrun's. Raises InconclusiveError when nobody answers within a minute."""
    wait = timedelta(seconds=TIMEOUT_SECONDS)
    try:
        if LISTENER not in os.environ:
            store: Store = next(rendezvous("env://", rank, size, timeout=wait))[0]
            return store
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = int(os.environ[LISTENER]) if rank == 0 else None
        return TCPStore(
            host, port, size, rank == 0, timeout=wait, wait_for_workers=False, master_listen_fd=listener
        )
    except (RuntimeError, ValueError) as error:
        raise _unreachable(rank, size, error) from None
