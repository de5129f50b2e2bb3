"""A sweep as text: the Adversarial Pruning Benchmark's table, and every combination as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from s2ap_deploy import files
from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.sweeps.results import Group, Row, Setting, Spread, SweepReport

TABLE, CSV = "table.md", "sweep.csv"
ARROW = "→"
COLUMNS = (
    "method",
    "structure",
    "sparsity",
    f"clean: dense {ARROW} pruned",
    f"robust: dense {ARROW} pruned",
    "bytes",
    "seeds",
)
LEGEND = (
    "US: single weights, S: channels; sparsity is the share of zeros, measured. Accuracies are in percent; ± "
    "is the sample standard deviation over seeds, which a single seed does not have. Intervals of every run "
    "are in sweep.json."
)
_FACTS = (
    "name", "status", "method", "s2ap", "granularity", "budget", "seed", "sparsity_requested", "sparsity",
    "n",
    "clean_dense", "clean", "robust_dense", "robust", "robust_low", "robust_high", "bytes", "dense_bytes",
    "latency_ratio", "flags", "verdict", "dense_certificate_sha256", "certificate_sha256", "artifact_sha256",
    "run", "error",
)  # fmt: skip


def cells(group: Group) -> tuple[str, ...]:
    """The row of one group, a text for each of :data:`COLUMNS`."""
    return (
        method(group.setting),
        group.setting.structure,
        f"{100 * group.sparsity.mean:.2f} %",
        f"{percent(group.clean_dense)} {ARROW} {percent(group.clean)}",
        f"{percent(group.robust_dense)} {ARROW} {percent(group.robust)}",
        f"{group.bytes.mean:,.0f}",
        str(len(group.seeds)),
    )


def method(setting: Setting) -> str:
    """``hydra + S2AP, erk``: the base method, the plug-in, and how layers share."""
    base = setting.method + (" + S2AP" if setting.s2ap else "")
    return base if setting.budget is None else f"{base}, {setting.budget}"


def percent(spread: Spread) -> str:
    """``94.17 ± 0.21``, or the mean alone where there is no deviation."""
    mean = f"{100 * spread.mean:.2f}"
    return mean if spread.deviation is None else f"{mean} ± {100 * spread.deviation:.2f}"


def title(report: SweepReport) -> str:
    """What was swept, on which data, under which attack."""
    network = f", {report.arch}" if report.arch is not None else ""
    return f"{plain(report.recipe)}: {plain(report.data)}{network}, {report.threat}"


def notes(report: SweepReport) -> Iterator[str]:
    """What a reader of the table must know, the combinations that are not in it included."""
    if report.statement is not None:
        n = sorted({row.figures.robust.n for row in report.rows if row.figures is not None})
        images = " or ".join(map(str, n))
        yield f"robust is the {report.statement}, on {images} test images; formal_guarantee: false."
    yield LEGEND
    for row in report.rows:
        if row.status in ("failed", "skipped", "waiting"):
            reason = f": {plain(row.error)}" if row.error is not None else ""
            yield f"{row.name}: {'impossible' if row.status == 'skipped' else row.status}{reason}"


def markdown(report: SweepReport) -> str:
    """The table as a page of its own; equal figures give equal bytes, whatever happened on the way."""
    lines = [
        f"# {title(report)}",
        "",
        _row(COLUMNS),
        _row(("---", "---", "---:", "---:", "---:", "---:", "---:")),
    ]
    lines += [_row(cells(group)) for group in report.groups]
    lines += ["", *(f"* {note}" for note in notes(report)), ""]
    return "\n".join(lines)


def comma_separated(report: SweepReport) -> str:
    """One line per combination; shares between 0 and 1, hashes in hexadecimal, empty where nothing is."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _FACTS, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow(_facts(row))
    return text.getvalue()


def write(report: SweepReport, folder: Path) -> None:
    """Leave the table and the CSV file in the sweep's folder. Raises StorageError."""
    files.write_text(folder / TABLE, markdown(report))
    files.write_text(folder / CSV, comma_separated(report))


def _facts(row: Row) -> dict[str, object]:
    facts: dict[str, object] = {"name": row.name, "status": row.status, "seed": row.seed, "run": row.run}
    if row.error is not None:
        facts["error"] = plain(row.error)
    if row.setting is not None:
        setting = row.setting.model_dump(include={"method", "s2ap", "granularity", "budget"})
        facts |= {**setting, "sparsity_requested": row.setting.sparsity}
    if row.figures is not None:
        shown = row.figures
        facts |= shown.model_dump(
            include={
                "sparsity",
                "bytes",
                "dense_bytes",
                "latency_ratio",
                "verdict",
                "dense_certificate_sha256",
            }
        )
        facts |= {"certificate_sha256": shown.certificate_sha256, "artifact_sha256": shown.artifact_sha256}
        for name in ("clean_dense", "clean", "robust_dense", "robust"):
            facts[name] = getattr(shown, name).value
        low, high = shown.robust.interval
        facts |= {"n": shown.robust.n, "robust_low": low, "robust_high": high, "flags": " ".join(shown.flags)}
    return facts


def _row(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
