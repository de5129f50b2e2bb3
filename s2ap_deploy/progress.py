"""Progress on stderr: a live bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Mapping
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

from s2ap_deploy import formatting
from s2ap_deploy.recorder import Recorder, Silent

LINE_EVERY_SECONDS = 20.0
SOME = 0.02

LABELS = {
    "loss": "loss",
    "clean_accuracy": "clean",
    "robust_accuracy": "robust",
    "replaced": "mask moved",
    "flip_rate": "flips",
}
SHARES = {"clean_accuracy", "robust_accuracy", "replaced", "flip_rate"}
ON_THE_BAR = ("loss", "robust_accuracy")
AT_THE_END = ("loss", "clean_accuracy", "robust_accuracy", "flip_rate")

Metrics = Mapping[str, float | int | str]


@contextmanager
def recorder() -> Iterator[Recorder]:
    """Yield the recorder for a terminal or a log; stdout is reserved for results."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    # Do not wrap lines in logs.
    console = Console(stderr=True, highlight=False, soft_wrap=not terminal)
    if not terminal or os.environ.get("CI"):
        yield Lines(console)
        return
    live = Live(console)
    try:
        yield live
    finally:
        live.stop()  # also after an error, which must not leave the cursor hidden


def interactive() -> Recorder:
    """Return a live bar on a terminal or in a notebook, and a silent recorder in a script or a log.

    A notebook without ipywidgets, which its bar needs, gets lines.
    """
    console = Console(stderr=True, highlight=False)
    if console.is_jupyter:
        here = Console(highlight=False)
        return Live(here) if importlib.util.find_spec("ipywidgets") is not None else Lines(here)
    return Live(console) if console.is_terminal and not os.environ.get("CI") else Silent()


def stop(recorder: Recorder) -> None:
    """Remove the bar of a stage that an error has ended."""
    if isinstance(recorder, Live):
        recorder.stop()


class Lines:
    """Prints one line per epoch or block, with progress in between, for logs and CI."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage, self.unit = "", ""
        self.total = self.done = self.skipped = 0
        self.started = self.spoke = time.monotonic()

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.skipped = 0
        self.started = self.spoke = time.monotonic()
        self._print(f"{stage}: {formatting.counted(total, unit)}")

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        now = time.monotonic()
        if self.done == steps and now - self.started < 0.5:
            self.skipped = (
                steps if steps > 1 else 0
            )  # a resumed run starts with the steps that are already done
        if now - self.spoke >= LINE_EVERY_SECONDS and self.done < self.total:
            self.spoke = now
            of = formatting.counted(self.total, self.unit)
            self._print(f"{self.stage}: {self.done:,} of {of}{self._left(now)}")

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        self.spoke = time.monotonic()
        self._print(f"{stage}: {line_of(values)}{self._left(self.spoke)}")

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
            return ""  # the first steps are the slowest: early estimates are too pessimistic
        each = (now - self.started) / fresh
        pace = f"{formatting.rate(1 / each)}, " if each > 0 else ""
        return f", {pace}about {each * (self.total - self.done):.0f} s left"


class RateColumn(ProgressColumn):
    """Recent steps per second; blank before the first step."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(formatting.rate(speed) if speed else "")


class Live:
    """Shows a bar with the stage, its latest metrics and the time left."""

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
            TextColumn("{task.percentage:>3.0f}%"),
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
            self.progress.update(self.task, figures=bar_text(values))

    def note(self, message: str) -> None:
        self.console.print(Text(message))

    def warn(self, message: str) -> None:
        self.console.print(Text(f"warning: {message}", style="yellow"))

    def end(self) -> None:
        if self.progress is None:
            return
        self.stop()
        line = f"{self.stage:<8} {time.monotonic() - self.started:7.1f} s   {final_text(self.latest)}"
        self.console.print(Text.assemble(("✓ ", "green"), line))

    def stop(self) -> None:
        """Remove the bar, if there is one."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def line_of(values: Metrics) -> str:
    """Format all values of a row on one line."""
    if "attack" in values:
        return (
            f"{values['attack']} broke {values['broken']} of "
            f"{formatting.counted(int(values['images']), 'image')} of block {values['block']} "
            f"in {values['seconds']} s; {values['unbroken']} unbroken"
        )
    parts = [_epoch(values), *_named(values, tuple(LABELS))]
    if "seconds" in values:
        parts.append(f"{float(values['seconds']):.1f} s")
    return ", ".join(filter(None, parts))


def bar_text(values: Metrics) -> str:
    """Return the values to show next to a bar."""
    if "attack" in values:
        return f"{values['attack']}  {values['unbroken']} unbroken"
    return "  ".join(filter(None, [_epoch(values), *_named(values, ON_THE_BAR)]))


def final_text(values: Metrics) -> str:
    """Return the summary shown when the stage is done."""
    if "attack" in values:
        return f"{values['unbroken']} unbroken"
    return "  ".join(_named(values, AT_THE_END))


def _epoch(values: Metrics) -> str:
    if "epoch" not in values:
        return ""
    return f"epoch {values['epoch']}" + (f"/{values['epochs']}" if "epochs" in values else "")


def _named(values: Metrics, names: tuple[str, ...]) -> list[str]:
    return [_figure(name, float(values[name])) for name in names if name in values]


def _figure(name: str, value: float) -> str:
    if name in SHARES:
        digits = 2 if name in ("replaced", "flip_rate") else 1
        return f"{LABELS[name]} {100 * value:.{digits}f}%"
    return f"{LABELS[name]} {value:.3f}"
