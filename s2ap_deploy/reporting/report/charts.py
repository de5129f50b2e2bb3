"""The charts of a run, each with its caption and legend; a chart without data is not there. No torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from s2ap_deploy.evaluation.interval import ClassInterval, Interval
from s2ap_deploy.evaluation.minimum_norm.security_curve import SecurityCurve
from s2ap_deploy.evaluation.samples import ClassRow, Proven, Share
from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.reporting.report import plots, words
from s2ap_deploy.reporting.report.plots import Line, Mark, chart, intervals
from s2ap_deploy.reporting.run_facts import Facts, Row

TONES = {"dense": 1, "pruned": 2}
NORMS = {"Linf": "L∞", "L2": "L2", "L1": "L1"}
STAGES = {"pretrain": "Training of the dense network", "finetune": "Fine-tuning under the mask"}


@dataclass(frozen=True)
class Figure:
    """One drawing with its title; ``legend`` pairs a tone with its words."""

    title: str
    drawing: Markup
    legend: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Panel:
    """Quantities of a history that share a scale: (key, words) each."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    percent: bool = False
    ceiling: float | None = None
    spread: str | None = None


ACCURACY = (("clean_accuracy", "clean"), ("robust_accuracy", "robust, PGD (upper bound)"))
SEARCH = (
    Panel("Robust training loss", "nats", (("loss", "loss"),)),
    Panel("Validation accuracy under the mask", "accuracy", ACCURACY, percent=True, ceiling=1.0),
    Panel(
        "Movement of the mask",
        "share",
        (
            ("hamming", "Hamming distance to the epoch before (of all)"),
            ("replaced", "replaced since the epoch before (of kept)"),
            ("flip_rate", "flipped by S2AP's perturbation (of kept)"),
        ),
        percent=True,
    ),
    Panel("Sharpness in the ball of scores", "rise of loss, nats", (("sharpness", "lower bound"),)),
    Panel(
        "Largest eigenvalue of the surrogate's Hessian",
        "nats",
        (("eigenvalue", "eigenvalue ± residual"),),
        spread="eigenvalue_residual",
    ),
)
TRAINING = (
    Panel("loss", "nats", (("loss", "training loss"),)),
    Panel("validation accuracy", "accuracy", ACCURACY, percent=True, ceiling=1.0),
)


def comparison(facts: Facts) -> Figure | None:
    """Clean, robust and provably robust accuracy of both networks with their intervals."""
    rows: list[tuple[str, list[Mark]]] = []
    for name, key in (
        ("Clean accuracy", "clean"),
        (words.robust_label(facts), "robust"),
        ("Provably robust (lower bound)", "proven"),
    ):
        found = {role: getattr(each, key) for role, each in facts.networks.items()}
        marks = [mark(value, TONES[role]) for role, value in found.items() if value is not None]
        if marks:
            rows.append((name, marks))
    if not rows:
        return None
    return Figure(
        "Accuracy with 95 % intervals", intervals("Accuracy with intervals", rows), legend(facts.networks)
    )


def mark(value: Share | Interval | Proven, tone: int) -> Mark:
    """A share with its interval; an attack that stopped early has an interval and no dot."""
    if isinstance(value, Interval):
        return Mark(0.0, value.low, value.high, None, tone)
    middle = value.count / value.n if isinstance(value, Proven) else value.value
    return Mark(0.0, *value.interval, middle, tone)


def legend(roles: Container[str]) -> tuple[tuple[int, str], ...]:
    """The roles' tones and names."""
    return tuple((tone, f"{role} network") for role, tone in TONES.items() if role in roles)


def class_strip(rows: Mapping[str, ClassRow | ClassInterval]) -> Markup:
    """One class's robust shares by role: dots with intervals, or the open range of an attack that stopped."""
    marks = []
    for role, row in rows.items():
        if isinstance(row, ClassInterval):
            marks.append(Mark(0.0, row.settled / row.n, row.possible / row.n, None, TONES[role]))
        else:
            marks.append(Mark(0.0, *clopper_pearson(row.robust, row.n), row.robust / row.n, TONES[role]))
    return plots.strip("robust accuracy of the class", marks)


def curve(facts: Facts) -> Figure | None:
    """The security curves, with AutoAttack's figures at the certificate's eps."""
    curves = {role: each for role, each in facts.curves.items() if role in TONES}
    if not curves or len({each.norm for each in curves.values()}) > 1:
        return None
    last = max(each.radii[-1] for each in curves.values())
    threat = next(iter(facts.networks.values())).threat
    lines = [Line(role, staircase(each, last), TONES[role], steps=True) for role, each in curves.items()]
    marks = [
        Mark(threat.radius, *each.robust.interval, each.robust.value, TONES[role])
        for role, each in facts.networks.items()
        if isinstance(each.robust, Share) and role in curves
    ]
    norm = NORMS[next(iter(curves.values())).norm]
    drawing = chart(
        "Security curve",
        lines,
        x_label=f"radius of the attack, {norm}",
        y_label="accuracy (upper bound)",
        percent=True,
        ceiling=1.0,
        marks=marks,
        guide=(threat.radius, f"ε = {threat.eps}"),
    )
    return Figure("Accuracy under a minimum-norm attack of growing radius", drawing, legend(curves))


def staircase(found: SecurityCurve, last: float) -> list[tuple[float, float | None]]:
    """The corners of the curve, carried on to ``last``: beyond its last radius nothing more falls."""
    corners: list[tuple[float, float | None]] = []
    for radius, accuracy in zip(found.radii, found.accuracy, strict=True):
        if not corners or corners[-1][1] != accuracy:
            corners.append((radius, accuracy))
    return [*corners, (max(last, found.radii[-1]), found.accuracy[-1])]


def search(facts: Facts) -> list[Figure]:
    """Stability of the mask and sharpness over the epochs of the search."""
    return panels(facts.histories.get("search", ()), SEARCH)


def training(facts: Facts) -> list[Figure]:
    """Loss and accuracy over the epochs of the dense training and of the fine-tuning."""
    return [
        Figure(f"{title}: {each.title}", each.drawing, each.legend)
        for stage, title in STAGES.items()
        for each in panels(facts.histories.get(stage, ()), TRAINING)
    ]


def panels(rows: Sequence[Row], wanted: Sequence[Panel]) -> list[Figure]:
    """The panels that have a value in some epoch."""
    return [each for panel in wanted if (each := _panel(rows, panel)) is not None]


def _panel(rows: Sequence[Row], panel: Panel) -> Figure | None:
    epochs = [float(i) if (said := row.get("epoch")) is None else said for i, row in enumerate(rows, 1)]
    lines = [
        Line(
            label,
            [(epoch, row.get(key)) for epoch, row in zip(epochs, rows, strict=True)],
            tone,
            spread=[row.get(panel.spread) for row in rows] if panel.spread else (),
        )
        for tone, (key, label) in enumerate(panel.lines, 1)
        if any(row.get(key) is not None for row in rows)
    ]
    drawing = chart(
        panel.title,
        lines,
        x_label="epoch",
        y_label=panel.unit,
        percent=panel.percent,
        ceiling=panel.ceiling,
    )
    return Figure(panel.title, drawing, tuple((line.tone, line.label) for line in lines)) if drawing else None
