"""What a run or a sweep would do, as a record that a command prints."""

from __future__ import annotations

from s2ap_deploy.spec import Record
from s2ap_deploy.stages.read_only import State

QUICK = ("export", "gate")
"""Stages of seconds to a minute, which are not timed."""


class PlannedStage(Record):
    """One stage: whether it is done, what it would do, and its seconds, None where nobody can say."""

    name: str
    state: State
    words: str
    seconds: float | None = None
    at_most: bool = False


class DryRunReport(Record):
    """What one run would do. ``seconds`` is the sum of what is not done and can be estimated.

    ``bytes`` and ``dense_bytes`` are predicted sizes of the ONNX file and of its dense twin.
    """

    name: str
    run: str
    stages: tuple[PlannedStage, ...]
    seconds: float
    bytes: int | None = None
    dense_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the command would end at a stage of the folder."""
        return any(stage.state == "refused" for stage in self.stages)

    @property
    def untimed(self) -> tuple[str, ...]:
        """The long stages that are not done and that nobody can time, for want of data."""
        return tuple(
            stage.name
            for stage in self.stages
            if stage.state != "done" and stage.seconds is None and stage.name not in QUICK
        )


class SweepDryRunReport(Record):
    """What a sweep would do: the dense network of every seed first, and ``skipped`` with their reasons."""

    run: str
    shared: tuple[DryRunReport, ...]
    combinations: tuple[DryRunReport, ...]
    skipped: dict[str, str]
    seconds: float
