"""Security curves as a picture, the dense network's beside the pruned one's. No torch; needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.minimum_norm.security_curve import SecurityCurve
from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.runs.folder import Run

_STYLES = (("#1f4e79", "-"), ("#c1440e", "--"), ("#3b7d3b", "-."), ("#6b4c8a", ":"))
_WORDS = {"Linf": "L∞", "L2": "L2", "L1": "L1"}


def draw_curves(run: Run) -> Path:
    """Draw what ``certify --curve`` left, beside AutoAttack's figures, into ``certify/curve.png``."""
    folder = run.folder("certify")
    roles = [role for role in ("dense", "pruned") if (folder / f"{role}-curve.json").exists()]
    curves = {role: SecurityCurve.load(run.output("certify", f"{role}-curve.json")) for role in roles}
    certificates = {role: Certificate.load(run.output("certify", f"{role}.json")) for role in roles}
    threat = next(iter(certificates.values())).threat
    path = folder / "curve.png"
    save_png(
        path,
        curves,
        mark=(threat.radius, str(threat.eps)),
        autoattack={
            role: certificate.robust.value
            for role, certificate in certificates.items()
            if isinstance(certificate.robust, Share)  # an attack that was stopped early has no point to draw
        },
    )
    return path


def save_png(
    path: Path,
    curves: Mapping[str, SecurityCurve],
    *,
    mark: tuple[float, str] | None = None,
    autoattack: Mapping[str, float] | None = None,
) -> None:
    """Draw ``curves`` by their names ("dense", "pruned") into one PNG, written atomically.

    ``mark`` is a radius and its text ("8/255"), drawn as a vertical line; ``autoattack`` holds robust
    accuracies at that radius under the curves' names, drawn as points on it. Raises UsageError without
    matplotlib, for no or more than four curves, for curves of different norms, and for AutoAttack without
    a mark or a curve.
    """
    _check(curves, mark, autoattack or {})
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise UsageError("drawing a curve needs matplotlib", hint="pip install matplotlib") from None

    reached = autoattack or {}
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    last = max(curve.radii[-1] for curve in curves.values())
    for (name, curve), (color, line) in zip(curves.items(), _STYLES, strict=False):
        axes.plot(
            curve.radii, curve.accuracy, line, color=color, linewidth=1.8, label=f"{name} (n = {curve.n:,})"
        )
        if mark is not None and name in reached:
            label = f"{name}, AutoAttack"
            axes.plot([mark[0]], [reached[name]], "o", color=color, markersize=5, label=label)
    if mark is not None:
        axes.axvline(mark[0], color="#666666", linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            f"ε = {mark[1]}", (mark[0], 0.0), xycoords=("data", "axes fraction"),
            xytext=(3, 4), textcoords="offset points", va="bottom", fontsize=8, color="#444444",
        )  # fmt: skip
        last = max(last, mark[0] * 1.05)
    axes.set_xlim(0.0, last or 1.0)
    axes.set_ylim(0.0, 1.0)
    norm = next(iter(curves.values())).norm
    axes.set_xlabel(f"radius of the attack, {_WORDS[norm]}")
    axes.set_ylabel("accuracy under FMN (upper bound)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(True, linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    # Without the version of matplotlib, so that equal curves give equal bytes.
    figure.savefig(picture, format="png", metadata={"Software": None})
    files.write_bytes(path, picture.getvalue())


def _check(
    curves: Mapping[str, SecurityCurve], mark: tuple[float, str] | None, autoattack: Mapping[str, float]
) -> None:
    if not 1 <= len(curves) <= len(_STYLES):
        raise UsageError(f"a picture holds 1 to {len(_STYLES)} curves, not {len(curves)}")
    norms = sorted({curve.norm for curve in curves.values()})
    if len(norms) > 1:
        raise UsageError(f"curves in {' and '.join(norms)} do not belong in one picture")
    if mark is not None and not 0 < mark[0] < math.inf:
        raise UsageError(f"the marked radius must be positive and finite, not {mark[0]}")
    unknown = sorted(autoattack.keys() - curves.keys())
    if unknown or (autoattack and mark is None):
        raise UsageError(
            f"AutoAttack's accuracy has no curve: {', '.join(unknown)}"
            if unknown
            else "AutoAttack's accuracy needs the radius it was measured at"
        )
