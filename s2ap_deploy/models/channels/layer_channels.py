"""Groups of channels that can only be removed together, and the size of a network without some of them.

A channel is a row of the layer that writes it and a column of every layer that reads it; a residual addition
makes one channel of the rows of all its branches. ``coupling`` finds the groups of a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.used_weights import used_weights


@dataclass(frozen=True, eq=False)
class Slice:
    """The positions of a group in one tensor of the network.

    Attributes:
        parameter: the tensor's name among the parameters and buffers.
        dim: 0 is the output side (rows), 1 the input side (columns).
        index: int64 [channels, width], the positions of each channel; the width is above 1 where a channel
            has several, as the pixels of a flattened map.
    """

    parameter: str
    dim: int
    index: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """``channels`` channels, of which each can only be removed from all slices at once.

    Attributes:
        name: the weight among the writers that a forward pass uses first, with its first row in brackets
            where groups share that weight.
        writers: rows of convolutions and linear layers, their biases, and what normalization, PReLU and
            depthwise convolutions hold per channel.
        readers: columns.
    """

    name: str
    channels: int
    writers: tuple[Slice, ...]
    readers: tuple[Slice, ...]


@dataclass(frozen=True, eq=False)
class Coupling:
    """The groups of a network in forward order; no position of a tensor is in two of them.

    Attributes:
        skipped: every weight that has rows in no group, with the reason.
        classifier: the weights whose rows are the logits.
        weights: the prunable weights in forward order.
        positions: for each layer that is called, how often per image its weights are applied.
    """

    groups: tuple[ChannelGroup, ...]
    skipped: tuple[tuple[str, str], ...]
    classifier: tuple[str, ...]
    weights: tuple[str, ...]
    positions: Mapping[str, int]


def tensor_names(network: nn.Module) -> dict[int, str]:
    """Map identities of parameters and buffers to names; a shared tensor has its first name."""
    named = (*network.named_parameters(), *network.named_buffers())
    return {id(tensor): name for name, tensor in named}


def is_depthwise(module: object) -> bool:
    """Return True where every output channel is computed from the input channel of the same number."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def sliced(
    tensors: Mapping[str, Tensor], groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``tensors`` with only the channels ``kept`` (indices by name of group), in their order.

    Groups that ``kept`` does not name stay whole. A depthwise convolution also needs its ``groups`` changed.

    Raises:
        UsageError: for a name that is no group, a channel that does not exist and a group without any.
    """
    small = dict(tensors)
    for (name, dim), gone in positions_gone(groups, kept).items():
        stays = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
        stays[gone] = False
        small[name] = small[name].index_select(dim, stays.nonzero().squeeze(1).to(small[name].device))
    return small


def unread(
    tensors: Mapping[str, Tensor], groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``tensors`` of the same shapes, with zeros where a layer reads a channel that is not ``kept``.

    The network computes with them what it computes with those of :func:`sliced`. Errors as there.
    """
    masked = dict(tensors)
    for (name, dim), gone in positions_gone(groups, kept, writers=False).items():
        masked[name] = masked[name].index_fill(dim, gone.to(masked[name].device), 0.0)
    return masked


def positions_gone(
    groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor], *, writers: bool = True
) -> dict[tuple[str, int], Tensor]:
    """Return the positions int64 [n] to remove, by tensor and dimension, so that the channels ``kept`` stay.

    ``writers``: remove rows as well as columns. Errors as for :func:`sliced`.
    """
    groups = tuple(groups)
    _check_group_names(kept, groups)
    found: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        if group.name not in kept:
            continue
        goes = torch.ones(group.channels, dtype=torch.bool)
        goes[_channels(kept[group.name], group)] = False
        for touched in (*(group.writers if writers else ()), *group.readers):
            parts = found.setdefault((touched.parameter, touched.dim), [])
            parts.append(touched.index[goes].flatten())
    return {place: torch.cat(parts) for place, parts in found.items()}


def places(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Count how often per image each counted weight is applied, by name, in order of first use.

    Raises ArchitectureError when the network cannot run on ``input_size`` (C, H, W).
    """
    used = used_weights(network, input_size)
    return {name: used.macs[name] // network.get_parameter(name).numel() for name in used.counted}


def macs(network: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Count multiply-accumulates per image of all weights that multiply activations.

    Products of two activations, as in attention, do not count. Raises ArchitectureError when the network
    cannot run on ``input_size`` (C, H, W).
    """
    return sum(used_weights(network, input_size).macs.values())


def weights_kept(coupling: Coupling, keep: Mapping[str, int], network: nn.Module) -> int:
    """Count the prunable weights that remain when each group keeps ``keep`` channels.

    Groups that ``keep`` does not name stay whole. ``network`` is the one that was coupled, at full width.

    Raises:
        UsageError: for a name that is no group and for a number outside 1..channels.
    """
    return sum(_sizes(coupling, keep, network).values())


def macs_kept(coupling: Coupling, keep: Mapping[str, int], network: nn.Module) -> int:
    """Count :func:`macs` when each group keeps ``keep`` channels; arguments as for :func:`weights_kept`."""
    sizes = _sizes(coupling, keep, network)
    return sum(size * coupling.positions.get(name, 0) for name, size in sizes.items())


def _sizes(coupling: Coupling, keep: Mapping[str, int], network: nn.Module) -> dict[str, int]:
    """Count the values of every prunable weight when each group keeps that many channels."""
    _check_group_names(keep, coupling.groups)
    sides = {name: list(network.get_parameter(name).shape) for name in coupling.weights}
    for group in coupling.groups:
        count = keep.get(group.name, group.channels)
        if not 1 <= count <= group.channels:
            raise UsageError(
                f"{group.name} cannot keep {count} of its {group.channels} channels",
                code="channel-count-out-of-range",
                hint=f"keep between 1 and {group.channels}",
            )
        for touched in (*group.writers, *group.readers):
            if touched.parameter in sides:
                width = touched.index.shape[1]
                sides[touched.parameter][touched.dim] -= (group.channels - count) * width
    return {name: math.prod(shape) for name, shape in sides.items()}


def _channels(indices: Tensor, group: ChannelGroup) -> Tensor:
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise UsageError(
            f"the channels of {group.name} are indices in one dimension, not a mask", code="channels-invalid"
        )
    if indices.numel() == 0 or not 0 <= int(indices.min()) <= int(indices.max()) < group.channels:
        raise UsageError(
            f"{group.name} must keep at least one of its channels 0..{group.channels - 1}",
            code="channels-invalid",
        )
    return indices.to("cpu", torch.int64)


def _check_group_names(named: Mapping[str, object], groups: Iterable[ChannelGroup]) -> None:
    unknown = named.keys() - {group.name for group in groups}
    if unknown:
        raise UsageError(
            f"there is no group of channels {min(unknown)!r}",
            code="channel-group-unknown",
            hint="the names are those of Coupling.groups; Coupling.skipped lists what is in none",
        )
