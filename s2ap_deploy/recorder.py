"""Interfaces for progress reports and snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Recorder(Protocol):
    """Receives progress. ``progress`` displays it; tests and scripts use ``Silent``."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Start a stage of ``total`` steps (``unit``: "step", "image", ...)."""

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more steps of the current stage."""

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        """Log one row of values: an epoch, a block of images, a measurement."""

    def note(self, message: str) -> None:
        """Report one sentence to the user: a choice that was made, a stage that was skipped."""

    def warn(self, message: str) -> None:
        """Warn in one sentence about something that works but should be checked."""

    def end(self) -> None:
        """End the current stage."""


class Silent:
    """A recorder that discards everything."""

    def begin(self, stage: str, total: int, unit: str) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def log(self, stage: str, values: dict[str, float | int | str]) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def end(self) -> None: ...


class Snapshots(Protocol):
    """Stores the state of a training loop after each epoch, to resume after a kill.

    ``run.Stage`` keeps it on disk; a loop called from Python may keep nothing (``NoSnapshots``).
    """

    def load_snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Load the tensors and the JSON state of the last finished epoch, or None."""

    def save_snapshot(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Store both as one unit: a kill never mixes two epochs."""


class NoSnapshots:
    """Snapshots that discard everything."""

    def load_snapshot(self) -> None:
        return None

    def save_snapshot(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None: ...
