"""Figures as people read them: one row of an epoch or of an attack in one line."""

from __future__ import annotations

from collections.abc import Mapping

LABELS = {
    "loss": "loss",
    "clean_accuracy": "clean",
    "robust_accuracy": "robust",
    "replaced": "mask moved",
    "flip_rate": "flips",
}
SHARES = {"clean_accuracy", "robust_accuracy", "replaced", "flip_rate"}
# What a bar has room for, and what is worth keeping when a stage is over.
ON_THE_BAR = ("loss", "robust_accuracy")
AT_THE_END = ("loss", "clean_accuracy", "robust_accuracy", "flip_rate")

Row = Mapping[str, float | int | str]


def row(values: Row) -> str:
    """Everything that a stage reports."""
    if "attack" in values:
        return (
            f"{values['attack']} broke {values['broken']} of {counted(int(values['images']), 'image')} "
            f"of block {values['block']} in {values['seconds']} s; {values['standing']} stand"
        )
    parts = [_epoch(values), *_named(values, tuple(LABELS))]
    if "seconds" in values:
        parts.append(f"{float(values['seconds']):.1f} s")
    return ", ".join(filter(None, parts))


def short(values: Row) -> str:
    """What fits beside a bar."""
    if "attack" in values:
        return f"{values['attack']}  {values['standing']} stand"
    return "  ".join(filter(None, [_epoch(values), *_named(values, ON_THE_BAR)]))


def last(values: Row) -> str:
    """What remains to be said when the stage is over."""
    if "attack" in values:
        return f"{values['standing']} stand"
    return "  ".join(_named(values, AT_THE_END))


def counted(number: int, unit: str) -> str:
    """``1 image``, ``2,000 images``, ``3 forward passes``."""
    plural = "es" if unit.endswith("s") else "s"
    return f"{number:,} {unit}{'' if number == 1 else plural}"


def rate(per_second: float) -> str:
    """``12.3/s``, ``4.5/min`` where a second is too short, ``120k/s`` where many; at most seven columns."""
    if per_second < 0.995:
        return f"{60 * per_second:.1f}/min"
    if per_second >= 99_999.5:
        thousands = per_second / 1000
        return f"{thousands:.0f}k/s" if thousands < 9999.5 else f"{thousands / 1000:.0f}M/s"
    return f"{per_second:.{1 if per_second < 99.95 else 0}f}/s"


def _epoch(values: Row) -> str:
    if "epoch" not in values:
        return ""
    return f"epoch {values['epoch']}" + (f"/{values['epochs']}" if "epochs" in values else "")


def _named(values: Row, names: tuple[str, ...]) -> list[str]:
    return [_figure(name, float(values[name])) for name in names if name in values]


def _figure(name: str, value: float) -> str:
    if name in SHARES:
        digits = 2 if name in ("replaced", "flip_rate") else 1
        return f"{LABELS[name]} {100 * value:.{digits}f} %"
    return f"{LABELS[name]} {value:.3f}"
