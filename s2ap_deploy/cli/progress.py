"""Progress on stderr: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from s2ap_deploy.cli import figures
from s2ap_deploy.recorder import Recorder, Silent

LINE_EVERY_SECONDS = 20.0
SOME = 0.02


@contextmanager
def recorder(quiet: bool) -> Iterator[Recorder]:
    """The recorder that fits where stderr goes; stdout belongs to results."""
    if quiet:
        yield Silent()
        return
    terminal = sys.stderr is not None and sys.stderr.isatty()
    # Whoever reads a log wraps lines to his own width.
    console = Console(stderr=True, highlight=False, soft_wrap=not terminal)
    if not terminal or os.environ.get("CI"):
        yield Lines(console)
        return
    live = Live(console)
    try:
        yield live
    finally:
        live.stop()  # an error may come in the middle of a stage, and must not find the cursor hidden


class Lines:
    """One line per epoch or block, and a sign of life in between: for logs and CI."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage, self.unit = "", ""
        self.total = self.done = self.skipped = 0
        self.started = self.spoke = time.monotonic()

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.skipped = 0
        self.started = self.spoke = time.monotonic()
        self._print(f"{stage}: {figures.counted(total, unit)}")

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        now = time.monotonic()
        if self.done == steps and now - self.started < 0.5:
            self.skipped = steps if steps > 1 else 0  # a resumed run starts with what is already done
        if now - self.spoke >= LINE_EVERY_SECONDS and self.done < self.total:
            self.spoke = now
            of = figures.counted(self.total, self.unit)
            self._print(f"{self.stage}: {self.done:,} of {of}{self._left(now)}")

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        self.spoke = time.monotonic()
        self._print(f"{stage}: {figures.row(values)}{self._left(self.spoke)}")

    def note(self, message: str) -> None:
        self._print(message)

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def end(self) -> None:
        self._print(f"{self.stage}: done in {time.monotonic() - self.started:.1f} s")

    def _print(self, text: str) -> None:
        self.console.print(Text(text))

    def _left(self, now: float) -> str:
        fresh = self.done - self.skipped
        if fresh <= 0 or self.done >= self.total:
            return ""
        if fresh < self.total * SOME and now - self.started < LINE_EVERY_SECONDS:
            return ""  # the first steps of a stage are the slowest: an estimate from them frightens
        each = (now - self.started) / fresh
        pace = f"{figures.rate(1 / each)}, " if each > 0 else ""
        return f", {pace}about {each * (self.total - self.done):.0f} s left"


class RateColumn(ProgressColumn):
    """How many steps a second the last ones took; blank before the first."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(figures.rate(speed) if speed else "")


class Live:
    """A bar with the stage, its latest figures and the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.stage, self.started = "", 0.0
        self.latest: dict[str, float | int | str] = {}

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.stop()
        self.stage, self.started, self.latest = stage, time.monotonic(), {}
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=8),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True),
            RateColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task(stage, total=total, figures="")
        self.progress.start()

    def advance(self, steps: int = 1) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.advance(self.task, steps)

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        self.latest = values
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, figures=figures.short(values))

    def note(self, message: str) -> None:
        self.console.print(Text(message))

    def warn(self, message: str) -> None:
        self.console.print(Text(f"warning: {message}", style="yellow"))

    def end(self) -> None:
        if self.progress is None:
            return
        self.stop()
        line = f"{self.stage:<8} {time.monotonic() - self.started:7.1f} s   {figures.last(self.latest)}"
        self.console.print(Text.assemble(("✓ ", "green"), line))

    def stop(self) -> None:
        """Take the bar away, if there is one."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
