"""Results of commands as tables on stdout."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2ap_deploy.cli.terminal import COLORS, SYMBOLS, WORDS
from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.formatting import counted, duration, mebibytes, percent
from s2ap_deploy.spec import WeightCount

if TYPE_CHECKING:
    from s2ap_deploy.onnx_export.decoding import Decoded
    from s2ap_deploy.onnx_export.export_report import (
        BudgetCheck,
        CLibrary,
        DeviceFile,
        ExportReport,
        PairedTimes,
        PeakMemory,
        Performance,
    )
    from s2ap_deploy.planning.dry_run import DryRunReport, SweepDryRunReport
    from s2ap_deploy.stages.plan import Plan
    from s2ap_deploy.stages.results import Trained
    from s2ap_deploy.sweeps.aggregate import SweepReport

LOG_WIDTH = 200


def console() -> Console:
    """Return a console as wide as the terminal; in a log every sentence stays on one line."""
    if sys.stdout is not None and sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=LOG_WIDTH, soft_wrap=True)


def show_summary(summary: Mapping[str, Any]) -> None:
    """Print dense and pruned side by side, then the verdict."""
    out = console()
    roles = [role for role in ("dense", "pruned") if role in summary]
    if roles:
        table = Table(title=f"{summary[roles[0]]['arch']}, {summary['threat']}", title_justify="left")
        table.add_column("")
        for role in roles:
            table.add_column(role, justify="right")
        rows = [summary[role] for role in roles]
        table.add_row("sparsity", *(percent(row["sparsity"], 2) for row in rows))
        table.add_row("clean accuracy", *(_share(row["clean"]) for row in rows))
        table.add_row("robust accuracy ¹", *(_share(row["robust"]) for row in rows))
        if any("proven" in row for row in rows):
            table.add_row(
                "provably robust ²", *(_share(row["proven"]) if "proven" in row else "" for row in rows)
            )
        table.add_row("test images", *(f"{row['n']:,}" for row in rows))
        if all("bytes" in row for row in rows):
            table.add_row("ONNX bytes", *(f"{row['bytes']:,}" for row in rows))
        if any(row["flags"] for row in rows):
            table.add_row("flags", *(", ".join(row["flags"]) or "none" for row in rows))
        out.print(table)
        out.print(Text(f"¹ {summary['statement']}; intervals are exact (95%, Clopper-Pearson)", style="dim"))
        if any("proven" in row for row in rows):
            out.print(
                Text(
                    "² provably robust accuracy (lower bound): a guarantee, by linear relaxation", style="dim"
                )
            )
    if "export" in summary:
        ratio = summary["export"]["latency_ratio"]
        measured = f" (measured: {ratio:.2f} of the dense file's time)" if ratio is not None else ""
        out.print(Text(f"{summary['export']['statement']}{measured}", style="dim"))
        for file in summary.get("further_files", ()):
            out.print(Text(f"also {file['file']}: {file['bytes']:,} bytes", style="dim"))
    if "gate" in summary:
        _verdict(out, summary["gate"])


def show_trained(trained: Trained) -> None:
    """Print the dense network beside the pruned one, and what the accuracies are worth."""
    out = console()
    head, *rows = trained.rows
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print(Text(trained.measured, style="dim"))
    for warning in trained.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"))


def _c_library(library: CLibrary) -> str:
    """Describe what was written, and how far it was verified."""
    size = f"{library.bytes:,} bytes in {library.folder}/, {library.workspace_bytes:,} of working memory; "
    if library.flash_bytes is not None:
        size = f"{library.flash_bytes:,} bytes of flash, {library.ram_bytes or 0:,} of RAM; "
    if library.agreement is None:
        return f"{size}no compiler was found, so nothing was built or judged"
    difference = library.agreement.max_logit_difference
    words = (
        f"{size}built with {library.compiler}, logits differ from ONNX Runtime's by at most {difference:.1e}"
    )
    if library.times is None:
        return words
    times = library.times
    return f"{words}; {times.p50_ms:.3g} ms, {1 / times.ratio:.2f} times as fast as the ONNX file"


def _device(device: DeviceFile) -> str:
    """Describe the files of another runtime, and how far they were verified."""
    versions = ", ".join(f"{name} {version}" for name, version in device.versions.items())
    size = f"{device.bytes:,} bytes in {device.folder}/, by {versions}; "
    if device.agreement is None:
        return f"{size}it does not predict on this system, so nothing was judged"
    agreed = device.agreement
    words = f"{size}computed in {device.precision}, logits differ from ONNX Runtime's by at most "
    words += (
        f"{agreed.max_logit_difference:.1e} and the class stays on {agreed.argmax_agree} of {agreed.n} images"
    )
    judged = (f"; {each.survived} of {each.n} points correct under attack" for each in device.points_checks)
    return words + "".join(judged)


def _gain(report: ExportReport) -> str:
    """Say what the file gains over the dense float32 file: bytes, time, arithmetic, and what it changes."""
    gained = [f"{report.dense_bytes / report.bytes:.1f} times smaller"]
    ratio = report.latency_ratio
    if ratio:
        gained.append(f"{1 / ratio:.2f} times as fast, measured here")
    macs = report.narrowed.macs if report.narrowed is not None else None
    if macs is not None:
        gained.append(f"{macs.before / max(macs.achieved, 1):.1f} times fewer multiply-accumulates")
    elif report.compaction is not None and report.compaction.removed:
        before, after = report.compaction.macs_before, report.compaction.macs_after
        gained.append(f"{before / max(after, 1):.1f} times fewer multiply-accumulates")
    agreement = report.agreement
    if agreement.argmax_agree < agreement.n:
        gained.append(f"another class on {counted(agreement.n - agreement.argmax_agree, 'test image')}")
    return "; ".join(gained)


def show_export(report: ExportReport) -> None:
    """Print sizes, checks and limits of the file."""
    out = console()
    table = facts()
    table.add_row("file", f"{report.bytes:,} bytes; the dense float32 file has {report.dense_bytes:,}")
    table.add_row("gained", _gain(report))
    table.add_row(
        "weights", f"{report.nonzeros:,} of {report.weights:,} are not zero ({report.sparsity:.2%} sparse)"
    )
    if report.compaction is not None and report.compaction.removed:
        removal = report.compaction
        table.add_row(
            "channels",
            f"{removal.removed:,} of {removal.channels_before:,} have no effect and are removed; "
            f"{removal.macs_after / max(removal.macs_before, 1):.1%} of the multiply-accumulates are left",
        )
    if report.narrowed is not None:
        table.add_row("layers", report.narrowed.summary)
        for weight in report.narrowed.skipped:
            table.add_row("not narrowed", Text(f"{weight.name}: {weight.reason}"))
        for file in report.narrowed.files:
            table.add_row("for PyTorch", f"{file.name}, SHA-256 {file.sha256}")
    table.add_row("stored as", _storage(report))
    if report.c_library is not None:
        table.add_row("C library", _c_library(report.c_library))
    if report.device is not None:
        table.add_row("converted", _device(report.device))
    if report.batch is not None:
        table.add_row("batch", f"fixed: the file takes {report.batch} images at a time")
    if report.rounding is not None:
        rounding = report.rounding
        table.add_row(
            "rounded",
            f"{rounding.tensors} weights to {rounding.kind}, by at most "
            f"{rounding.max_weight_difference:.1e}; {rounding.flushed:,} values became zero; the class stays "
            f"on {report.agreement.argmax_agree} of {report.agreement.n} images",
        )
    agreement = report.agreement
    table.add_row(
        "logits",
        f"differ from PyTorch's by at most {agreement.max_logit_difference:.1e} on {agreement.n} test images",
    )
    for points in report.points_checks:
        table.add_row(
            "certificate",
            f"the file itself judged {points.n} points: {points.clean_correct} correct when clean, "
            f"{points.survived} correct under attack",
        )
    if report.predicted is not None:
        expected = report.predicted.bytes
        dead = report.compaction is not None and report.compaction.removed and report.narrowed is None
        words = "; dead channels are not predicted" if dead else ""
        share = expected / report.bytes
        table.add_row("predicted", f"{expected:,} bytes by shapes alone: {share:.1%} of the file{words}")
    if report.target is not None:
        table.add_row("target", Text(report.target.name))
    for check in report.budgets:
        table.add_row("budget", f"{check.what}: at most {check.asked:,}, found {check.found:,.10g}")
    if report.quantization is not None:
        table.add_row("int8", f"{report.quantization.scheme}; {int8_words(report.quantization.instructions)}")
    table.add_row("SHA-256", report.sha256)
    out.print(table)
    if report.performance is not None:
        out.print(performance_table(report.performance))
        out.print(Text(report.performance.statement, style="dim"))
    for warning in report.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"))
    out.print(Text(report.statement, style="dim"))


def performance_table(performance: Performance) -> Table:
    """Return a row per number of threads and images, one for loading, two for memory."""
    table = Table(
        title="file against its dense counterpart", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("")
    for heading in ("p50", "p95", "dense p50", "dense p95", "ratio [quartiles]", "pairs"):
        # Text, since Rich would take words in brackets for a style.
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in performance.inference:
        words = f"{counted(row.batch, 'image')}, {counted(row.threads, 'thread')}"
        table.add_row(words, *_times(row.times))
    table.add_row("load", *_times(performance.load))
    if performance.memory is not None:
        for words, mine, theirs in _peaks(performance.memory):
            ratio = f"{mine / theirs:.2f}" if theirs else ""
            table.add_row(
                words, mebibytes(mine), "", mebibytes(theirs), "", ratio, str(performance.memory.processes)
            )
    return table


def int8_words(instructions: Sequence[str] | None) -> str:
    """State whether the processor has instructions for int8."""
    if instructions is None:
        return "whether the processor has instructions for int8 is not known"
    vnni = [each for each in instructions if "vnni" in each]
    if vnni:
        return f"the processor has VNNI ({', '.join(vnni)})"
    if instructions:
        return f"the processor has instructions for int8 ({', '.join(instructions)})"
    return "the processor has no VNNI or similar instructions: int8 gains less than on others"


def _times(times: PairedTimes) -> tuple[str | Text, ...]:
    return (
        *(f"{each:,.3g} ms" for each in (times.p50_ms, times.p95_ms, times.dense_p50_ms, times.dense_p95_ms)),
        Text(f"{times.ratio:.2f} [{times.ratio_q1:.2f}, {times.ratio_q3:.2f}]"),
        str(times.pairs),
    )


def _peaks(memory: PeakMemory) -> tuple[tuple[str, int, int], ...]:
    return (
        ("peak memory, load", memory.load_bytes, memory.dense_load_bytes),
        (f"peak memory, {counted(memory.batch, 'image')}", memory.run_bytes, memory.dense_run_bytes),
    )


def show_sweep(report: SweepReport) -> None:
    """Print the Adversarial Pruning Benchmark's table and its notes."""
    from s2ap_deploy.reporting import sweep_report

    out = console()
    table = Table(
        title=Text(sweep_report.title(report)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, name in enumerate(sweep_report.COLUMNS):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    for row in sweep_report.rows(report):
        table.add_row(*map(Text, row))
    out.print(table)
    for note in sweep_report.notes(report):
        out.print(Text(note, style="dim"))


def show_decoded(decoded: Decoded) -> None:
    """Print what ``decode`` wrote and how it was checked."""
    out = console()
    table = facts()
    table.add_row("file", f"{decoded.bytes:,} bytes, made from {decoded.source_bytes:,}")
    if decoded.tensors:
        table.add_row(
            "weights",
            f"{decoded.tensors} were encoded ({decoded.nonzeros:,} of {decoded.entries:,} not zero); "
            "ONNX Runtime and ONNX's reference evaluator decode them to the same bits",
        )
    else:
        table.add_row("weights", "none was encoded: the file is unchanged")
    table.add_row("logits", f"differ from the sparse file's by at most {decoded.max_logit_difference:.1e}")
    table.add_row("SHA-256", decoded.sha256)
    out.print(table)


def show_checkpoint(description: Mapping[str, Any], asked: str | None = None) -> None:
    """Print what ``inspect`` found; ``asked`` is the architecture of ``--arch``."""
    out = console()
    table = facts()
    table.add_row("file", Text(description["file"]))
    table.add_row("SHA-256", description["sha256"])
    table.add_row(
        "format",
        description["format"] + (f", under {description['wrapper']!r}" if description["wrapper"] else ""),
    )
    if description.get("layout"):
        table.add_row("pruned by", str(description["layout"]))
    if named := description.get("benchmark"):
        keys = ("method", "arch", "data", "structure")
        words = [*(named[key] for key in keys), f"{named['sparsity']:.0%}"]
        table.add_row("benchmark", Text(", ".join(words)))
    twins = any(near["exact"] for near in description["closest"])
    missing = "none in the registry fits" if asked is None else f"{asked} does not fit"
    missing = "several fit by names and shapes: see the warning below" if twins else missing
    table.add_row("architecture", Text(description["architecture"] or missing))
    if description["num_classes"] is not None:
        table.add_row("classes", str(description["num_classes"]))
    table.add_row("parameters", f"{description['parameters']:,}")
    if description["prunable_weights"]:
        table.add_row(
            "sparsity",
            f"{description['sparsity']:.2%}: {description['zeros']:,} zeros of "
            f"{description['prunable_weights']:,} ({description['denominator']})",
        )
    if description.get("weights"):
        table.add_row("weights", Text(WeightCount.model_validate(description["weights"]).text))
    info = description["info"] or {}
    for key in ("data", "threat", "stage"):
        if info.get(key):
            value = info[key]
            table.add_row(key, f"{value['norm']} eps {value['eps']}" if key == "threat" else str(value))
    out.print(table)
    for near in () if twins else description["closest"]:
        out.print(Text(f"closest: {near['architecture']}: {near['differs']}"))
    layers = Table("layer", "shape", title="prunable weights", title_justify="left")
    layers.add_column("weights", justify="right")
    layers.add_column("zeros", justify="right")
    for layer in description["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        layers.add_row(
            layer["name"], shape, f"{layer['weights']:,}", f"{layer['zeros'] / max(layer['weights'], 1):.1%}"
        )
    out.print(layers)
    for note in description["notes"]:
        out.print(Text(f"note: {note}"))
    for warning in description["warnings"]:
        out.print(Text(f"warning: {warning}", style="yellow"))


def _storage(report: ExportReport) -> str:
    """Count the weights per encoding, and those with too few zeros for any."""
    counts = Counter(row.encoding for row in report.tensors if len(row.shape) > 1)
    words = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no weight to encode"
    left = report.left_dense
    return f"{words}; {len(left)} have too few zeros to gain anything and stay dense" if left else words


def facts() -> Table:
    """Return a table of names and values; long values are folded, never cut off."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _verdict(out: Console, verdict: Mapping[str, Any]) -> None:
    for check in verdict["checks"]:
        status = check["status"]
        out.print(Text.assemble((f"{SYMBOLS[status]} ", COLORS[status]), check["message"]))
    status = verdict["status"]
    out.print(f"gate: [bold {COLORS[status]}]{WORDS[status]}[/]")


def _share(share: Mapping[str, Any]) -> str:
    if "value" not in share:  # the attack stopped when the verdict was decided
        return f"{percent(share['low'])} to {percent(share['high'])}, undecided"
    low, high = share["interval"]
    return f"{percent(share['value'])} [{percent(low)}, {percent(high)}]"


STATES = {"done": "green", "to do": "", "to continue": "yellow", "to repeat": "yellow", "refused": "red"}
STATEMENT = (
    "times are estimates from a few steps of each kind on this machine, at its current load; attacks are "
    "estimated as if every image were robust"
)
WHAT = {"bytes": "bytes", "macs": "multiply-accumulates", "latency_ms": "milliseconds"}


def show_plan(plan: Plan) -> None:
    """Print facts, a table of bytes, budgets and the plan's limits."""
    out = console()
    out.print(_facts(plan))
    out.print(_sizes(plan))
    for check in plan.budgets:
        out.print(budget(check))
    if plan.target is not None:
        stored = _form(plan.chosen.values, plan.chosen.int8)
        out.print(Text(f"for {plan.target.name}: {plan.chosen.encoding}, {stored}"))
    if plan.converted_bytes is not None:
        out.print(Text(f"converted for its runtime: about {plan.converted_bytes:,} bytes"))
    for note in plan.notes:
        out.print(Text(f"note: {note}"))


def _sizes(plan: Plan) -> Table:
    """Return a row of bytes per encoding; a row stands for all that give the same sizes."""
    words = (
        f"bytes of the ONNX file, predicted ({plan.dense_bytes:,} dense); auto and smallest choose per tensor"
    )
    table = Table(
        title=words, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("encoding", overflow="fold")
    forms = list(dict.fromkeys((each.values, each.int8) for each in plan.files))
    for values, int8 in forms:
        table.add_column(_form(values, int8), justify="right", overflow="fold")
    names: dict[tuple[int, ...], list[str]] = {}
    for encoding in dict.fromkeys(each.encoding for each in plan.files):
        sizes = tuple(plan.file(encoding, values, int8=int8).bytes for values, int8 in forms)
        names.setdefault(sizes, []).append(CODECS[encoding].title if encoding in CODECS else encoding)
    for sizes, titles in names.items():
        cells = (f"{size:,} ({plan.dense_bytes / size:.1f}x)" for size in sizes)
        table.add_row(", ".join(titles) if len(names) > 1 else "any", *cells)
    return table


def budget(check: BudgetCheck) -> Text:
    """Format one limit and whether it is met."""
    what = WHAT[check.what]
    if check.found is None:
        status, words = "inconclusive", "measured when it is exported"
    else:
        status, words = "pass" if check.holds else "fail", f"{check.found:,.10g} predicted"
    return Text.assemble((f"{SYMBOLS[status]} ", COLORS[status]), f"{what}: at most {check.asked:,}, {words}")


def _facts(plan: Plan) -> Table:
    table = facts()
    size = "x".join(map(str, plan.input_size))
    table.add_row("network", Text(f"{plan.network} on {size} images"))
    shared = f", {plan.budget} budget" if plan.budget is not None else ""
    table.add_row("pruning", Text(f"by {plan.granularity}{shared}"))
    table.add_row(
        "weights",
        f"{plan.nonzeros:,} of {plan.weights:,} are kept ({percent(plan.sparsity, 2)} sparse)",
    )
    if plan.count is not None:
        table.add_row("counted", Text(plan.count.text))
    table.add_row("parameters", _change(plan.parameters_before, plan.parameters_after))
    table.add_row("multiply-accumulates", _change(plan.macs_before, plan.macs_after))
    table.add_row("speed-up", f"[bold]{plan.speed}[/]: {plan.speed_words}")
    return table


def _change(before: int, after: int) -> str:
    if after == before:
        return f"{before:,}"
    return f"{before:,} → {after:,} ({before / max(after, 1):.2f} times fewer)"


def _form(values: str, int8: bool) -> str:
    return "int8 arithmetic" if int8 else "int8 values" if values == "int8" else values


def show_dry_run(report: SweepDryRunReport, *, as_json: bool) -> None:
    """Print what a sweep would do, one line per combination."""
    if as_json:
        click.echo(report.model_dump_json())
        return
    out = console()
    table = Table(
        title=Text(f"sweep in {report.run}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name, justify in (
        ("", "left"),
        ("done", "left"),
        ("to do", "left"),
        ("time", "right"),
        ("bytes", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for each in (*report.shared, *report.combinations):
        done = [stage.name for stage in each.stages if stage.state == "done"]
        due = [stage.name for stage in each.stages if stage.state != "done"]
        size = f"{each.bytes:,}" if each.bytes is not None else ""
        time = "unknown" if each.untimed else f"~ {duration(each.seconds)}"
        table.add_row(Text(each.name), ", ".join(done), ", ".join(due), time, size)
    out.print(table)
    for name, reason in report.skipped.items():
        out.print(Text(f"{name} is impossible and skipped: {reason}", style="yellow"))
    for note in dict.fromkeys(note for each in (*report.shared, *report.combinations) for note in each.notes):
        out.print(Text(f"note: {note}"))
    untimed = {name for each in (*report.shared, *report.combinations) for name in each.untimed}
    _conclude(out, report.seconds, sorted(untimed))


def show_run(report: DryRunReport, *, as_json: bool) -> None:
    """Print the planned stages of a run, one line each."""
    if as_json:
        click.echo(report.model_dump_json())
        return
    out = console()
    table = Table(
        title=Text(f"{report.name} in {report.run}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, justify in (("stage", "left"), ("", "left"), ("what", "left"), ("time", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for stage in report.stages:
        words = "" if stage.seconds is None else f"{'<' if stage.at_most else '~'} {duration(stage.seconds)}"
        table.add_row(stage.name, Text(stage.state, style=STATES[stage.state]), Text(stage.words), words)
    out.print(table)
    if report.bytes is not None and report.dense_bytes is not None:
        out.print(
            f"exported file: about {report.bytes:,} bytes, predicted from shapes "
            f"({report.dense_bytes:,} dense)"
        )
    for note in report.notes:
        out.print(Text(f"note: {note}"))
    _conclude(out, report.seconds, report.untimed)


def _conclude(out: Console, seconds: float, untimed: Sequence[str]) -> None:
    if untimed:
        rest = f"; about {duration(seconds)} for the rest" if seconds else ""
        out.print(f"how long {', '.join(untimed)} would take is unknown{rest}")
    else:
        out.print(f"about {duration(seconds)} in all")
    if seconds:
        out.print(Text(STATEMENT, style="dim"))
    out.print(Text("nothing was written", style="dim"))
