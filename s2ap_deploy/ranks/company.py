"""Several ranks over torch.distributed: gloo between CPUs, NCCL between GPUs, a store for small talk.

Two kinds of waiting are kept apart. Inside a shared function every rank does the same work, so whoever
is silent for a minute in a collective is lost. Between functions rank 0 works alone, for hours perhaps: the
others look into the store for what comes next, and a heartbeat in it tells who is still there.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from s2ap_deploy.errors import DeployError, InconclusiveError, UsageError
from s2ap_deploy.ranks import membership, parcel
from s2ap_deploy.ranks.group import ALONE, Own, Ranks, SharedSnapshots
from s2ap_deploy.ranks.membership import TIMEOUT_SECONDS
from s2ap_deploy.recorder import Snapshots

Result = TypeVar("Result")

LISTENER = "S2AP_LISTENER"  # the launcher's open socket, by its descriptor, for rank 0's store
_BEAT_SECONDS = 2.0
_POLL_SECONDS = (0.002, 0.1)
_AGAIN = "run the same command with --resume; another number of ranks will do"


class Company(Ranks):
    """One of several ranks. Made by :func:`join`."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.store = store
        self._calls = 0
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    # Collectives.

    def reduce(self, flat: Tensor) -> None:
        with self._talk():
            dist.all_reduce(flat)

    def gather(self, tensor: Tensor) -> Tensor:
        whole = tensor.new_empty((self.size, *tensor.shape))
        with self._talk():
            dist.all_gather(list(whole.unbind()), tensor.contiguous())
        return whole

    def broadcast(self, content: Result) -> Result:
        sent = [parcel.pack(content) if self.first else b""]
        return parcel.unpack(self._bytes(sent[0]))  # type: ignore[no-any-return]

    def _bytes(self, content: bytes) -> bytes:
        """Rank 0's ``content`` on every rank."""
        length = torch.tensor(len(content))
        with self._talk():
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
            self.await_key(f"ready/{self._calls}/{other}", other)
        self._bytes(content)
        here = {name: value.here if isinstance(value, Own) else value for name, value in arguments.items()}
        if snapshots is not None:
            here["snapshots"] = SharedSnapshots(self, snapshots)
        return function(**here, ranks=self)

    def answer(self, device: torch.device) -> bool:
        """Wait for rank 0's next call and take part in it; False when there will be none."""
        self._calls += 1
        self.await_key(f"call/{self._calls}", 0)
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
        self._over.set()
        self._heart.join(_BEAT_SECONDS)

    # Mail between rank 0 and one other, for work that is not done in step.

    def send(self, to: int, message: object) -> None:
        """Leave ``message`` for another rank; it is read in the order of sending."""
        number = self._sent[to] = self._sent.get(to, 0) + 1
        self.store.set(f"mail/{self.rank}/{to}/{number}", pickle.dumps(message))  # type: ignore[arg-type]

    def has_mail(self, sender: int) -> bool:
        """Whether :meth:`receive` would return at once. Raises InconclusiveError when the sender is gone."""
        key = f"mail/{sender}/{self.rank}/{self._received.get(sender, 0) + 1}"
        with self._talk():
            if self.store.check([key]):
                return True
        self._require_alive(sender)
        return False

    def receive(self, sender: int) -> Any:
        """The next message of ``sender``; waits for it as long as the sender lives."""
        number = self._received[sender] = self._received.get(sender, 0) + 1
        key = f"mail/{sender}/{self.rank}/{number}"
        self.await_key(key, sender)
        content = self.store.get(key)
        self.store.delete_key(key)
        return pickle.loads(content)

    # Who is there.

    def await_key(self, key: str, sender: int) -> None:
        """Wait until the store holds ``key``. Raises InconclusiveError when ``sender`` is gone."""
        pause, longest = _POLL_SECONDS
        while True:
            with self._talk():
                if self.store.check([key]):
                    return
            self._require_alive(sender)
            time.sleep(pause)
            pause = min(longest, 1.5 * pause)

    def fail(self, error: BaseException) -> None:
        """Tell rank 0 why this rank leaves."""
        known = error if isinstance(error, DeployError) else None
        said = known or DeployError(f"rank {self.rank} failed with {type(error).__name__}: {error}")
        content = pickle.dumps((said.message, said.hint, type(said)))
        self.store.set("failure", content)  # type: ignore[arg-type]

    def _beat(self) -> None:
        """Say every two seconds that this rank lives; leave with rank 0, whatever the work at hand."""
        store = self.store.clone()
        count = 0
        try:
            while self.first or not store.check(["end"]):
                store.set(f"beat/{self.rank}", str(count := count + 1))
                if self._over.wait(_BEAT_SECONDS):
                    return
        except RuntimeError:
            if self.first:
                return  # the main thread will hear of it in its next collective
            os._exit(InconclusiveError.exit_code)
        os._exit(0)

    def _require_alive(self, other: int) -> None:
        now = time.monotonic()
        seen, when = self._beats.get(other, (b"", now))
        if now - when < _BEAT_SECONDS and other in self._beats:
            return
        key = f"beat/{other}"
        with self._talk():
            beat = self.store.get(key) if self.store.check([key]) else b""
            failed = self.first and self.store.check(["failure"])
        if failed:
            raise self._lost()
        if beat != seen or other not in self._beats:
            self._beats[other] = (beat, now)
        elif now - when > TIMEOUT_SECONDS:
            raise InconclusiveError(
                f"rank {other} of {self.size} gave no sign of life for a minute", hint=_AGAIN
            )

    @contextmanager
    def _talk(self) -> Iterator[None]:
        """Turns a torn connection, or a rank that is silent for a minute, into an error of ours."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self._lost() from error

    def _lost(self) -> DeployError:
        """Why a rank is gone, where it could still say so."""
        try:
            for _ in range(10):
                if self.store.check(["failure"]):
                    message, hint, kind = pickle.loads(self.store.get("failure"))
                    error: DeployError = kind(message, hint=hint)
                    return error
                time.sleep(0.1)
        except RuntimeError:
            pass
        return InconclusiveError(
            f"one of the {self.size} ranks has ended; what was finished is saved", hint=_AGAIN
        )


_company: Company | None = None


def join() -> Company:
    """The company that this process belongs to by its environment, joined on the first call.

    A rank that is not the first waits for rank 0 to want company, for as long as its store lives. Raises
    InconclusiveError when the ranks do not find each other, and DismissedError when rank 0 wants none.
    """
    global _company
    if _company is None:
        rank, size = membership.rank(), membership.size()
        store = _store(rank, size)
        if torch.cuda.is_available():
            torch.cuda.set_device(membership.local_rank() % torch.cuda.device_count())
        own_gpu = torch.cuda.is_available() and torch.cuda.device_count() > membership.local_rank()
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
        _company = Company(store, rank, size)
    return _company


class DismissedError(Exception):
    """Rank 0 has done its work alone."""


def _meet(store: Store, rank: int) -> None:
    """Rank 0 calls the others together; they wait for that, or for it to have done without them."""
    if rank == 0:
        store.set("meet", "1")
        return
    while not store.check(["meet"]):
        if store.check(["end"]):
            raise DismissedError
        time.sleep(_POLL_SECONDS[1])


def _unreachable(rank: int, size: int, error: Exception) -> InconclusiveError:
    return InconclusiveError(f"rank {rank} of {size} cannot reach the others: {error}", hint=_AGAIN)


def present(device: torch.device) -> Ranks:
    """The ranks that work on ``device``; this process alone where nobody has started several.

    Raises UsageError where a rank cannot have a GPU of its own.
    """
    if membership.size() == 1:
        return ALONE
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"--device {device} is one GPU, and there are {membership.size()} ranks",
                hint="give --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES",
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", membership.size()))
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
            store = _store(membership.rank(), membership.size())
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


def _network(argument: Any) -> nn.Module | None:
    """The network in an argument, whose classes the other ranks may have to import from a file."""
    candidates = (argument, getattr(argument, "network", None), getattr(argument, "judge", None))
    return next((each for each in candidates if isinstance(each, nn.Module)), None)
