"""Robust accuracy against what a file costs, as a picture. No torch; matplotlib draws without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.reporting import sweep_report
from s2ap_deploy.sweeps.results import Group, SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

FILE = "pareto.png"
# Okabe and Ito's colors, which color-blind readers tell apart too; the shape says the same again.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#7E4A8C", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DENSE = "#666666"
# Where the words of a point may stand, in points away from it; the first place that is free is taken.
_PLACES = (
    (6, 4, "left"), (6, -11, "left"), (-6, 4, "right"), (-6, -11, "right"),
    (0, 8, "center"), (0, -15, "center"), (14, -3, "left"), (-14, -3, "right"),
)  # fmt: skip
_SAME = 30.0  # points nearer than this, in points of 1/72 inch, share the words that they have in common
_MARKER = 4.0
# The largest size over the smallest: below the first, even steps are legible; from the second on, decades.
_FEW_TIMES, _MANY_TIMES = 4.0, 100.0


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
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
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
    times = max(each.cost for each in size) / max(1.0, min(each.cost for each in size))
    steps = LogLocator(subs=(1.0, 2.0, 5.0) if times < _MANY_TIMES else (1.0,))
    axes[0].xaxis.set_major_locator(MaxNLocator(4) if times < _FEW_TIMES else steps)
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
    figure.suptitle(sweep_report.title(report).replace("$", r"\$"), fontsize=10)
    figure.draw_without_rendering()  # the layout decides where points lie on the picture
    for panel, shown in zip(axes, (size, time), strict=False):
        _write(panel, shown, styles)
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
        label=sweep_report.method(group.setting) + structure,
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
            color=_COLORS[style % len(_COLORS)],
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
    axes.margins(x=0.12, y=0.12)
    axes.grid(True, linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _write(axes: Axes, points: Sequence[Point], styles: dict[str, int]) -> None:
    """The notes beside their points, once where neighbors share one, and none over another or a marker."""
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72
    places = {id(point): axes.transData.transform((point.cost, 100 * point.robust)) for point in points}
    half = _MARKER * scale
    taken = [Bbox([[x - half, y - half], [x + half, y + half]]) for x, y in places.values()]
    for note in dict.fromkeys(point.note for point in points):
        left = [point for point in points if point.note == note]
        while left:
            x, y = places[id(left[0])]
            near = [p for p in left if math.dist(places[id(p)], (x, y)) < _SAME * scale]
            left = [point for point in left if point not in near]
            own = {styles[point.label] for point in near}
            color = _COLORS[own.pop() % len(_COLORS)] if len(own) == 1 else _DENSE
            taken.append(_place(axes, near, color, taken))


def _place(axes: Axes, near: Sequence[Point], color: str, taken: Sequence[Bbox]) -> Bbox:
    """Write the note of ``near`` where it covers least of what is ``taken``; returns its box."""
    found: list[tuple[float, Any, Bbox]] = []
    for point in near:
        for x, y, side in _PLACES:
            text = axes.annotate(
                point.note, (point.cost, 100 * point.robust), xytext=(x, y), textcoords="offset points",
                ha=side, fontsize=7, color=color, in_layout=False,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = _shared(box, axes.bbox)
            found.append(
                (sum(_shared(box, each) for each in taken) + box.width * box.height - inside, text, box)
            )
    least = min(range(len(found)), key=lambda index: found[index][0])
    for index, (_, text, _) in enumerate(found):
        if index != least:
            text.remove()
    return found[least][2]


def _shared(one: Bbox, other: Bbox) -> float:
    """The area that two boxes have in common, in pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, float(width)) * max(0.0, float(height))
