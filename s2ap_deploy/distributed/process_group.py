"""Several ranks over torch.distributed: gloo between CPUs, NCCL between GPUs, a store for small talk.

Two kinds of waiting are kept apart. Inside a shared function every rank does the same work, so whoever
is silent for a minute in a collective is lost. Between functions rank 0 works alone, for hours perhaps: the
others look into the store for what comes next, and a heartbeat in it tells who is still there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]

from s2ap_deploy.distributed import parcel
from s2ap_deploy.distributed.collectives import Own, Ranks, SharedSnapshots
from s2ap_deploy.distributed.mail import MessageQueue
from s2ap_deploy.distributed.presence import Heartbeat
from s2ap_deploy.errors import UsageError
from s2ap_deploy.recorder import Snapshots

Result = TypeVar("Result")


class DistributedGroup(Ranks):
    """One of several ranks. Made by :func:`s2ap_deploy.distributed.meeting.join`."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.store = store
        self.presence = Heartbeat(store, rank, size)
        self.mailbox = MessageQueue(self.presence)
        self._calls = 0

    # Collectives.

    def reduce(self, flat: Tensor) -> None:
        with self.presence.talk():
            dist.all_reduce(flat)

    def gather(self, tensor: Tensor) -> Tensor:
        whole = tensor.new_empty((self.size, *tensor.shape))
        with self.presence.talk():
            dist.all_gather(list(whole.unbind()), tensor.contiguous())
        return whole

    def broadcast(self, content: Result) -> Result:
        sent = [parcel.pack(content) if self.first else b""]
        return parcel.unpack(self._bytes(sent[0]))  # type: ignore[no-any-return]

    def _bytes(self, content: bytes) -> bytes:
        """Rank 0's ``content`` on every rank."""
        length = torch.tensor(len(content))
        with self.presence.talk():
            dist.broadcast(length, src=0)
            message = (
                torch.frombuffer(bytearray(content), dtype=torch.uint8)
                if self.first
                else torch.empty(int(length), dtype=torch.uint8)
            )
            dist.broadcast(message, src=0)
        return content if self.first else message.numpy().tobytes()

    # Calls: rank 0 names a function, the others run it too.

    def call(
        self,
        function: Callable[..., Result],
        *,
        snapshots: Snapshots | None = None,
        **arguments: Any,
    ) -> Result:
        elsewhere = {n: v.elsewhere if isinstance(v, Own) else v for n, v in arguments.items()}
        networks = [value for value in map(_network, arguments.values()) if value is not None]
        message = (function, elsewhere, snapshots is not None, torch.get_num_threads())
        try:
            content = parcel.pack(message, networks)
        except Exception as error:  # whatever a stranger's module raises while it is being pickled
            raise UsageError(
                f"the network cannot be sent to the other ranks: {error}", hint="leave --devices out"
            ) from error
        self._calls += 1
        self.store.set(f"call/{self._calls}", "1")
        # Others may still be busy with what rank 0 no longer needs: no collective before all are here.
        for other in range(1, self.size):
            self.presence.await_key(f"ready/{self._calls}/{other}", other)
        self._bytes(content)
        here = {name: value.here if isinstance(value, Own) else value for name, value in arguments.items()}
        if snapshots is not None:
            here["snapshots"] = SharedSnapshots(self, snapshots)
        return function(**here, ranks=self)

    def answer(self, device: torch.device) -> bool:
        """Wait for rank 0's next call and take part in it; False when there will be none."""
        self._calls += 1
        self.presence.await_key(f"call/{self._calls}", 0)
        if self.store.get(f"call/{self._calls}") == b"0":
            return False
        self.store.set(f"ready/{self._calls}/{self.rank}", "1")
        function, arguments, snaps, threads = parcel.unpack(self._bytes(b""), device)
        torch.set_num_threads(threads)
        if snaps:
            arguments["snapshots"] = SharedSnapshots(self, None)
        function(**arguments, ranks=self)
        return True

    def dismiss(self) -> None:
        """Rank 0 has no further call: the others may leave."""
        self.store.set(f"call/{self._calls + 1}", "0")
        self.store.set("end", "1")

    def leave(self) -> None:
        """Let go of the others: a thread that still talks would disturb the end of this process."""
        self.presence.leave()

    def fail(self, error: BaseException) -> None:
        """Tell rank 0 why this rank leaves."""
        self.presence.fail(error)

    # Work that is not done in step: see ``mail``.

    def send(self, to: int, message: object) -> None:
        """Leave ``message`` for another rank; it is read in the order of sending."""
        self.mailbox.send(to, message)

    def has_mail(self, sender: int) -> bool:
        """Whether :meth:`receive` would return at once. Raises InconclusiveError when the sender is gone."""
        return self.mailbox.waiting(sender)

    def receive(self, sender: int) -> Any:
        """The next message of ``sender``; waits for it as long as the sender lives."""
        return self.mailbox.receive(sender)


def _network(argument: Any) -> nn.Module | None:
    """The network in an argument, whose classes the other ranks may have to import from a file."""
    candidates = (argument, getattr(argument, "network", None), getattr(argument, "judge", None))
    return next((each for each in candidates if isinstance(each, nn.Module)), None)
