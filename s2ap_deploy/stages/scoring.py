"""From a recipe's prune section to the scored network that the search works on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError, InputError
from s2ap_deploy.models.channels.coupling import Coupling, channel_groups
from s2ap_deploy.pruning.allocation import Allocation, ChannelQuotas, Fixed, Global, Quotas
from s2ap_deploy.pruning.budgets import Shapes, erk, floors, total_kept, uniform
from s2ap_deploy.pruning.channel_budgets import ChannelCost, by_ratio, limit_of, within
from s2ap_deploy.pruning.granularity import Channels, Granularity, NOfM, Weights
from s2ap_deploy.pruning.initial_scores import (
    GRADIENT_BATCHES,
    Batches,
    initial_scores,
    mask_gradients,
    reinitialize,
)
from s2ap_deploy.pruning.masks import load_tensors
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.recipe.methods import METHODS, n_of_m
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.runtime import generator
from s2ap_deploy.training.objective import Objective


@dataclass(frozen=True, eq=False)
class Scoring:
    """``kept`` is the exact number of weights that the request leaves, None where the pattern decides.

    ``dense`` names the prunable layers that stay whole; they count in every sparsity.
    """

    scored: ScoredNetwork
    kept: int | None
    dense: tuple[str, ...]


def score(
    network: nn.Module,
    names: tuple[str, ...],
    input_size: tuple[int, int, int],
    section: PruneSection,
    seed: int,
) -> Scoring:
    """The network under the section's method, with its starting scores.

    ``names`` are the prunable weights in forward order; the last is the classifier's. ``input_size`` is
    (C, H, W). Raises ArchitectureError without any, UsageError and InputError for what does not fit the
    network.
    """
    if not names:
        raise ArchitectureError(
            "there is nothing to prune: a forward pass uses no weight of a convolution or linear layer",
            code="prunable-layers-missing",
            hint="weights are pruned in torch.nn.Conv2d and torch.nn.Linear, unless they are computed",
        )
    method = METHODS[section.method]
    if method.untrained:
        reinitialize(network, names, generator(seed, "untrain"))
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(parameters[name].shape) for name in names}
    ends = (names[0], names[-1]) if section.dense_ends else ()
    pattern = n_of_m(section.granularity)
    if pattern is not None:
        open_shapes = {name: shape for name, shape in shapes.items() if name not in ends}
        fitting, whole = NOfM.divide(open_shapes, *pattern)
        groups = NOfM(fitting, *pattern)
        scored = ScoredNetwork(
            network, groups, Fixed(groups.kept(shapes)), start(network, groups, section, seed)
        )
        return Scoring(scored, None, tuple(name for name in names if name in (*whole, *ends)))
    if section.granularity == "channel":
        return score_channels(network, input_size, shapes, section, seed)
    assert section.sparsity is not None
    weights = Weights(names)
    scored = ScoredNetwork(
        network,
        weights,
        allocation(shapes, section, classifier=names[-1], dense=ends, device=parameters[names[0]].device),
        start(network, weights, section, seed),
        covered=names[-1:],
    )
    total = sum(math.prod(shape) for shape in shapes.values())
    return Scoring(scored, total_kept(total, section.sparsity), ends)


def score_channels(
    network: nn.Module,
    input_size: tuple[int, int, int],
    shapes: Shapes,
    section: PruneSection,
    seed: int,
) -> Scoring:
    """One score per channel of every coupled group."""
    coupling = channel_groups(network, input_size)
    channels = {group.name: group.channels for group in coupling.groups}
    granularity = Channels(coupling, shapes)
    begin = start(network, granularity, section, seed)
    device = next(network.parameters()).device
    share = share_channels(coupling, channels, shapes, section, device)
    scored = ScoredNetwork(network, granularity, share, begin)
    return Scoring(scored, None, tuple(name for name, _ in coupling.skipped))


def share_channels(
    coupling: Coupling,
    channels: Mapping[str, int],
    shapes: Shapes,
    section: PruneSection,
    device: torch.device | None = None,
) -> Allocation:
    """How the groups share the channels that are kept."""
    if section.keep_ratio is not None:
        return Fixed(by_ratio(channels, section.keep_ratio))
    assert section.sparsity is not None
    cost = ChannelCost.of(coupling, shapes, "macs" if section.layer_budget == "macs" else "weights")
    if "learned" in METHODS[section.method].budgets:
        return ChannelQuotas(
            channels, cost, section.sparsity, compression_weight=section.compression_weight, device=device
        )
    whole = {name: float(count) for name, count in channels.items()}
    return Fixed(within(channels, whole, cost, limit_of(cost, channels, section.sparsity)))


def allocation(
    shapes: Shapes,
    section: PruneSection,
    *,
    classifier: str,
    dense: tuple[str, ...],
    device: torch.device | None = None,
) -> Allocation:
    """How the layers share the weights that are kept; what learns lies on ``device``, as the scores do."""
    assert section.sparsity is not None
    least = floors(shapes, classifier=classifier, dense=dense)
    budget = section.layer_budget
    if budget == "uniform":
        return Fixed(uniform(shapes, section.sparsity, least))
    if budget == "erk":
        return Fixed(erk(shapes, section.sparsity, least))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if budget == "global":
        return Global(sizes, section.sparsity, least)
    begin: float | dict[str, float] = 0.1
    if section.quota_start == "erk":
        keep = erk(shapes, section.sparsity, least)
        begin = {name: keep[name] / size for name, size in sizes.items()}
    return Quotas(
        shapes,
        section.sparsity,
        least,
        compression_weight=section.compression_weight,
        start=begin,
        device=device,
    )


def start(
    network: nn.Module, granularity: Granularity, section: PruneSection, seed: int
) -> dict[str, Tensor] | None:
    """Return the scores of an earlier run, or those that the method starts from.

    None for a method that starts from gradients: :func:`gradient_scores` computes them once the stage began.
    """
    parameters = dict(network.named_parameters())
    units = granularity.pool({name: parameters[name].detach() for name in granularity.parameters})
    if section.scores_from is None:
        return None if METHODS[section.method].gradients else initial_scores(section.method, units, seed)
    found = load_tensors(scores_file(section.scores_from))
    if missing := [name for name in units if name not in found]:
        raise InputError(
            f"{section.scores_from} has no scores of {missing[0]}",
            code="scores-missing",
            hint="scores come from a run on the same architecture and granularity",
        )
    return {name: found[name].to(unit.device) for name, unit in units.items()}


def gradient_scores(
    scored: ScoredNetwork, method: str, objective: Objective, batches: Batches, seed: int
) -> dict[str, Tensor]:
    """Compute the scores of a method that starts from gradients, on the first of the training batches."""
    first = itertools.islice(batches, GRADIENT_BATCHES)
    gradients = mask_gradients(scored.network, scored.granularity, first, objective, seed)
    return initial_scores(method, scored.granularity.pool(scored.weights), seed, gradients)


def scores_file(folder: str) -> Path:
    """Where a run folder keeps the scores of its search."""
    return Path(folder) / "search" / "scores.safetensors"
