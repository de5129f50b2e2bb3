"""What long work tells its surroundings: how far it is, and where it can be taken up again. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Recorder(Protocol):
    """Receives progress. ``cli.progress`` draws it; tests and scripts use ``Silent``."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage of ``total`` steps (``unit``: "step", "image", ...) starts."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more of the current stage are done."""

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        """One row of figures: an epoch, a block of images, a measurement."""

    def note(self, message: str) -> None:
        """One sentence for the user: a choice that was made, a stage that was skipped."""

    def warn(self, message: str) -> None:
        """One sentence about something that works but should be looked at."""

    def end(self) -> None:
        """The current stage is over."""


class Silent:
    """A recorder that keeps nothing."""

    def begin(self, stage: str, total: int, unit: str) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def log(self, stage: str, values: dict[str, float | int | str]) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def end(self) -> None: ...


class Snapshots(Protocol):
    """Where a training loop leaves its state after each epoch, and finds it after a kill.

    ``run.Stage`` keeps it on disk; a loop called from Python may keep nothing (``NoSnapshots``).
    """

    def load_snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The tensors and the JSON state of the last finished epoch, or None."""

    def save_snapshot(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Keep both as one unit: a kill never mixes two epochs."""


class NoSnapshots:
    """Snapshots that start afresh and keep nothing."""

    def load_snapshot(self) -> None:
        return None

    def save_snapshot(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None: ...
