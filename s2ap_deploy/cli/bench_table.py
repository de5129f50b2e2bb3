"""What ``export --bench`` measured, as a table and the sentences below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from s2ap_deploy.onnx_export.export_report import PairedTimes, PeakMemory, Performance

_MIB = 2**20


def performance_table(performance: Performance) -> Table:
    """A row for each number of threads and images, one for loading, two for memory."""
    table = Table(
        title="file beside its dense twin", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("")
    for heading in ("p50", "p95", "dense p50", "dense p95", "ratio [quartiles]", "pairs"):
        # Text, since Rich would take words in brackets for a style.
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in performance.inference:
        words = f"{_count(row.batch, 'image')}, {_count(row.threads, 'thread')}"
        table.add_row(words, *_times(row.times))
    table.add_row("load", *_times(performance.load))
    if performance.memory is not None:
        for words, mine, theirs in _peaks(performance.memory):
            ratio = f"{mine / theirs:.2f}" if theirs else ""
            table.add_row(words, _size(mine), "", _size(theirs), "", ratio, str(performance.memory.processes))
    return table


def int8_words(instructions: Sequence[str] | None) -> str:
    """Whether the processor that was timed has instructions for int8."""
    if instructions is None:
        return "whether the processor has instructions for int8 is not known"
    vnni = [each for each in instructions if "vnni" in each]
    if vnni:
        return f"the processor has VNNI ({', '.join(vnni)})"
    if instructions:
        return f"the processor has instructions for int8 ({', '.join(instructions)})"
    return "the processor has no VNNI or the like: int8 gains less here than elsewhere"


def _times(times: PairedTimes) -> tuple[str | Text, ...]:
    return (
        *(f"{each:,.3g} ms" for each in (times.p50_ms, times.p95_ms, times.dense_p50_ms, times.dense_p95_ms)),
        Text(f"{times.ratio:.2f} [{times.ratio_q1:.2f}, {times.ratio_q3:.2f}]"),
        str(times.pairs),
    )


def _peaks(memory: PeakMemory) -> tuple[tuple[str, int, int], ...]:
    return (
        ("peak memory, load", memory.load_bytes, memory.dense_load_bytes),
        (f"peak memory, {_count(memory.batch, 'image')}", memory.run_bytes, memory.dense_run_bytes),
    )


def _size(count: int) -> str:
    return f"{count / _MIB:.1f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
