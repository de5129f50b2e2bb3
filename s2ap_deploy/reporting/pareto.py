"""Robust accuracy against what a file costs, as a picture. No torch; matplotlib draws without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.pipeline.sweeps.figures import Group, SweepReport
from s2ap_deploy.reporting import sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "pareto.png"
# Okabe and Ito's colours, which colour-blind readers tell apart too; the shape says the same again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#7E4A8C", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DENSE = "#666666"
# Where the words of a point stand: methods with like figures do not write over each other.
_CORNERS = ((6, 4, "left"), (6, -11, "left"), (-6, 4, "right"), (-6, -11, "right"))


@dataclass(frozen=True)
class Point:
    """One group: its ``cost`` (bytes, or a ratio of times), its mean robust accuracy and its deviation."""

    label: str
    note: str
    cost: float
    robust: float
    deviation: float | None


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in one figure without losing in the other, by rising cost.

    Of equal points one is enough.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, -each.robust)):
        if not best or point.robust > best[-1].robust:
            best.append(point)
    return best


def draw_pareto(report: SweepReport, folder: Path) -> Path | None:
    """Draw the groups of a sweep into ``pareto.png``; None where nothing has finished yet.

    The left panel has bytes of the exported file, the right one its time over that of its dense twin, and the
    right one is left out where no time was measured. Raises UsageError without matplotlib, StorageError.
    """
    if not report.groups:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise UsageError("drawing a sweep needs matplotlib", hint="pip install matplotlib") from None

    size = [_point(group, group.bytes.mean) for group in report.groups]
    time = [
        _point(group, group.latency_ratio.mean) for group in report.groups if group.latency_ratio is not None
    ]
    panels = 2 if time else 1
    figure = Figure(figsize=(5.4 * panels, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    styles = {label: number for number, label in enumerate(dict.fromkeys(point.label for point in size))}
    _draw(axes[0], size, styles)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes[0].xaxis.set_minor_formatter(lambda value, _: "")
    axes[0].set_xlabel("size of the exported ONNX file")
    dense = [group.robust_dense.mean for group in report.groups]
    for panel in axes:
        panel.axhline(
            100 * sum(dense) / len(dense), color=_DENSE, linewidth=0.9, linestyle=(0, (4, 3)),
            label="dense network", zorder=0,
        )  # fmt: skip
    if time:
        _draw(axes[1], time, styles)
        axes[1].axvline(1.0, color=_DENSE, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes[1].set_xlabel("time over the dense file's (1: no faster)")
    axes[0].set_ylabel("robust accuracy (%, upper bound)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8
    )
    figure.suptitle(sweep.title(report).replace("$", r"\$"), fontsize=10)
    picture = io.BytesIO()
    # Without the version of matplotlib, so that equal figures give equal bytes.
    figure.savefig(picture, format="png", metadata={"Software": None})
    path = folder / FILE
    files.write_bytes(path, picture.getvalue())
    return path


def _point(group: Group, cost: float) -> Point:
    """The group as a point; what its label does not say is written beside it."""
    structure = "" if group.setting.granularity == "weight" else f", {group.setting.structure}"
    return Point(
        label=sweep.method(group.setting) + structure,
        note=f"{100 * group.sparsity.mean:.3g} %",
        cost=cost,
        robust=group.robust.mean,
        deviation=group.robust.deviation,
    )


def _draw(axes: Axes, points: Sequence[Point], styles: dict[str, int]) -> None:
    for label, style in styles.items():
        own = [point for point in points if point.label == label]
        axes.errorbar(
            [point.cost for point in own],
            [100 * point.robust for point in own],
            yerr=[100 * (point.deviation or 0.0) for point in own],
            fmt=_MARKERS[style % len(_MARKERS)],
            color=_COLOURS[style % len(_COLOURS)],
            markersize=6,
            alpha=0.85,
            elinewidth=1.0,
            capsize=2.5,
            label=label,
        )
    best = front(points)
    axes.plot(
        [point.cost for point in best],
        [100 * point.robust for point in best],
        color=_DENSE, linewidth=1.0, drawstyle="steps-post", zorder=0, label="not beaten",
    )  # fmt: skip
    for point in points:
        x, y, side = _CORNERS[styles[point.label] % len(_CORNERS)]
        axes.annotate(
            point.note, (point.cost, 100 * point.robust), xytext=(x, y), textcoords="offset points",
            ha=side, fontsize=7, color=_COLOURS[styles[point.label] % len(_COLOURS)],
        )  # fmt: skip
    axes.margins(x=0.12, y=0.12)
    axes.grid(True, linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
