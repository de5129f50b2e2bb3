"""Tables: what they say, and that nothing is clipped at 80 columns or broken up in a log."""

import io
import re
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from s2ap_deploy.cli import tables
from s2ap_deploy.cli.terminal import WORDS
from s2ap_deploy.cli.verdict_commands import show_checks
from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.onnx_export.export_report import Inference, PairedTimes, PeakMemory, Performance

SHARE = {"value": 0.86, "interval": [0.804, 0.9048]}


def summary() -> dict[str, Any]:
    row = {"arch": "digits-conv", "sparsity": 0.0, "n": 200, "clean": SHARE, "robust": SHARE, "flags": []}
    return {
        "run": "s2ap-run",
        "threat": "Linf eps 8/255",
        "statement": "robust accuracy under AutoAttack (upper bound)",
        "dense": {**row, "bytes": 607_105},
        "pruned": {**row, "sparsity": 0.9, "bytes": 78_067},
        "export": {"statement": "Sparsity shrinks the file, not CPU latency.", "latency_ratio": 1.04},
        "gate": verdict().model_dump(),
    }


def verdict() -> Verdict:
    long = "file export/model.onnx gives the certificate's answers on all 200 samples, clean and attacked"
    checks = (
        Check(rule="file", name="file", status="pass", message=long),
        Check(
            rule="robust-accuracy",
            name="robust",
            status="fail",
            message="robust accuracy: 10 of 200; required [40%]",
        ),
        Check(rule="reliability", name="flag", status="inconclusive", message="the model: some doubt"),
    )
    return Verdict(status="fail", exit_code=1, checks=checks)


def test_the_end_of_a_run_is_one_table_and_the_verdict(capsys) -> None:
    tables.show_summary(summary())
    out = capsys.readouterr().out
    for words in (
        "digits-conv, Linf eps 8/255",
        "86.0% [80.4%, 90.5%]",
        "90.00%",
        "78,067",
        "607,105",
        "200",
    ):
        assert words in out
    assert "robust accuracy under AutoAttack (upper bound); intervals are exact (95%, Clopper-Pearson)" in out
    assert "not CPU latency. (measured: 1.04 of the dense file's time)" in out
    assert out.splitlines()[-1] == "gate: FAILED"
    assert "flags" not in out


def test_both_sides_are_shown_where_one_is_proven(capsys) -> None:
    proven = summary()
    proven["dense"]["proven"] = {"value": 0.5, "interval": [0.428, 0.572]}
    tables.show_summary(proven)
    out = capsys.readouterr().out
    assert "50.0% [42.8%, 57.2%]" in out
    assert "provably robust accuracy (lower bound)" in out
    tables.show_summary(summary())
    assert "provably" not in capsys.readouterr().out


def test_flags_are_shown_when_there_are_any(capsys) -> None:
    flagged = summary()
    flagged["pruned"]["flags"] = ["zero_gradient"]
    tables.show_summary(flagged)
    assert "zero_gradient" in capsys.readouterr().out


def test_a_log_keeps_each_check_on_its_line_and_brackets_are_text(capsys) -> None:
    expected = [f"{sign} {check.message}" for sign, check in zip("✓✗?", verdict().checks, strict=True)]
    show_checks(verdict().checks, "gate", "fail", WORDS)
    assert capsys.readouterr().out.splitlines() == [*expected, "gate: FAILED"]


LONG_PATH = "/a/very/long/path/" + "x" * 90 + ".pt"
DESCRIPTION: dict[str, Any] = {
    "file": LONG_PATH,
    "sha256": "ab" * 32,
    "format": "torch zip",
    "wrapper": "state_dict",
    "architecture": None,
    "num_classes": None,
    "parameters": 0,
    "prunable_weights": 0,
    "info": None,
    "closest": [{"architecture": "digits-conv", "exact": False, "differs": "[2.weight] is missing"}],
    "layers": [{"name": "2.weight", "shape": [64, 32, 3, 3], "weights": 18432, "zeros": 0}],
    "notes": [],
    "warnings": ["[careful]"],
}


def test_a_terminal_of_eighty_columns_clips_nothing(monkeypatch) -> None:
    stream = io.StringIO()
    narrow = Console(file=stream, width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(tables, "console", lambda: narrow)
    tables.show_summary(summary())
    tables.show_checkpoint(DESCRIPTION)
    text = stream.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    joined = "".join(line.strip() for line in text.splitlines())
    assert LONG_PATH in joined
    for words in (
        "under 'state_dict'",
        "none in the registry fits",
        "[2.weight] is missing",
        "[careful]",
        "64x32x3x3",
    ):
        assert words in text


def test_twins_are_not_called_close(capsys) -> None:
    names = ("cifar-wrn-28-4", "cifar-wrn-28-4-silu")
    twins = [{"architecture": name, "exact": True, "differs": "nothing"} for name in names]
    tables.show_checkpoint(DESCRIPTION | {"closest": twins})
    out = capsys.readouterr().out
    assert "several fit by names and shapes" in out
    assert "closest" not in out
    assert "none in the registry fits" not in out


def test_without_stdout_nothing_breaks(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    tables.show_summary(summary())
    show_checks(verdict().checks, "gate", "fail", WORDS)


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


def bench_lines(found: Performance) -> list[str]:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(tables.performance_table(found))
    return [line.strip() for line in capture.get().splitlines()]


def row(lines: list[str], beginning: str) -> list[str]:
    (line,) = (each for each in lines if each.startswith(beginning))
    return line.removeprefix(beginning).split()


def test_every_row_says_what_ran_and_how_far_ratios_spread() -> None:
    lines = bench_lines(performance())
    expected = ["2.92", "ms", "3.25", "ms", "11.6", "ms", "1.23e+03", "ms", "0.25", "[0.23,", "0.28]", "211"]
    assert row(lines, "1 image, 1 thread ") == expected
    assert row(lines, "32 images, 2 threads ")[8:] == ["4.00", "[3.98,", "4.03]", "211"]
    assert row(lines, "load ")[8:] == ["3.50", "[3.48,", "3.53]", "211"]
    assert row(lines, "peak memory, load ") == ["90.0", "MiB", "60.0", "MiB", "1.50", "3"]
    # A twin that needs nothing measurable has no ratio.
    assert row(lines, "peak memory, 1 image ") == ["95.0", "MiB", "0.0", "MiB", "3"]


def test_memory_that_was_not_measured_has_no_rows() -> None:
    assert not any("memory" in line for line in bench_lines(performance(memory=None)))


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        (("avx512_vnni", "avx_vnni"), "has VNNI (avx512_vnni, avx_vnni)"),
        (("asimddp",), "has instructions for int8 (asimddp)"),
        ((), "has no VNNI"),
        (None, "is not known"),
    ],
)
def test_whether_the_processor_is_made_for_int8_is_said(instructions, words) -> None:
    assert words in tables.int8_words(instructions)


def test_bench_measures_a_finished_export_and_leaves_its_file_alone(s2ap, own_run, monkeypatch) -> None:
    from s2ap_deploy.onnx_export import benchmark

    short = benchmark.Effort(seconds=0.0, pairs=5, processes=1)
    monkeypatch.setattr(benchmark, "DEFAULT_EFFORT", short)
    file = own_run / "export" / "model.onnx"
    before = file.read_bytes()
    done = s2ap.ok("export", "--bench", "--run", own_run)
    assert "ratio [quartiles]" in done.out
    assert "1 image, 1 thread" in done.out
    assert "peak memory, load" in done.out
    assert "ONNX Runtime computes unstructured zeros at dense speed." in done.out
    assert file.read_bytes() == before
    again = s2ap("export", "--json", "--run", own_run)
    assert "export: already done" in again.err
    answer = again.answer
    assert answer["performance"]["load"]["pairs"] == 5
    assert {row["batch"] for row in answer["performance"]["inference"]} == {1, 32}
    assert s2ap("gate", "--min-robust", 0, "--rule", "point", "--max-drop", 1, "--run", own_run).code == 0


@pytest.mark.parametrize("sizes", [(44_685_822, 5_238_355), (102_144_064, 102_144_064), (2_000_000_000, 7)])
def test_a_plan_at_sixty_columns_loses_no_digit(monkeypatch, sizes) -> None:
    files = [
        SimpleNamespace(encoding=encoding, values=values, int8=int8, bytes=size)
        for encoding, size in zip(("dense", "elias-fano"), sizes, strict=True)
        for values, int8 in (("float32", False), ("float16", False), ("int8", False), ("int8", True))
    ]

    def file(encoding: str, values: str, *, int8: bool) -> SimpleNamespace:
        return next(
            each for each in files if (each.encoding, each.values, each.int8) == (encoding, values, int8)
        )

    stream = io.StringIO()
    Console(file=stream, width=60, force_terminal=True, color_system=None).print(
        tables._sizes(cast(Any, SimpleNamespace(files=files, file=file, dense_bytes=sizes[0])))
    )
    text = stream.getvalue()
    assert "…" not in text
    assert all(len(line) <= 60 for line in text.splitlines())
    digits = re.sub(r"[^\d,]", "", text.replace("float32", "").replace("float16", "").replace("int8", ""))
    assert all(digits.count(f"{size:,}") >= 1 for size in sizes if size < 10**9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latency_ratio": None}, "4.0 times smaller"),
        ({"latency_ratio": 0.5}, "4.0 times smaller; 2.00 times as fast, measured here"),
        (
            {"narrowed": SimpleNamespace(macs=SimpleNamespace(before=300, achieved=100))},
            "4.0 times smaller; 3.0 times fewer multiply-accumulates",
        ),
        (
            {"agreement": SimpleNamespace(n=100, argmax_agree=99)},
            "4.0 times smaller; another class on 1 test image",
        ),
    ],
)
def test_an_export_says_what_was_gained(changes, words) -> None:
    same = SimpleNamespace(n=100, argmax_agree=100)
    report = {"latency_ratio": None, "narrowed": None, "compaction": None, "agreement": same, **changes}
    assert tables._gain(cast(Any, SimpleNamespace(bytes=100, dense_bytes=400, **report))) == words
