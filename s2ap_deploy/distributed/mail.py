"""Mail between two ranks, through the store, for work that is not done in step."""

from __future__ import annotations

import pickle
from typing import Any

from s2ap_deploy.distributed.presence import Heartbeat


class MessageQueue:
    """What this rank has sent and received; letters are read in the order of sending."""

    def __init__(self, presence: Heartbeat) -> None:
        self._presence = presence
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}

    def send(self, to: int, message: object) -> None:
        """Leave ``message`` for another rank."""
        number = self._sent[to] = self._sent.get(to, 0) + 1
        key = _key(self._presence.rank, to, number)
        self._presence.store.set(key, pickle.dumps(message))  # type: ignore[arg-type]

    def waiting(self, sender: int) -> bool:
        """Whether :meth:`receive` would return at once. Raises InconclusiveError when the sender is gone."""
        key = _key(sender, self._presence.rank, self._received.get(sender, 0) + 1)
        with self._presence.talk():
            if self._presence.store.check([key]):
                return True
        self._presence.require_alive(sender)
        return False

    def receive(self, sender: int) -> Any:
        """The next message of ``sender``; waits for it as long as the sender lives."""
        number = self._received[sender] = self._received.get(sender, 0) + 1
        key = _key(sender, self._presence.rank, number)
        self._presence.await_key(key, sender)
        content = self._presence.store.get(key)
        self._presence.store.delete_key(key)
        return pickle.loads(content)


def _key(sender: int, to: int, number: int) -> str:
    return f"mail/{sender}/{to}/{number}"
