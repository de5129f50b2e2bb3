"""Who is there: a store that all ranks share, a heartbeat in it, and the reasons of those who left."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import Store  # type: ignore[attr-defined]

from s2ap_deploy.distributed.environment import TIMEOUT_SECONDS
from s2ap_deploy.errors import DeployError, InconclusiveError

AGAIN = "run the same command with --resume; another number of ranks will do"
POLL_SECONDS = (0.002, 0.1)
_BEAT_SECONDS = 2.0


class Heartbeat:
    """One rank's view of the others; a thread says every two seconds that this one lives."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def await_key(self, key: str, sender: int) -> None:
        """Wait until the store holds ``key``. Raises InconclusiveError when ``sender`` is gone."""
        pause, longest = POLL_SECONDS
        while True:
            with self.talk():
                if self.store.check([key]):
                    return
            self.require_alive(sender)
            time.sleep(pause)
            pause = min(longest, 1.5 * pause)

    def fail(self, error: BaseException) -> None:
        """Tell rank 0 why this rank leaves."""
        known = error if isinstance(error, DeployError) else None
        said = known or DeployError(f"rank {self.rank} failed with {type(error).__name__}: {error}")
        content = pickle.dumps((said.message, said.hint, type(said)))
        self.store.set("failure", content)  # type: ignore[arg-type]

    def leave(self) -> None:
        """Let go of the others: a thread that still talks would disturb the end of this process."""
        self._over.set()
        self._heart.join(_BEAT_SECONDS)

    @contextmanager
    def talk(self) -> Iterator[None]:
        """Turns a torn connection, or a rank that is silent for a minute, into an error of ours."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self._lost() from error

    def require_alive(self, other: int) -> None:
        """Raise InconclusiveError when a rank is silent for a minute, or the error that it left with."""
        now = time.monotonic()
        seen, when = self._beats.get(other, (b"", now))
        if now - when < _BEAT_SECONDS and other in self._beats:
            return
        key = f"beat/{other}"
        with self.talk():
            beat = self.store.get(key) if self.store.check([key]) else b""
            failed = self.rank == 0 and self.store.check(["failure"])
        if failed:
            raise self._lost()
        if beat != seen or other not in self._beats:
            self._beats[other] = (beat, now)
        elif now - when > TIMEOUT_SECONDS:
            raise InconclusiveError(
                f"rank {other} of {self.size} gave no sign of life for a minute", hint=AGAIN
            )

    def _beat(self) -> None:
        """Say every two seconds that this rank lives; leave with rank 0, whatever the work at hand."""
        store = self.store.clone()
        count = 0
        try:
            while self.rank == 0 or not store.check(["end"]):
                store.set(f"beat/{self.rank}", str(count := count + 1))
                if self._over.wait(_BEAT_SECONDS):
                    return
        except RuntimeError:
            if self.rank == 0:
                return  # the main thread will hear of it in its next collective
            os._exit(InconclusiveError.exit_code)
        os._exit(0)

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
            f"one of the {self.size} ranks has ended; what was finished is saved", hint=AGAIN
        )
