"""Build the network with smaller layers from a run that pruned channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError, UsageError, VerificationError
from s2ap_deploy.models.channels.coupling import Coupling, channel_groups
from s2ap_deploy.models.channels.layer_channels import macs
from s2ap_deploy.models.channels.narrowing import LayerConfig, check_equal, compacted, make_plan
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.onnx_export.export_report import (
    CompactFile,
    CostChange,
    NarrowedGroup,
    Narrowing,
    SkippedWeight,
)
from s2ap_deploy.pruning.budgets import BudgetLimit, ChannelCost, aligned, by_ratio, chosen, filled, survivors
from s2ap_deploy.pruning.granularity import Channels
from s2ap_deploy.pruning.masks import load_tensors
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.runtime import generator
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.stages.prune import SCORES

WEIGHTS = "compact.safetensors"
PLAN = "compact.json"
PROBES = 8


@dataclass(frozen=True, eq=False)
class NarrowNetwork:
    """``network`` computes what ``reference`` computes, which has all channels and zeros by its ``masks``.

    ``changed`` are the changed constructor arguments of its layers; ``kept`` the channels of every group.
    """

    reference: nn.Module
    network: Classifier
    masks: dict[str, Tensor]
    coupling: Coupling
    kept: dict[str, Tensor]
    changed: dict[str, LayerConfig]
    record: Narrowing


def by_channels(job: RunContext) -> bool:
    """Return whether this run pruned channels."""
    return job.recipe.prune is not None and job.recipe.prune.granularity == "channel"


def refuse_unfit(job: RunContext, section: ExportSection) -> None:
    """Raise UsageError for options that need a run on channels."""
    given = {
        "--keep-ratio": section.reselects,
        "--align": section.align > 1,
        "--torch": section.torch,
    }
    asked = [option for option, there in given.items() if there]
    if asked and not by_channels(job):
        how = f"by {job.recipe.prune.granularity}" if job.recipe.prune is not None else "not at all"
        raise UsageError(
            f"{', '.join(asked)}: the run was pruned {how}, so its layers keep their shapes",
            code="channels-not-pruned",
            hint="prune with --granularity channel, or leave the option out",
        )


def narrowed(
    job: RunContext,
    classifier: Classifier,
    info: CheckpointInfo,
    masks: Mapping[str, Tensor],
    section: ExportSection,
) -> NarrowNetwork:
    """Remove the pruned channels from ``classifier``.

    ``masks`` are the run's. With a keep ratio the channels are chosen again by the run's scores, among those
    that the search kept. Raises UsageError for a ratio that leaves nothing to choose, empties a group or
    cannot be aligned, RunFolderError for scores of another network, and VerificationError when the smaller
    network computes something else or does not have the requested size.
    """
    size = info.preprocessing.size
    whole = copy.deepcopy(classifier).cpu().eval()
    coupling = channel_groups(whole, size)
    channels = {group.name: group.channels for group in coupling.groups}
    granularity = Channels(
        coupling, {name: tuple(whole.get_parameter(name).shape) for name in coupling.weights}
    )
    costs = {
        "weights": ChannelCost.of(coupling, granularity.shapes, "weights"),
        "multiply-accumulates": ChannelCost.of(coupling, granularity.shapes, "macs"),
    }
    # Count the channels to keep in every group.
    alive = survivors(coupling, masks)
    searched = {name: max(1, int(reads.sum())) for name, reads in alive.items()}
    if not section.reselects:
        wanted = searched
        counts = filled(wanted, channels, section.align)
        scores = {name: torch.zeros(count) for name, count in channels.items()}
    else:
        wanted = _wanted(channels, searched, section.keep_ratio or 1)
        limits = tuple(BudgetLimit(unit, cost, cost(wanted)) for unit, cost in costs.items())
        counts = aligned(wanted, channels, section.align, limits)
        scores = _scores(job, channels)
    # Choose them by score, and build the smaller layers.
    kept = chosen(scores, alive, counts)
    own_masks = {name: mask.bool().cpu() for name, mask in masks.items()}
    if section.reselects:
        own_masks = _mask(whole, granularity, kept, own_masks)
    small, changed = compacted(whole, coupling.groups, kept)
    assert isinstance(small, Classifier)
    images = torch.rand(PROBES, *size, generator=generator("compact", "images"))
    record = Narrowing(
        keep_ratio=section.keep_ratio if section.reselects else None,
        align=section.align,
        groups=tuple(
            NarrowedGroup(
                name=name,
                channels=count,
                searched=searched[name],
                wanted=wanted[name],
                kept=len(kept[name]),
            )
            for name, count in channels.items()
        ),
        skipped=tuple(SkippedWeight(name=name, reason=reason) for name, reason in coupling.skipped),
        classifier=coupling.classifier,
        weights=_cost(costs["weights"], channels, wanted, counts),
        macs=_cost(costs["multiply-accumulates"], channels, wanted, counts),
        max_logit_difference=check_equal(whole, small, images),
    )
    _check_size(small, coupling, record, size)
    return NarrowNetwork(whole, small, own_masks, coupling, kept, changed, record)


def save_pair(
    onnx_file: Path, narrow: NarrowNetwork, classifier: nn.Module, info: CheckpointInfo, job: RunContext
) -> list[Path]:
    """Write the smaller network next to ``onnx_file``: weights as safetensors, and the plan.

    ``classifier`` and ``info`` are those of the network that it was made from. Both files are read back.
    Raises VerificationError when they do not restore the network, and then removes all three files.
    """
    weights, plan = onnx_file.with_name(WEIGHTS), onnx_file.with_name(PLAN)
    zeros = sum(int((narrow.network.get_parameter(name) == 0).sum()) for name in narrow.coupling.weights)
    sparsity = zeros / narrow.record.weights.achieved if zeros else None
    try:
        checkpoint.save(weights, narrow.network, info.model_copy(update={"sparsity": sparsity}))
        make_plan(
            narrow.reference,
            narrow.network,
            narrow.changed,
            narrow.coupling,
            narrow.kept,
            info=info,
            source_sha256=info.source_sha256,
            source_weights_sha256=weights_hash(classifier),
            sha256=files.sha256(weights),
        ).save(plan)
        read, _, _ = checkpoint.load(weights, arch=job.machine.arch)
        if weights_hash(read) != weights_hash(narrow.network):
            raise VerificationError(
                f"{weights} does not restore the written network", code="compact-file-differs"
            )
    except BaseException:
        for path in (onnx_file, weights, plan):
            files.remove(path)
        raise
    return [weights, plan]


def described(paths: list[Path]) -> tuple[CompactFile, ...]:
    """Return the files with their hashes."""
    return tuple(CompactFile(name=path.name, sha256=files.sha256(path)) for path in paths)


def _wanted(channels: Mapping[str, int], searched: Mapping[str, int], ratio: float) -> dict[str, int]:
    """Return the channels per group at ``ratio``, at most those that the search kept."""
    asked = by_ratio(channels, ratio)
    wanted = {name: min(count, searched[name]) for name, count in asked.items()}
    if wanted == searched:
        share = sum(searched.values()) / sum(channels.values())
        raise UsageError(
            f"keep ratio {ratio:g} removes nothing: the run keeps {share:.1%} of its channels, and "
            "in no group more than that ratio",
            code="keep-ratio-too-high",
            hint="use a lower --keep-ratio, or omit it to export the channels of the run",
        )
    return wanted


def _scores(job: RunContext, channels: Mapping[str, int]) -> dict[str, Tensor]:
    path = job.run.output("search", SCORES)
    scores = load_tensors(path)
    if {name: tuple(score.shape) for name, score in scores.items()} != {n: (c,) for n, c in channels.items()}:
        raise RunFolderError(
            f"the scores in {path} are not those of this network's groups of channels",
            code="scores-not-matching",
            hint="prune again with --overwrite",
        )
    return scores


@torch.no_grad()
def _mask(
    network: nn.Module, granularity: Channels, kept: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Zero the weights of channels that are not ``kept``; return the resulting masks."""
    selection = {}
    for name, group in granularity.groups.items():
        selection[name] = torch.zeros(group.channels, dtype=torch.bool)
        selection[name][kept[name]] = True
    both = {name: mask & masks[name] for name, mask in granularity.final(selection).items()}
    for name, mask in both.items():
        weight = network.get_parameter(name)
        weight.copy_(torch.where(mask, weight, torch.zeros(())))
    return both


def _cost(
    cost: ChannelCost, channels: Mapping[str, int], wanted: Mapping[str, int], counts: Mapping[str, int]
) -> CostChange:
    return CostChange(before=cost(channels), wanted=cost(wanted), achieved=cost(counts))


def _check_size(
    network: nn.Module, coupling: Coupling, record: Narrowing, size: tuple[int, int, int]
) -> None:
    """Compare the size of the network that was built with the computed one."""
    built = {
        "weights": (sum(network.get_parameter(name).numel() for name in coupling.weights), record.weights),
        "multiply-accumulates": (macs(network, size), record.macs),
    }
    for unit, (found, cost) in built.items():
        if found != cost.achieved:
            raise VerificationError(
                f"the smaller network has {found:,} {unit}, not {cost.achieved:,}",
                code="compact-size-differs",
            )
        if record.reselected and found > cost.wanted:
            raise VerificationError(
                f"the smaller network has {found:,} {unit}, more than the {cost.wanted:,} of the keep ratio",
                code="compact-size-differs",
            )
