"""Time two things in turns in one process, so that other load on the machine slows both alike.

On a CPU the processor time of this process is reported beside wall time: other programs lengthen only the
latter.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from s2ap_deploy.recorder import Silent


class Span(NamedTuple):
    """Seconds on the clock, and of the processor on behalf of this process."""

    clock: float
    processor: float


def now(device: torch.device) -> Span:
    """The time once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Span(time.perf_counter(), time.process_time())


def since(start: Span, device: torch.device) -> Span:
    """How long ago ``start`` was, when the device is done."""
    end = now(device)
    return Span(end.clock - start.clock, end.processor - start.processor)


def timed(work: Callable[[], object], device: torch.device) -> Span:
    """How long ``work`` takes, until the device has done it."""
    start = now(device)
    work()
    return since(start, device)


class Turns(Silent):
    """A recorder that lets ``other`` take a turn after every step of a loop, and times both.

    The loop's own time runs from the end of one turn to its next step's end, its batch included. The first
    ``warm_up`` pairs are not counted.
    """

    def __init__(self, other: Callable[[], object], device: torch.device, warm_up: int = 1) -> None:
        self.other, self.device, self.warm_up = other, device, warm_up
        self.ours: list[Span] = []
        self.others: list[Span] = []
        self.resumed = now(device)

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.resumed = now(self.device)

    def advance(self, steps: int = 1) -> None:
        if steps == 0:
            return
        ours = since(self.resumed, self.device)
        others = timed(self.other, self.device)
        if self.warm_up:
            self.warm_up -= 1
        else:
            self.ours.append(ours)
            self.others.append(others)
            print(f"ours {ours}, other {others}", flush=True)
        self.resumed = now(self.device)


def compared(ours: Sequence[Span], others: Sequence[Span], device: torch.device) -> dict[str, Any]:
    """Quartiles of the seconds and of the paired ratios ours / other."""
    found: dict[str, Any] = {}
    for name in Span._fields:
        mine, theirs = ([getattr(span, name) for span in spans] for spans in (ours, others))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        figures = {"ratio": ratios, "ours_seconds": mine, "other_seconds": theirs}
        found[name] = {key: quartiles(values) for key, values in figures.items()}
    processor = {"processor": found["processor"]} if device.type == "cpu" else {}
    return {"pairs": len(ours), **found["clock"], **processor}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile; all the same where there is one value."""
    if len(values) == 1:
        return dict.fromkeys(("q1", "median", "q3"), round(values[0], 5))
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": round(q1, 5), "median": round(median, 5), "q3": round(q3, 5)}
