"""The charts of a run, for the page and as files of their own; a chart without data is None."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ap_deploy import files
from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import ClassInterval, ClassRow, Interval, Proven, Share
from s2ap_deploy.evaluation.security_curve import SecurityCurve
from s2ap_deploy.evaluation.statistics import clopper_pearson
from s2ap_deploy.reporting import svg
from s2ap_deploy.reporting.report import words
from s2ap_deploy.reporting.run_facts import Facts, Row, number
from s2ap_deploy.reporting.svg import Drawing, Figure, Line, Mark, chart, intervals
from s2ap_deploy.runs.folder import Run

TONES = {"dense": 1, "pruned": 2}
NORMS = {"Linf": "L∞", "L2": "L2", "L1": "L1"}
STAGES = {"pretrain": "Training of the dense network", "finetune": "Fine-tuning under the mask"}
LONGEST_NAME = 48


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
    """Draw clean, robust and provably robust accuracy of both networks with their intervals."""
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
        "Accuracy with 95% intervals", intervals("Accuracy with intervals", rows), legend(facts.networks)
    )


def mark(value: Share | Interval | Proven, tone: int) -> Mark:
    """Turn a share into a mark; an attack that stopped early has an interval and no dot."""
    if isinstance(value, Interval):
        return Mark(0.0, value.low, value.high, None, tone)
    middle = value.count / value.n if isinstance(value, Proven) else value.value
    return Mark(0.0, *value.interval, middle, tone)


def legend(roles: Container[str]) -> tuple[tuple[int, str], ...]:
    """Return the roles' tones and names."""
    return tuple((tone, f"{role} network") for role, tone in TONES.items() if role in roles)


def class_strip(rows: Mapping[str, ClassRow | ClassInterval]) -> Drawing:
    """Draw one class's robust shares by role: dots with intervals, or the range of an unfinished attack."""
    marks = []
    for role, row in rows.items():
        if isinstance(row, ClassInterval):
            marks.append(Mark(0.0, row.settled / row.n, row.possible / row.n, None, TONES[role]))
        else:
            marks.append(Mark(0.0, *clopper_pearson(row.robust, row.n), row.robust / row.n, TONES[role]))
    return svg.strip("robust accuracy of the class", marks)


def curve(facts: Facts) -> Figure | None:
    """Draw the security curves, with AutoAttack's figures at the certificate's eps."""
    return security_curves(facts.curves, facts.networks)


def security_curves(
    found: Mapping[str, SecurityCurve], certificates: Mapping[str, Certificate]
) -> Figure | None:
    """Draw curves by role, with AutoAttack's figures at eps; None for no curve, or different norms."""
    curves = {role: each for role, each in found.items() if role in TONES}
    if not curves or len({each.norm for each in curves.values()}) > 1:
        return None
    last = max(each.radii[-1] for each in curves.values())
    threat = next(iter(certificates.values())).threat
    lines = [Line(role, staircase(each, last), TONES[role], steps=True) for role, each in curves.items()]
    marks = [
        Mark(threat.radius, *each.robust.interval, each.robust.value, TONES[role])
        for role, each in certificates.items()
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
    assert drawing is not None
    return Figure("Accuracy over the radius of the attack", drawing, legend(curves))


def staircase(found: SecurityCurve, last: float) -> list[tuple[float, float | None]]:
    """Return the corners of the curve, carried on to ``last``: beyond its last radius nothing more falls."""
    corners: list[tuple[float, float | None]] = []
    for radius, accuracy in zip(found.radii, found.accuracy, strict=True):
        if not corners or corners[-1][1] != accuracy:
            corners.append((radius, accuracy))
    return [*corners, (max(last, found.radii[-1]), found.accuracy[-1])]


def search(facts: Facts) -> list[Figure]:
    """Draw stability of the mask and sharpness over the epochs of the search."""
    return panels(facts.histories.get("search", ()), SEARCH)


def training(facts: Facts) -> list[Figure]:
    """Draw loss and accuracy over the epochs of the dense training and of the fine-tuning."""
    return [
        Figure(f"{title}: {each.title}", each.drawing, each.legend)
        for stage, title in STAGES.items()
        for each in panels(facts.histories.get(stage, ()), TRAINING)
    ]


def panels(rows: Sequence[Row], wanted: Sequence[Panel]) -> list[Figure]:
    """Draw the panels that have a value in some epoch."""
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
    if drawing is None:
        return None
    return Figure(panel.title, drawing, tuple((line.tone, line.label) for line in lines))


def draw_curves(run: Run) -> Path:
    """Draw the curves of ``certify --curve`` with AutoAttack's figures into ``certify/curve.svg``."""
    folder = run.folder("certify")
    roles = [role for role in TONES if (folder / f"{role}-curve.json").exists()]
    curves = {role: SecurityCurve.load(run.output("certify", f"{role}-curve.json")) for role in roles}
    certificates = {role: Certificate.load(run.output("certify", f"{role}.json")) for role in roles}
    figure = security_curves(curves, certificates)
    if figure is None:
        raise InputError("there is no security curve to draw", code="chart-empty")
    path = folder / "curve.svg"
    files.write_text(path, svg.document([figure]))
    return path


def draw_search(run: Run) -> Path:
    """Draw the history of a finished search, and the density of every layer, into ``search/search.svg``.

    Raises RunFolderError for a folder without a finished search, InputError when there is nothing to draw.
    """
    history = json.loads(files.read_bytes(run.output("search", "history.json")))
    results: Any = run.manifest.stages["search"].results
    density = {layer["name"]: layer["kept"] / layer["weights"] for layer in results["layers"]}
    path = run.folder("search") / "search.svg"
    files.write_text(path, search_document(history, density))
    return path


def search_document(history: Sequence[Mapping[str, Any]], density: Mapping[str, float]) -> str:
    """Return the picture of a search: its epochs, and the share of weights that every layer keeps."""
    figures = panels([{key: number(value) for key, value in row.items()} for row in history], SEARCH)
    if density:
        shares = list(zip(short_names(list(density)), density.values(), strict=True))
        figures.append(Figure("Density of every layer: weights kept", svg.bars("density", shares)))
    if not figures:
        raise InputError("there is neither an epoch nor a layer to draw", code="chart-empty")
    return svg.document(figures)


def short_names(names: Sequence[str]) -> list[str]:
    """Remove common prefixes and suffixes (``network.``, ``.weight``), and shorten long names."""
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
