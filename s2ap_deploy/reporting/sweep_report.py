"""A sweep as text: the Adversarial Pruning Benchmark's table, and every combination as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from s2ap_deploy import files
from s2ap_deploy.formatting import plain
from s2ap_deploy.reporting import svg
from s2ap_deploy.reporting.svg import Canvas, Drawing
from s2ap_deploy.sweeps.aggregate import Group, Row, Setting, Spread, SweepReport

TABLE, LATEX, CSV = "table.md", "table.tex", "sweep.csv"
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


def cells(group: Group, seeds: int) -> tuple[str, ...]:
    """Return the row of one group, a text for each of :data:`COLUMNS`; fewer than ``seeds`` are marked."""
    return (
        method(group.setting),
        group.setting.structure,
        f"{100 * group.sparsity.mean:.2f}%",
        f"{spread_percent(group.clean_dense)} {ARROW} {spread_percent(group.clean)}",
        f"{spread_percent(group.robust_dense)} {ARROW} {spread_percent(group.robust)}",
        f"{group.bytes.mean:,.0f}",
        str(len(group.seeds)) if len(group.seeds) == seeds else f"{len(group.seeds)} of {seeds} *",
    )


def rows(report: SweepReport) -> list[tuple[str, ...]]:
    """Return the table's rows, one per group."""
    seeds = max((len(group.seeds) for group in report.groups), default=0)
    return [cells(group, seeds) for group in report.groups]


def differences(report: SweepReport) -> list[str]:
    """Return the effect of S2AP on robust accuracy, a sentence per setting: mean and 95% interval."""
    found = []
    for each in report.differences:
        interval = "one pair"
        if each.interval is not None:
            low, high = each.interval
            interval = f"95% interval [{100 * low:+.2f}, {100 * high:+.2f}], {len(each.seeds)} pairs"
        name = method(each.setting.model_copy(update={"s2ap": False}))
        asked = each.setting.sparsity if each.setting.sparsity is not None else each.setting.keep_ratio
        found.append(
            f"S2AP on minus off, {name} at {asked:g}: {100 * each.mean:+.2f} points robust, {interval}"
        )
    return found


def method(setting: Setting) -> str:
    """Return ``hydra + S2AP, erk``: the base method, S2AP, and the budget."""
    base = setting.method + (" + S2AP" if setting.s2ap else "")
    return base if setting.budget is None else f"{base}, {setting.budget}"


def spread_percent(spread: Spread) -> str:
    """Return ``94.17 ± 0.21``, or the mean alone if there is no deviation."""
    mean = f"{100 * spread.mean:.2f}"
    return mean if spread.deviation is None else f"{mean} ± {100 * spread.deviation:.2f}"


def title(report: SweepReport) -> str:
    """Return the title: what was swept, on which data, under which attack."""
    network = f", {report.arch}" if report.arch is not None else ""
    return f"{plain(report.recipe)}: {plain(report.data)}{network}, {report.threat}"


def notes(report: SweepReport) -> Iterator[str]:
    """Return the notes below the table, including the combinations that are missing from it."""
    if report.statement is not None:
        n = sorted({row.figures.robust.n for row in report.rows if row.figures is not None})
        images = " or ".join(map(str, n))
        yield f"robust is the {report.statement}, on {images} test images; formal_guarantee: false."
    yield LEGEND
    if len({len(group.seeds) for group in report.groups}) > 1:
        yield "rows marked * have fewer seeds than others"
    yield from differences(report)
    for row in report.rows:
        if row.status in ("failed", "skipped", "waiting"):
            reason = f": {plain(row.error)}" if row.error is not None else ""
            yield f"{row.name}: {'impossible' if row.status == 'skipped' else row.status}{reason}"


def markdown(report: SweepReport) -> str:
    """Render the table as a Markdown page; equal figures give equal bytes, also after interruptions."""
    lines = [
        f"# {title(report)}",
        "",
        _row(COLUMNS),
        _row(("---", "---", "---:", "---:", "---:", "---:", "---:")),
    ]
    lines += [_row(each) for each in rows(report)]
    lines += ["", *(f"* {note}" for note in notes(report)), ""]
    return "\n".join(lines)


def latex(report: SweepReport) -> str:
    """Render the table for LaTeX with booktabs; equal figures give equal bytes."""
    lines = [
        "% \\usepackage{booktabs}",
        f"% {title(report)}",
        "\\begin{tabular}{llrrrrr}",
        "\\toprule",
        _latex_row(COLUMNS),
        "\\midrule",
        *map(_latex_row, rows(report)),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"% {note}" for note in notes(report)),
    ]
    return "\n".join(lines) + "\n"


def comma_separated(report: SweepReport) -> str:
    """Render CSV, one line per combination: fractions, hexadecimal hashes, empty cells for missing values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _FACTS, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow(_facts(row))
    return text.getvalue()


def write(report: SweepReport, folder: Path) -> None:
    """Write the table, as Markdown and LaTeX, and the CSV file into the folder. Raises StorageError."""
    files.write_text(folder / TABLE, markdown(report))
    files.write_text(folder / LATEX, latex(report))
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


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", ARROW: r"$\rightarrow$", "±": r"$\pm$",
}  # fmt: skip


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join("".join(_TEX.get(letter, letter) for letter in text) for text in texts) + r" \\"


FILE, ACCURACY = "pareto.svg", "accuracy.svg"
WIDTH, HEIGHT = 420.0, 330.0
# Where the note of a point may be written, in units from it; the first place that is free is taken.
_PLACES = (
    (7, -5, "start"), (7, 13, "start"), (-7, -5, "end"), (-7, 13, "end"),
    (0, -9, "middle"), (0, 19, "middle"), (17, 4, "start"), (-17, 4, "end"),
)  # fmt: skip
_SAME = 36.0  # points nearer than this share the note that they have in common
_MARKER = 5.0
_FEW_TIMES = 4.0  # largest over smallest size: below, even steps are legible

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """Hold one group: ``cost`` in bytes or as a ratio of times, mean robust accuracy and its deviation."""

    label: str
    note: str
    cost: float
    robust: float
    deviation: float | None


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in one figure without losing in the other, by rising cost.

    Of equal points one is enough.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, -each.robust)):
        if not best or point.robust > best[-1].robust:
            best.append(point)
    return best


def draw_pareto(report: SweepReport, folder: Path) -> Path | None:
    """Draw the groups of a sweep into ``pareto.svg``; None where nothing has finished yet.

    The left panel has bytes of the exported file, the right one its time over that of its dense baseline; it
    is left out where no time was measured. Raises StorageError.
    """
    if not report.groups:
        return None
    size = [_point(group, group.bytes.mean) for group in report.groups]
    time = [
        _point(group, group.latency_ratio.mean) for group in report.groups if group.latency_ratio is not None
    ]
    styles = {label: number for number, label in enumerate(dict.fromkeys(point.label for point in size))}
    dense = sum(group.robust_dense.mean for group in report.groups) / len(report.groups)
    figures = [svg.Figure("", panel(size, styles, dense, "size of the exported ONNX file", by_bytes=True))]
    if time:
        label = "time relative to the dense file (1: no faster)"
        figures.append(svg.Figure("", panel(time, styles, dense, label, by_bytes=False)))
    keys = [(svg.marker(12, 0, tone(style), style), label) for label, style in styles.items()]
    keys += [(_line("front"), "not beaten"), (_line("guide"), "dense network")]
    width = len(figures) * (WIDTH + 24)
    figures.append(svg.Figure("", svg.legend(keys, width)))
    path = folder / FILE
    files.write_text(path, svg.document(figures, heading=title(report), columns=2 if time else 1))
    return path


def draw_accuracy(report: SweepReport, folder: Path) -> Path | None:
    """Draw robust and clean accuracy over sparsity into ``accuracy.svg``, a line per method.

    Error bars are one standard deviation over seeds. None where nothing has finished yet. Raises
    StorageError.
    """
    if not report.groups:
        return None
    methods: dict[str, list[Group]] = {}
    for group in sorted(report.groups, key=lambda each: each.sparsity.mean):
        methods.setdefault(_label(group), []).append(group)
    tones = {label: tone(number) for number, label in enumerate(methods)}
    figures = []
    for name, figure in (("robust accuracy (upper bound)", "robust"), ("clean accuracy", "clean")):
        lines = []
        for label, members in methods.items():
            spreads: list[Spread] = [getattr(group, figure) for group in members]
            points = [
                (100 * g.sparsity.mean, spread.mean) for g, spread in zip(members, spreads, strict=True)
            ]
            lines.append(svg.Line(label, points, tones[label], tuple(each.deviation for each in spreads)))
        drawing = svg.chart(
            name,
            lines,
            x_label="sparsity in percent, measured",
            y_label="accuracy",
            percent=True,
            ceiling=1.0,
        )
        if drawing is not None:
            figures.append(svg.Figure(name, drawing, tuple((tones[label], label) for label in methods)))
    path = folder / ACCURACY
    files.write_text(path, svg.document(figures, heading=title(report)))
    return path


def tone(style: int) -> int:
    """Return the color of a style; the shape of its marker repeats what the color says."""
    return style % svg.TONES + 1


def panel(
    points: Sequence[Point], styles: Mapping[str, int], dense: float, x_label: str, *, by_bytes: bool
) -> Drawing:
    """Draw points, the front of those that nothing beats, the dense network's accuracy, and the notes."""
    canvas = scales([*points], dense, logarithmic=by_bytes)
    canvas.axes(
        x_label,
        "robust accuracy (upper bound)",
        svg.as_bytes if by_bytes else "{:.4g}".format,
        svg.as_percent,
    )
    canvas.horizontal(dense)
    if not by_bytes:
        canvas.vertical(1.0)
    best = [(canvas.across(point.cost), canvas.up(point.robust)) for point in front(points)]
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in best[1:])
    if steps:
        canvas.parts.append(
            Markup('<path class="front" d="M{x:.1f} {y:.1f}{steps}"/>').format(
                x=best[0][0], y=best[0][1], steps=steps
            )
        )
    for point in points:
        style = styles[point.label]
        if point.deviation:
            low, high = point.robust - point.deviation, point.robust + point.deviation
            canvas.whisker(point.cost, low, high, tone(style))
        place = canvas.across(point.cost), canvas.up(point.robust)
        canvas.parts.append(svg.marker(*place, tone(style), style))
    canvas.parts += [
        svg.text(x, y, note, anchor, f"note f{color}")
        for note, x, y, anchor, color in place_notes(canvas, points, styles)
    ]
    return canvas.drawing(x_label, WIDTH, HEIGHT)


def scales(points: Sequence[Point], dense: float, *, logarithmic: bool) -> Canvas:
    """Return a canvas that holds all points, with room around them."""
    costs = [point.cost for point in points] + ([] if logarithmic else [1.0])
    shares = [point.robust + side * (point.deviation or 0.0) for point in points for side in (-1, 1)]
    low, high = min([*shares, dense]), max([*shares, dense])
    room = 0.12 * (high - low) or 0.05
    left, right = min(costs), max(costs)
    logarithmic = logarithmic and left > 0 and right > _FEW_TIMES * left
    if logarithmic:
        factor = (right / left) ** 0.1
        left, right = left / factor, right * factor
    else:
        # Never so narrow that ticks would tell costs apart which are equal in practice.
        side = max(0.12 * (right - left), 0.1 * abs(right)) or 1.0
        left, right = left - side, right + side
    across = svg.scale(left, right, svg.LEFT, WIDTH - svg.RIGHT, logarithmic=logarithmic)
    up = svg.scale(max(low - room, 0.0), min(high + room, 1.0), HEIGHT - svg.BOTTOM, svg.TOP)
    return Canvas(across, up)


def place_notes(
    canvas: Canvas, points: Sequence[Point], styles: Mapping[str, int]
) -> list[tuple[str, float, float, str, int]]:
    """Place notes next to their points where they overlap least; neighbors may share one.

    Returns text, x, y, anchor and tone (0: of several styles) of each.
    """
    places = {id(point): (canvas.across(point.cost), canvas.up(point.robust)) for point in points}
    taken = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in places.values()]
    inside = (canvas.across.start, canvas.up.end, canvas.across.end, canvas.up.start)
    found = []
    for note in dict.fromkeys(point.note for point in points):
        left = [point for point in points if point.note == note]
        while left:
            first = places[id(left[0])]
            near = [point for point in left if math.dist(places[id(point)], first) < _SAME]
            left = [point for point in left if point not in near]
            own = {styles[point.label] for point in near}
            candidates = [
                (places[id(point)][0] + x, places[id(point)][1] + y, anchor)
                for point in near
                for x, y, anchor in _PLACES
            ]

            def cost(place: tuple[float, float, str], note: str = note) -> float:
                box = text_box(note, *place)
                outside = _area(box) - _shared(box, inside)
                return sum(_shared(box, each) for each in taken) + outside

            x, y, anchor = min(candidates, key=cost)
            taken.append(text_box(note, x, y, anchor))
            found.append((note, x, y, anchor, tone(own.pop()) if len(own) == 1 else 0))
    return found


def text_box(text: str, x: float, y: float, anchor: str) -> Box:
    """Return about the box of a note of 11 px."""
    width = 6.0 * len(text)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - 9.0, left + width, y + 2.0


def _point(group: Group, cost: float) -> Point:
    """Turn a group into a point, with a note for facts that its label does not contain."""
    return Point(
        label=_label(group),
        note=f"{100 * group.sparsity.mean:.3g}%",
        cost=cost,
        robust=group.robust.mean,
        deviation=group.robust.deviation,
    )


def _label(group: Group) -> str:
    structure = "" if group.setting.granularity == "weight" else f", {group.setting.structure}"
    return method(group.setting) + structure


def _line(kind: str) -> Markup:
    return Markup('<path class="{kind}" d="M2 0H22"/>').format(kind=kind)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _shared(one: Box, other: Box) -> float:
    """Return the area that two boxes have in common."""
    return _area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))
