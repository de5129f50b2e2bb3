"""Plan: predict the result of pruning and export from shapes alone, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import nn

from s2ap_deploy.codecs.codec import Tradeoff
from s2ap_deploy.codecs.registry import DENSE, ENCODINGS, Contents, EncodingName
from s2ap_deploy.codecs.values import VALUES, ValuesName
from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.channels.coupling import Coupling, channel_groups
from s2ap_deploy.onnx_export.export_onnx import coverage_warning
from s2ap_deploy.onnx_export.export_report import BudgetCheck, ExportTarget
from s2ap_deploy.onnx_export.onnx_shapes import Outline, narrowed, outline
from s2ap_deploy.pruning.allocation import ChannelQuotas, Fixed, Global, Quotas
from s2ap_deploy.pruning.budgets import (
    BudgetLimit,
    ChannelCost,
    aligned,
    filled,
    floors,
    limit_of,
    uniform,
    within,
)
from s2ap_deploy.pruning.granularity import NOfM
from s2ap_deploy.recipe.methods import n_of_m
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.recipe.target import OPTIONS, UNITS, BudgetName, Found, Target, budgets
from s2ap_deploy.runtimes.runtime import find
from s2ap_deploy.spec import Record, WeightCount
from s2ap_deploy.stages.prune import allocation, share_channels

# Types of values, and whether the file computes in int8.
FORMS: tuple[tuple[ValuesName, bool], ...] = (*((name, False) for name in VALUES), ("int8", True))
Speed = Literal["none", "sparse", "int8", "compact", "compact and int8", "2:4"]

BY_DATA = (
    "learned and global budgets depend on scores, which are unknown before a run: uniform shares are "
    "assumed. The total is the same, and positions cost most when every layer is equally sparse."
)
NO_SPEED = (
    "zeros shrink the file, not the latency: the measured runtimes compute at dense speed, with dense memory"
)
INT8_SPEED = "int8 arithmetic was about 4 times as fast as float32 in ONNX Runtime on an x86-64 server"
SPARSE_SPEED = (
    "the C library skips zeros: its time falls with the kept weights; export --c --bench measures it here"
)
PATTERN_SPEED = (
    "TensorRT can use 2:4 on NVIDIA GPUs (not tested here); ONNX Runtime and OpenVINO compute at dense speed"
)


class PlannedLayer(Record):
    """One weight: its shape before and after, and the number of non-zero entries that are kept."""

    name: str
    shape: tuple[int, ...]
    shape_after: tuple[int, ...]
    nonzeros: int


class PlannedFile(Record):
    """A file under one encoding. ``values`` is the type of stored values; ``int8`` means int8 arithmetic."""

    encoding: EncodingName
    values: ValuesName
    int8: bool = False
    bytes: int

    @property
    def form(self) -> tuple[EncodingName, ValuesName, bool]:
        return self.encoding, self.values, self.int8


class Plan(Record):
    """Prediction for one network and one request; bytes are whole files.

    ``sparsity`` counts zeros among the weights that multiply activations, those of channels that are gone
    included; ``count`` says which these are. ``macs`` are multiply-accumulates per image with them,
    ``parameters`` learnable values; zeros that stay where they are still count as both. ``chosen`` is the
    file that the export's settings ask for, and is compared with ``budgets``; ``converted_bytes``, of the
    file of another runtime, are compared in its place. ``target`` has the hash of its profile.
    """

    network: str
    input_size: tuple[int, int, int]
    granularity: str
    budget: str | None
    sparsity: float
    weights: int
    nonzeros: int
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    dense_bytes: int
    files: tuple[PlannedFile, ...]
    layers: tuple[PlannedLayer, ...]
    speed: Speed
    speed_words: str
    chosen: PlannedFile
    converted_bytes: int | None = None
    target: ExportTarget | None = None
    budgets: tuple[BudgetCheck, ...] = ()
    count: WeightCount | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether every budget is met; None if the rest can only be measured."""
        answers = [check.holds for check in self.budgets]
        return False if False in answers else None if None in answers else True

    def file(self, encoding: EncodingName, values: ValuesName, *, int8: bool = False) -> PlannedFile:
        """Return the file under one encoding and type of values."""
        return next(each for each in self.files if each.form == (encoding, values, int8))


def plan(
    network: nn.Module,
    input_size: tuple[int, int, int],
    section: PruneSection | None,
    export: ExportSection,
    *,
    name: str,
    found: Found | None = None,
    coupling: Coupling | None = None,
) -> Plan:
    """Predict the file of ``network`` under a recipe's prune and export sections.

    ``network`` may be on the meta device, unless ``section`` prunes channels: its groups of channels are
    found by running it, unless ``coupling`` is given. ``found`` is the export's target. Raises UsageError for
    a request that does not fit the network, ArchitectureError when it cannot run on ``input_size`` (C, H, W).
    """
    whole = outline(network, input_size)
    if not whole.layers:
        raise UsageError(f"{name} has no convolution or linear layer to prune", code="nothing-to-prune")
    granularity = section.granularity if section is not None else "none"
    # Remaining layers and their remaining weights.
    remaining, kept, notes = whole, dict[str, int](), list[str]()
    if section is not None and granularity == "channel":
        smaller = _channels(whole, coupling or channel_groups(network, input_size), section, export)
        if export.compact:
            remaining = smaller
        else:  # rows and columns stay, as zeros
            kept = {layer.name: math.prod(layer.shape) for layer in smaller.layers}
    elif section is not None:
        kept, notes = _weights(whole, section)
    contents = remaining.contents(kept)
    nonzeros = sum(weight.nonzeros for weight in contents.weights)
    entries = sum(math.prod(layer.shape) for layer in whole.layers)
    speed, reason = _speed(granularity, whole, remaining, export)
    # File size in every encoding, and whether it fits the budgets.
    files = _files(contents, export.cost)
    values: ValuesName = "int8" if export.int8 else export.values
    chosen = next(each for each in files if each.form == (export.encoding, values, export.int8))
    warning = coverage_warning(network, input_size, export)
    notes += [] if warning is None else [warning]
    target = found.target if found is not None else None
    limits = budgets(target, export.model_dump())
    shapes = sum(math.prod(weight.shape) for weight in contents.weights)
    converted = None
    if export.convert is not None:
        kind, others = "int8" if export.int8 else "float32", remaining.size - shapes
        converted = find(export.convert).predicted_bytes(kind, chosen.bytes, shapes, nonzeros, others)
    size = chosen.bytes if converted is None else converted
    if target is not None:
        notes += _missing(target, granularity, limits)
    return Plan(
        network=name,
        input_size=input_size,
        granularity=granularity,
        budget=section.layer_budget if section is not None and n_of_m(granularity) is None else None,
        sparsity=1 - nonzeros / entries,
        weights=entries,
        nonzeros=nonzeros,
        parameters_before=whole.size,
        parameters_after=remaining.size,
        macs_before=whole.macs,
        macs_after=remaining.macs,
        dense_bytes=whole.contents({}).bytes(DENSE.name),
        files=files,
        layers=_layers(whole, contents),
        speed=speed,
        speed_words=reason,
        chosen=chosen,
        converted_bytes=converted,
        target=ExportTarget(name=found.target.name, sha256=found.sha256) if found is not None else None,
        budgets=_budget_checks(limits, {"bytes": size, "macs": remaining.macs, "latency_ms": None}),
        count=whole.count,
        notes=tuple(notes),
    )


def _files(contents: Contents, cost: Tradeoff) -> tuple[PlannedFile, ...]:
    return tuple(
        PlannedFile(
            encoding=encoding,
            values=values,
            int8=int8,
            bytes=contents.bytes(encoding, values, int8=int8, cost=cost),
        )
        for encoding in ENCODINGS
        for values, int8 in FORMS
    )


def _layers(whole: Outline, contents: Contents) -> tuple[PlannedLayer, ...]:
    return tuple(
        PlannedLayer(name=before.name, shape=before.shape, shape_after=weight.shape, nonzeros=weight.nonzeros)
        for before, weight in zip(whole.layers, contents.weights, strict=True)
    )


def _budget_checks(
    limits: Mapping[BudgetName, float | None], predicted: Mapping[BudgetName, float | None]
) -> tuple[BudgetCheck, ...]:
    return tuple(
        BudgetCheck(what=what, asked=limit, found=predicted[what])
        for what, limit in limits.items()
        if limit is not None
    )


def _weights(whole: Outline, section: PruneSection) -> tuple[dict[str, int], list[str]]:
    """Return the weights kept in each layer, and notes on what shapes alone do not determine."""
    names = whole.used.prunable
    outside = () if section.allow_unpruned else tuple(whole.used.outside)
    shapes = {name: whole.shapes[name] for name in (*names, *outside)}
    ends = (*((names[0], names[-1]) if section.dense_ends else ()), *outside)
    pattern = n_of_m(section.granularity)
    if pattern is not None:
        able = {n: shapes[n] for n in names if n not in ends and whole.used.reads[n] == 1}
        fitting, dense = NOfM.divide(able, *pattern)
        note = f"stay dense, as {pattern[1]} does not divide their inputs: {', '.join(dense)}"
        return NOfM(fitting, *pattern).kept(shapes), [note] if dense else []
    assert section.sparsity is not None
    shared = allocation(shapes, section, classifier=names[-1], dense=ends)
    if isinstance(shared, (Global, Quotas)):
        least = floors(shapes, classifier=names[-1] if section.covers_classes else None, dense=ends)
        return uniform(shapes, section.sparsity, least), [BY_DATA]
    assert isinstance(shared, Fixed)
    return shared.keep, []


def _channels(whole: Outline, coupling: Coupling, section: PruneSection, export: ExportSection) -> Outline:
    """Return the layers without the pruned channels, and their rows and columns."""
    if export.reselects:
        section = section.model_copy(update={"keep_ratio": export.keep_ratio, "sparsity": None})
    channels = {group.name: group.channels for group in coupling.groups}
    if not channels:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in coupling.skipped) or "it has one layer"
        raise UsageError(
            f"no channel of this network can be removed: {reasons}",
            code="nothing-to-prune",
            hint="--granularity weight prunes any layer",
        )
    shapes = whole.shapes
    outside = () if section.allow_unpruned else tuple(whole.used.outside)
    fixed = sum(math.prod(shapes[name]) for name in outside)
    if section.layer_budget == "macs":
        fixed = sum(whole.used.macs[name] for name in outside)
    shared = share_channels(coupling, channels, shapes, section, fixed=fixed)
    if isinstance(shared, ChannelQuotas):
        even = {name: float(count) for name, count in channels.items()}
        assert section.sparsity is not None
        wanted = within(channels, even, shared.cost, limit_of(shared.cost, channels, section.sparsity))
    else:
        assert isinstance(shared, Fixed)
        wanted = shared.keep
    if section.keep_ratio is None or export.align == 1:
        return narrowed(whole, coupling, filled(wanted, channels, export.align))
    limits = []
    for measure, unit in (("weights", "weights"), ("macs", "multiply-accumulates")):
        cost = ChannelCost.of(coupling, shapes, measure)  # type: ignore[arg-type]
        limits.append(BudgetLimit(unit, cost, cost(wanted)))
    return narrowed(whole, coupling, aligned(wanted, channels, export.align, tuple(limits)))


def _speed(granularity: str, whole: Outline, left: Outline, export: ExportSection) -> tuple[Speed, str]:
    """Return the class of speed-up and its explanation."""
    if export.c:
        return "sparse", SPARSE_SPEED
    if left.macs < whole.macs:
        ratio = whole.macs / max(left.macs, 1)
        factor = f"{ratio:.1f} times fewer multiply-accumulates, which reduces latency"
        return ("compact and int8", f"{factor}; {INT8_SPEED}") if export.int8 else ("compact", factor)
    if export.int8:
        return "int8", f"{INT8_SPEED}; {NO_SPEED}"
    if granularity == "2:4":
        return "2:4", PATTERN_SPEED
    return "none", NO_SPEED


def _missing(target: Target, granularity: str, limits: Mapping[BudgetName, float | None]) -> Iterator[str]:
    """Return the requirements of the target that this plan does not meet."""
    pattern = target.requires.granularity
    if pattern is not None and granularity != pattern:
        yield f"{target.name} needs {pattern}: s2ap-deploy prune --granularity {pattern}"
    elif target.granularity == "channel" and granularity not in ("channel", "none"):
        yield f"{target.name} gains speed from channels that are gone: --granularity channel --keep-ratio 0.5"
    for name in target.requires.budgets:
        if limits[name] is None:
            yield f"{target.name} needs a limit on {UNITS[name]}: {OPTIONS[name]}"
