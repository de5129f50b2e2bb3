"""What a person sees when a command is done: tables, on stdout."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2ap_deploy.cli.bench_table import int8_words, performance_table

if TYPE_CHECKING:
    from s2ap_deploy.gating.policy import Verdict
    from s2ap_deploy.onnx_export.decoding import Decoded
    from s2ap_deploy.onnx_export.export_report import ExportReport

COLORS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
WORDS = {"pass": "PASSED", "fail": "FAILED", "inconclusive": "INCONCLUSIVE"}


LOG_WIDTH = 200


def _console() -> Console:
    """Fitted to a terminal; a log keeps every sentence in one line."""
    if sys.stdout is not None and sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=LOG_WIDTH, soft_wrap=True)


def show_summary(summary: Mapping[str, Any]) -> None:
    """Dense against pruned, then the verdict."""
    console = _console()
    roles = [role for role in ("dense", "pruned") if role in summary]
    if roles:
        table = Table(title=f"{summary[roles[0]]['arch']}, {summary['threat']}", title_justify="left")
        table.add_column("")
        for role in roles:
            table.add_column(role, justify="right")
        rows = [summary[role] for role in roles]
        table.add_row("sparsity", *(f"{row['sparsity']:.2%}" for row in rows))
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
        console.print(table)
        console.print(
            Text(f"¹ {summary['statement']}; intervals are exact (95 %, Clopper-Pearson)", style="dim")
        )
        if any("proven" in row for row in rows):
            console.print(
                Text(
                    "² provably robust accuracy (lower bound): a guarantee, by linear relaxation", style="dim"
                )
            )
    if "export" in summary:
        ratio = summary["export"]["latency_ratio"]
        measured = f" (measured: {ratio:.2f} of the dense file's time)" if ratio is not None else ""
        console.print(Text(f"{summary['export']['statement']}{measured}", style="dim"))
    if "gate" in summary:
        _verdict(console, summary["gate"])


def show_verdict(verdict: Verdict) -> None:
    """Every check with its answer, then the answer of all."""
    _verdict(_console(), verdict.model_dump())


def show_export(report: ExportReport) -> None:
    """Sizes, what was checked, and what a reader may wrongly expect."""
    console = _console()
    table = _facts()
    factor = report.dense_bytes / report.bytes
    table.add_row(
        "file", f"{report.bytes:,} bytes, {factor:.1f} times smaller than dense ({report.dense_bytes:,})"
    )
    table.add_row(
        "weights", f"{report.nonzeros:,} of {report.weights:,} are not zero ({report.sparsity:.2%} sparse)"
    )
    if report.compaction is not None and report.compaction.removed:
        removal = report.compaction
        table.add_row(
            "channels",
            f"{removal.removed:,} of {removal.channels_before:,} cannot matter and are left out; "
            f"{removal.macs_after / max(removal.macs_before, 1):.1%} of the multiply-accumulates are left",
        )
    if report.narrowed is not None:
        table.add_row("layers", report.narrowed.summary)
        for weight in report.narrowed.skipped:
            table.add_row("not narrowed", Text(f"{weight.name}: {weight.reason}"))
        for file in report.narrowed.files:
            table.add_row("for PyTorch", f"{file.name}, SHA-256 {file.sha256}")
    table.add_row("stored as", _storage(report))
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
            f"the file itself judged {points.n} points: {points.clean_correct} right clean, "
            f"{points.survived} right under attack",
        )
    if report.predicted is not None:
        expected = report.predicted.bytes
        dead = report.compaction is not None and report.compaction.removed and report.narrowed is None
        words = "; channels that turn out dead are not foreseen" if dead else ""
        share = expected / report.bytes
        table.add_row("predicted", f"{expected:,} bytes by shapes alone: {share:.1%} of the file{words}")
    if report.target is not None:
        table.add_row("target", Text(report.target.name))
    for check in report.budgets:
        table.add_row("budget", f"{check.what}: at most {check.asked:,}, found {check.found:,.10g}")
    if report.quantization is not None:
        table.add_row("int8", f"{report.quantization.scheme}; {int8_words(report.quantization.instructions)}")
    table.add_row("SHA-256", report.sha256)
    console.print(table)
    if report.performance is not None:
        console.print(performance_table(report.performance))
        console.print(Text(report.performance.statement, style="dim"))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    ratio = (
        f" (measured: {report.latency_ratio:.2f} of the dense file's time)" if report.latency_ratio else ""
    )
    console.print(Text(f"{report.statement}{ratio}", style="dim"))


def show_decoded(decoded: Decoded) -> None:
    """What ``decode`` wrote and how it was checked."""
    console = _console()
    table = _facts()
    table.add_row("file", f"{decoded.bytes:,} bytes, made from {decoded.source_bytes:,}")
    if decoded.tensors:
        table.add_row(
            "weights",
            f"{decoded.tensors} were coded ({decoded.nonzeros:,} of {decoded.entries:,} not zero); "
            "ONNX Runtime and ONNX's reference evaluator decode them to the same bits",
        )
    else:
        table.add_row("weights", "none was coded: the file is as it was")
    table.add_row("logits", f"differ from the sparse file's by at most {decoded.max_logit_difference:.1e}")
    table.add_row("SHA-256", decoded.sha256)
    console.print(table)


def show_checkpoint(description: Mapping[str, Any], asked: str | None = None) -> None:
    """What ``inspect`` found; ``asked`` is the architecture that it was told."""
    console = _console()
    table = _facts()
    table.add_row("file", Text(description["file"]))
    table.add_row("SHA-256", description["sha256"])
    table.add_row(
        "format",
        description["format"] + (f", under {description['wrapper']!r}" if description["wrapper"] else ""),
    )
    if description.get("layout"):
        table.add_row("pruned by", str(description["layout"]))
    missing = "none of the registry fits" if asked is None else f"{asked} does not fit"
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
    info = description["info"] or {}
    for key in ("data", "threat", "stage"):
        if info.get(key):
            value = info[key]
            table.add_row(key, f"{value['norm']} eps {value['eps']}" if key == "threat" else str(value))
    console.print(table)
    for near in description["closest"]:
        console.print(Text(f"closest: {near['architecture']}: {near['differs']}"))
    layers = Table("layer", "shape", title="prunable weights", title_justify="left")
    layers.add_column("weights", justify="right")
    layers.add_column("zeros", justify="right")
    for layer in description["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        layers.add_row(
            layer["name"], shape, f"{layer['weights']:,}", f"{layer['zeros'] / max(layer['weights'], 1):.1%}"
        )
    console.print(layers)
    for note in description["notes"]:
        console.print(Text(f"note: {note}"))
    for warning in description["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _storage(report: ExportReport) -> str:
    """How many weights have which form, and which of them have too few zeros for any."""
    counts = Counter(row.encoding for row in report.tensors if len(row.shape) > 1)
    words = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no weight to code"
    left = report.left_dense
    return f"{words}; {len(left)} have too few zeros to gain anything and stay dense" if left else words


def _facts() -> Table:
    """A table of names and values; long values are folded, never cut off."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _verdict(console: Console, verdict: Mapping[str, Any]) -> None:
    for check in verdict["checks"]:
        status = check["status"]
        console.print(Text.assemble((f"{SIGNS[status]} ", COLORS[status]), check["words"]))
    status = verdict["status"]
    console.print(f"gate: [bold {COLORS[status]}]{WORDS[status]}[/]")


def _share(share: Mapping[str, Any]) -> str:
    if "value" not in share:  # the attack stopped when the verdict was decided
        return f"{share['low']:.1%} to {share['high']:.1%}, undecided"
    low, high = share["interval"]
    return f"{share['value']:.1%} [{low:.1%}, {high:.1%}]"
