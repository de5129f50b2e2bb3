"""Check an export against its target: its requirements before the export, its budgets afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.errors import InputError, UsageError, VerificationError
from s2ap_deploy.models.channels.layer_channels import Coupling, macs
from s2ap_deploy.models.used_weights import used_weights
from s2ap_deploy.onnx_export.benchmark import paired_latency
from s2ap_deploy.onnx_export.export_report import BudgetCheck, ExportReport, ExportTarget, PredictedSize
from s2ap_deploy.onnx_export.inference import session
from s2ap_deploy.recipe.methods import n_of_m
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.recipe.target import UNITS, Found, budgets, check, find
from s2ap_deploy.stages.plan import plan

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Exported:
    """The network of an exported file, at full width, and an image [1, C, H, W] to time the file with.

    ``coupling`` are its groups of channels, where they are known already.
    """

    network: nn.Module
    size: Size
    image: NDArray[np.float32]
    coupling: Coupling | None = None


def target_of(section: ExportSection) -> Found | None:
    """Read the section's target again. Raises RecipeError when it does not exist any more."""
    return find(section.target) if section.target is not None else None


def inputs(found: Found | None) -> dict[str, str]:
    """Return what a stage records of the target, so that a changed profile of the same name is detected."""
    return {} if found is None else {"target": found.sha256}


def refuse_misfit(found: Found | None, section: ExportSection, network: nn.Module, size: Size) -> None:
    """Raise UsageError for settings, or weights, that the target cannot take."""
    if found is None:
        return
    check(found.target, section.model_dump())
    if found.target.requires.granularity is None:
        return
    pattern = n_of_m(found.target.requires.granularity)
    assert pattern is not None
    used = used_weights(network, size)
    names = used.prunable
    weights = {name: network.get_parameter(name).detach() for name in names if used.reads[name] == 1}
    misfit = off_pattern(weights, *pattern, ends=(names[0], names[-1]) if names else ())
    if misfit is not None:
        wanted = f"{pattern[0]}:{pattern[1]}"
        raise UsageError(
            f"{found.target.name} needs weights of the pattern {wanted} along their input channels: {misfit}",
            code="target-pattern-missing",
            hint=f"s2ap-deploy prune --granularity {wanted}",
        )


def off_pattern(weights: Mapping[str, Tensor], n: int, m: int, *, ends: tuple[str, ...] = ()) -> str | None:
    """Explain why ``weights`` [out, in, ...] do not keep ``n`` of each ``m`` inputs; None if they do.

    Weights whose inputs ``m`` does not divide are exempt; those among ``ends`` may be left dense.
    """
    able = {name: weight for name, weight in weights.items() if weight.shape[1] % m == 0}
    if not able:
        return f"no layer has a number of inputs divisible by {m}"
    full = {}
    for name, weight in able.items():
        groups = (weight != 0).reshape(weight.shape[0], weight.shape[1] // m, m, -1)
        full[name] = int(groups.sum(dim=2).max())
    wrong = [name for name, most in full.items() if most > n and name not in ends]
    if not wrong and min(full.values()) > n:  # dense ends are all there is
        wrong = list(full)
    if not wrong:
        return None
    rest = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{wrong[0]} has {full[wrong[0]]} weights that are not zero among {m}{rest}"


def completed(
    report: ExportReport, file: Path, exported: Exported, recipe: Recipe, found: Found | None
) -> ExportReport:
    """Add the target, the predicted size and every budget with its result to the report of ``file``.

    Raises VerificationError for a budget that is missed, and then removes ``file``.
    """
    section = recipe.export
    checks = []
    for what, limit in budgets(found.target if found is not None else None, section.model_dump()).items():
        if limit is None:
            continue
        match what:
            case "bytes":
                value: float = report.bytes if report.device is None else report.device.bytes
            case "macs":
                value = _macs(report, exported)
            case "latency_ms":
                value = (
                    report.latency_ms
                    if report.latency_ms is not None
                    else _latency(file, exported.image, report)
                )
        checks.append(BudgetCheck(what=what, asked=limit, found=value))
    missed = [each for each in checks if not each.holds]
    if missed:
        files.remove(file)
        raise VerificationError(
            "; ".join(
                f"{UNITS[each.what]}: at most {number(each.asked)} allowed, found {number(each.found)}"
                for each in missed
            ),
            code="budget-missed",
            hint="the file was removed; s2ap-deploy plan shows what would fit, --overwrite exports again",
        )
    aim = None if found is None else ExportTarget(name=found.target.name, sha256=found.sha256)
    return report.model_copy(
        update={
            "target": aim,
            "processors": found.target.processors if found is not None else (),
            "budgets": tuple(checks),
            "predicted": _predicted(exported, recipe),
        }
    )


def number(value: float | None) -> str:
    """Format a count in full, a time to the microsecond."""
    return "nothing" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _predicted(exported: Exported, recipe: Recipe) -> PredictedSize | None:
    """Return the predicted size, or None if the network cannot be planned."""
    try:
        expected = plan(
            exported.network,
            exported.size,
            recipe.prune,
            recipe.export,
            name="network",
            coupling=exported.coupling,
        )
    except InputError:
        return None
    return PredictedSize(
        bytes=expected.chosen.bytes, macs=expected.macs_after, converted_bytes=expected.converted_bytes
    )


def _macs(report: ExportReport, exported: Exported) -> int:
    """Return multiply-accumulates of the file's graph if counted, else of the network."""
    if report.compaction is not None:
        return report.compaction.macs_after
    if report.narrowed is not None:
        return report.narrowed.macs.achieved
    return macs(exported.network, exported.size)


def _latency(file: Path, image: NDArray[np.float32], report: ExportReport) -> float:
    running = session(file)
    return paired_latency(running, running, np.repeat(image, report.batch or 1, axis=0)).median_ms
