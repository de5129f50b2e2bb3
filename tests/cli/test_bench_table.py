"""The table of --bench: every figure is in it, in words that a reader needs no key for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s2ap_deploy.cli.bench_table import int8_words, performance_table
from s2ap_deploy.onnx_export.export_report import Inference, PairedTimes, PeakMemory, Performance

MIB = 2**20


def times(ratio: float) -> PairedTimes:
    return PairedTimes(
        pairs=211,
        p50_ms=2.918,
        p95_ms=3.25,
        dense_p50_ms=11.62,
        dense_p95_ms=1234.5,
        ratio=ratio,
        ratio_q1=ratio - 0.02,
        ratio_q3=ratio + 0.03,
        difference_ms=-8.7,
    )


def performance(**changes: Any) -> Performance:
    facts: dict[str, Any] = {
        "inference": tuple(
            Inference(threads=threads, batch=batch, times=times(0.25 * batch / threads))
            for threads in (1, 2)
            for batch in (1, 32)
        ),
        "load": times(3.5),
        "memory": PeakMemory(
            processes=3,
            batch=1,
            bare_bytes=60 * MIB,
            load_bytes=90 * MIB,
            run_bytes=95 * MIB,
            dense_load_bytes=60 * MIB,
            dense_run_bytes=0,
        ),
        "processor": "A Processor",
    }
    return Performance(**{**facts, **changes})


def shown(found: Performance) -> list[str]:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(performance_table(found))
    return [line.strip() for line in capture.get().splitlines()]


def row(lines: list[str], beginning: str) -> list[str]:
    (line,) = (each for each in lines if each.startswith(beginning))
    return line.removeprefix(beginning).split()


def test_every_row_says_what_ran_and_how_far_ratios_spread() -> None:
    lines = shown(performance())
    expected = ["2.92", "ms", "3.25", "ms", "11.6", "ms", "1.23e+03", "ms", "0.25", "[0.23,", "0.28]", "211"]
    assert row(lines, "1 image, 1 thread ") == expected
    assert row(lines, "32 images, 2 threads ")[8:] == ["4.00", "[3.98,", "4.03]", "211"]
    assert row(lines, "load ")[8:] == ["3.50", "[3.48,", "3.53]", "211"]
    assert row(lines, "peak memory, load ") == ["90.0", "MiB", "60.0", "MiB", "1.50", "3"]
    # A twin that needs nothing measurable has no ratio.
    assert row(lines, "peak memory, 1 image ") == ["95.0", "MiB", "0.0", "MiB", "3"]


def test_memory_that_was_not_measured_has_no_rows() -> None:
    assert not any("memory" in line for line in shown(performance(memory=None)))


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        (("avx512_vnni", "avx_vnni"), "has VNNI (avx512_vnni, avx_vnni)"),
        (("asimddp",), "has instructions for int8 (asimddp)"),
        ((), "has no VNNI"),
        (None, "is not known"),
    ],
)
def test_whether_the_processor_is_made_for_int8_is_said(
    instructions: tuple[str, ...] | None, words: str
) -> None:
    assert words in int8_words(instructions)


def test_bench_measures_a_finished_export_and_leaves_its_file_alone(
    s2ap: Any, own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from s2ap_deploy.onnx_export import benchmark

    short = benchmark.Effort(seconds=0.0, pairs=5, processes=1)
    monkeypatch.setattr(benchmark, "DEFAULT_EFFORT", short)
    file = own_run / "export" / "model.onnx"
    before = file.read_bytes()
    done = s2ap("export", "--bench", "--run", own_run)
    assert done.code == 0, done.err
    assert "ratio [quartiles]" in done.out
    assert "1 image, 1 thread" in done.out
    assert "peak memory, load" in done.out
    assert "Unstructured sparsity does not speed up CPU inference." in done.out
    assert file.read_bytes() == before
    again = s2ap("export", "--json", "--run", own_run)
    assert "export: already done" in again.err
    answer = json.loads(again.out)
    assert answer["performance"]["load"]["pairs"] == 5
    assert {row["batch"] for row in answer["performance"]["inference"]} == {1, 32}
    assert s2ap("gate", "--min-robust", 0, "--rule", "point", "--max-drop", 1, "--run", own_run).code == 0
