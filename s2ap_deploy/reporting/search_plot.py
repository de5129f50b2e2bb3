"""The course of a mask search as one picture. No torch; matplotlib draws without a display."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ap_deploy import files
from s2ap_deploy.errors import InputError
from s2ap_deploy.runs.folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Row = Mapping[str, float | None]

# Okabe and Ito's colors, which color-blind readers tell apart too.
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#7E4A8C", "#666666"
WIDTH = 9.0  # inches
PANEL_HEIGHT = 2.6
BAR_HEIGHT = 0.19
LONGEST_NAME = 40
MOST_DOTS = 40


@dataclass(frozen=True)
class Line:
    """One quantity over the epochs: its key in a row, its name for people, its look."""

    key: str
    label: str
    color: str
    marker: str = "o"


@dataclass(frozen=True)
class Panel:
    """Quantities that share a scale; ``percent`` shows shares as percentages, ``top`` ends the scale."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    percent: bool = False
    top: float | None = None
    spread: str | None = None

    def drawable(self, history: Sequence[Row]) -> tuple[Line, ...]:
        """The lines that have a value in at least one epoch."""
        return tuple(line for line in self.lines if any(math.isfinite(y) for y in values(history, line.key)))


PANELS = (
    Panel("Robust training loss", "loss (nats)", (Line("loss", "loss", BLUE),)),
    Panel(
        "Validation accuracy under the mask",
        "accuracy (%)",
        (
            Line("clean_accuracy", "clean", BLUE),
            Line("robust_accuracy", "robust (PGD)", ORANGE, "s"),
        ),
        percent=True,
        top=102.0,
    ),
    Panel(
        "Movement of the mask",
        "share (%)",
        (
            Line("hamming", "Hamming distance to the epoch before (of all)", BLUE),
            Line("replaced", "replaced since the epoch before (of kept)", GREEN, "^"),
            Line("flip_rate", "flipped by S2AP's perturbation (of kept)", ORANGE, "s"),
        ),
        percent=True,
    ),
    Panel(
        "Sharpness in the ball of scores",
        "rise of the loss, at least (nats)",
        (Line("sharpness", "lower bound", PURPLE),),
    ),
    Panel(
        "Largest eigenvalue of the surrogate's Hessian",
        "eigenvalue (nats)",
        (Line("eigenvalue", "eigenvalue ± residual", PURPLE),),
        spread="eigenvalue_residual",
    ),
)


def search_figure(history: Sequence[Row], density: Mapping[str, float], path: Path) -> None:
    """Write a PNG of small multiples: what the search recorded per epoch, and the density of every layer.

    ``history`` holds the rows of ``search/history.json``; a quantity that no row has gets no panel, an
    epoch without it a gap. ``density`` is the share of weights kept by layer, in forward order. Raises
    InputError when there is nothing to draw, StorageError when the disk refuses.
    """
    panels = [panel for panel in PANELS if panel.drawable(history)]
    if not panels and not density:
        raise InputError("there is neither an epoch nor a layer to draw")
    files.write_bytes(path, drawn(history, density, panels))


def draw_search(run: Run) -> Path:
    """Draw what a finished search recorded into ``search/search.png``; returns its path.

    Raises RunFolderError for a folder without a finished search, and what :func:`search_figure` raises.
    """
    history = json.loads(files.read_bytes(run.output("search", "history.json")))
    results: Any = run.manifest.stages["search"].results
    density = {layer["name"]: layer["kept"] / layer["weights"] for layer in results["layers"]}
    path = run.folder("search") / "search.png"
    search_figure(history, density, path)
    return path


def drawn(history: Sequence[Row], density: Mapping[str, float], panels: Sequence[Panel]) -> bytes:
    """The PNG's bytes: panels in two columns, below them the layers over the whole width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    above = PANEL_HEIGHT * math.ceil(len(panels) / 2)
    below = 1.1 + BAR_HEIGHT * len(density) if density else 0.0
    figure = Figure(figsize=(WIDTH, above + below), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    # Two parts with margins of their own: long layer names do not squeeze the panels above them.
    tall = [height for height in (above, below) if height]
    parts = iter(figure.subfigures(len(tall), 1, squeeze=False, height_ratios=tall).flat)
    if panels:
        draw_panels(next(parts), history, panels)
    if density:
        draw_density(next(parts).add_subplot(), density)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw_panels(part: SubFigure, history: Sequence[Row], panels: Sequence[Panel]) -> None:
    """Two to a row; an odd last one takes the whole width."""
    grid = part.add_gridspec(math.ceil(len(panels) / 2), 2)
    for index, panel in enumerate(panels):
        alone = index == len(panels) - 1 and index % 2 == 0
        draw_panel(part.add_subplot(grid[index // 2, slice(None) if alone else index % 2]), history, panel)


def draw_panel(axes: Axes, history: Sequence[Row], panel: Panel) -> None:
    """Lines over the epochs, with a dot per epoch as long as dots do not merge."""
    from matplotlib.ticker import MaxNLocator

    epochs = numbers(history)
    scale = 100.0 if panel.percent else 1.0
    lines = panel.drawable(history)
    for line in lines:
        heights = [scale * value for value in values(history, line.key)]
        # A value between two gaps has no segment, and would be seen in its dot only.
        dots = [i for i in range(len(heights)) if len(epochs) <= MOST_DOTS or isolated(heights, i)]
        axes.plot(
            epochs,
            heights,
            color=line.color,
            linewidth=1.4,
            label=line.label,
            marker=line.marker if dots else None,
            markersize=3.5,
            markevery=dots or None,
            clip_on=False,  # or half of a dot at 0 would be missing
        )
        if panel.spread is not None:
            half = [scale * abs(value) for value in values(history, panel.spread)]
            axes.errorbar(epochs, heights, yerr=half, fmt="none", ecolor=line.color, alpha=0.6, capsize=2)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    tidy(axes)
    legend = len(panel.lines) > 1 or panel.spread is not None
    low, high = axes.get_ylim()
    # What is never negative is seen against its zero; a residual may reach below.
    if low >= 0 or (panel.spread is None and smallest(history, lines) >= 0):
        axes.set_ylim(0.0, panel.top or ((1.3 if legend else 1.1) * high if high > 0 else 1.0))
    if legend:
        axes.legend(fontsize=7, frameon=False, loc="best")


def draw_density(axes: Axes, density: Mapping[str, float]) -> None:
    """One bar per layer, the first on top, each with its figure."""
    shares = [100 * value for value in density.values()]
    bars = axes.barh(range(len(shares)), shares, height=0.72, color=BLUE)
    axes.bar_label(bars, labels=[f"{share:.3g} %" for share in shares], fontsize=7, padding=2)
    axes.set_yticks(range(len(shares)), short_names(list(density)), fontsize=7, parse_math=False)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(0, max(1.12 * max(shares), 1.0))
    axes.set_title("Density of every layer", fontsize=10, loc="left")
    axes.set_xlabel("weights kept (% of the layer)", fontsize=8)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def tidy(axes: Axes) -> None:
    """A light grid behind the data, and no frame above and to the right."""
    axes.set_axisbelow(True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)


def numbers(history: Sequence[Row]) -> list[float]:
    """The epoch of every row; a row that does not say takes its position, from 1."""
    return [
        float(position if (said := row.get("epoch")) is None else said)
        for position, row in enumerate(history, 1)
    ]


def values(history: Sequence[Row], key: str) -> list[float]:
    """The quantity in every row, NaN where it is absent, None or infinite, which leaves a gap."""
    found = [float("nan") if (value := row.get(key)) is None else float(value) for row in history]
    return [value if math.isfinite(value) else float("nan") for value in found]


def smallest(history: Sequence[Row], lines: Sequence[Line]) -> float:
    """The least value that a panel shows."""
    return min(y for line in lines for y in values(history, line.key) if math.isfinite(y))


def isolated(heights: Sequence[float], index: int) -> bool:
    """True for a value whose neighbors are gaps or the edge."""
    beside = [heights[i] for i in (index - 1, index + 1) if 0 <= i < len(heights)]
    return math.isfinite(heights[index]) and not any(map(math.isfinite, beside))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin and end with (``network.``, ``.weight``), and never too long."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    # One ending goes too, unless a bare number or nothing would be left: "0.weight" says more than "0".
    if len({p[-1] for p in parts}) == 1 and all(
        len(p) > 1 and not (len(p) == 2 and p[0].isdigit()) for p in parts
    ):
        parts = [p[:-1] for p in parts]
    short = [".".join(p) for p in parts]
    return [name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :] for name in short]
