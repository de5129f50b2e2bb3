"""Which channels of a network must vanish together.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900) proposes which rows and columns belong
to one channel.  It takes every operation that it does not know for an element-wise one, so nothing is
believed unchecked: every proposal is put to the ``trial``, and what fails is left out and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from s2ap_deploy.models.channels.coupling_check import Trial, first_line
from s2ap_deploy.models.channels.layer_channels import (
    ChannelGroup,
    Coupling,
    Slice,
    is_depthwise,
    macs,
    macs_kept,
    places,
    sliced,
    tensor_names,
    unread,
    weights_kept,
)
from s2ap_deploy.models.classifier import prunable

__all__ = [
    "ChannelGroup",
    "Coupling",
    "Slice",
    "channel_groups",
    "macs",
    "macs_kept",
    "sliced",
    "unread",
    "weights_kept",
]

Numbers = npt.NDArray[np.int64]
Side = tuple[str, int]
"""A tensor's name and one of its dimensions."""
_NOTHING = np.empty(0, dtype=np.int64)


def channel_groups(network: nn.Module, input_size: tuple[int, int, int]) -> Coupling:
    """The groups of ``network`` for images of ``input_size`` (C, H, W); the network itself is not touched.

    The image's own channels and the logits are in no group.  Raises ArchitectureError when the network
    cannot run on ``input_size`` or cannot be copied.
    """
    names = tensor_names(network)
    weights = tuple(names[id(network.get_parameter(name))] for name in prunable(network, input_size))
    positions = places(network, input_size)
    with torch.inference_mode(False):
        trial = Trial(network, input_size)
        proposal = _propose(trial, weights)
        accepted: list[ChannelGroup] = []
        for group, reason in trial.judge(proposal.groups, accepted):
            proposal.skip((touched.parameter for touched in group.writers), reason)
    rows: Counter[str] = Counter()
    for group in accepted:
        rows.update({touched.parameter: touched.index.numel() for touched in group.writers})
    lost = (name for name in weights if rows[name] < trial.tensors[name].shape[0])
    proposal.skip(lost, "Torch-Pruning does not see where its outputs go")
    return Coupling(
        groups=tuple(accepted),
        skipped=tuple((name, proposal.skipped[name]) for name in weights if name in proposal.skipped),
        classifier=tuple(name for name in weights if name in proposal.classifier),
        weights=weights,
        positions=positions,
    )


@dataclass
class _Proposal:
    """Groups as Torch-Pruning sees them, not yet tried; what is left out of them, and why."""

    groups: list[ChannelGroup] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    classifier: set[str] = field(default_factory=set)

    def skip(self, names: Iterable[str], reason: str) -> None:
        """Say ``reason`` for those of ``names`` about which nothing is known yet."""
        for name in names:
            if name not in self.classifier:
                self.skipped.setdefault(name, reason)


class _Numbering:
    """One number for every row and column: rows of weights in forward order, other rows, columns."""

    def __init__(self, tensors: Mapping[str, Tensor], weights: tuple[str, ...]) -> None:
        others = (name for name, tensor in tensors.items() if name not in weights and tensor.dim() > 0)
        self.sides: list[Side] = [(name, 0) for name in (*weights, *others)] + [(name, 1) for name in weights]
        self.sizes = {(name, dim): tensors[name].shape[dim] for name, dim in self.sides}
        self.starts = np.cumsum([0, *self.sizes.values()])
        self._start = dict(zip(self.sides, self.starts.tolist(), strict=False))

    def of(self, side: Side, positions: list[int]) -> Numbers:
        """Numbers of ``positions`` on ``side``; raises ValueError for one that is not there."""
        found = np.asarray(positions, dtype=np.int64)
        if found.size and not 0 <= found.min() <= found.max() < self.sizes[side]:
            raise ValueError(f"it leads them to places that {side[0]} does not have")
        return np.asarray(found + self._start[side], dtype=np.int64)

    def split(self, numbers: Numbers) -> tuple[list[int], list[int]]:
        """For each number which entry of ``sides`` it belongs to, and its position there."""
        side = np.searchsorted(self.starts, numbers, side="right") - 1
        return side.tolist(), (numbers - self.starts[side]).tolist()


class _Channel:
    """Positions that must vanish together: ``positions[i]`` on ``sides[i]``, rows of weights first.

    ``fault`` says why they cannot; ``answers`` whether they are among the logits.
    """

    def __init__(self, fault: str | None, answers: bool) -> None:
        self.fault = fault
        self.answers = answers
        self.places: list[tuple[Side, int]] = []

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(side for side, _ in self.places)

    @property
    def positions(self) -> list[int]:
        return [position for _, position in self.places]

    @property
    def writers(self) -> list[str]:
        return [name for name, dim in self.sides if dim == 0]

    @property
    def is_read(self) -> bool:
        return any(dim == 1 for _, dim in self.sides)


class _Links:
    """What Torch-Pruning finds when it follows the rows of one layer after the other.

    ``pairs`` are numbers of positions of one channel; ``faults`` rows that reach something whose channels
    cannot vanish, with the reason; ``answers`` rows that reach the logits.
    """

    def __init__(self, trial: Trial, numbering: _Numbering) -> None:
        self.pairs: list[tuple[Numbers, Numbers]] = []
        self.faults: list[tuple[Numbers, str]] = []
        self.answers: list[Numbers] = []
        self._names = tensor_names(trial.twin)
        self._numbering = numbering
        self._followed: dict[nn.Module, set[int]] = {}
        # Not its own way of calling the network, which tries an image without a batch first.
        self._graph = torch_pruning.DependencyGraph().build_dependency(
            trial.twin, trial.image, forward_fn=lambda network, image: network(image), verbose=False
        )
        self._ends = [node for node in self._graph.module2node.values() if not node.outputs]

    def follow(self, name: str, layer: nn.Module) -> None:
        """Add what the rows of ``layer``, whose weight is called ``name``, are connected with."""
        count = self._numbering.sizes[name, 0]
        if layer not in self._graph.module2node or len(self._followed.get(layer, ())) == count:
            return
        every = self._numbering.of((name, 0), list(range(count)))
        try:
            rows = self._graph.get_pruner_of_module(layer).prune_out_channels
            for item in self._graph.get_pruning_group(layer, rows, list(range(count))):
                self._add(item, (name, 0))
        except Exception as error:  # it fails in many ways on what it does not know
            self.faults.append((every, f"Torch-Pruning cannot follow its channels: {first_line(error)}"))

    def channels(self) -> list[_Channel]:
        """Everything that was followed, channel by channel, in order of the rows."""
        pairs = [*self.pairs, *((rows, rows) for rows, _ in self.faults), (_NOTHING, _NOTHING)]
        one, other = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
        total = int(self._numbering.starts[-1])
        matrix = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(total, total))
        label = connected_components(matrix, directed=False)[1]
        faults = {found: reason for rows, reason in reversed(self.faults) for found in label[rows].tolist()}
        answers = {found for rows in self.answers for found in label[rows].tolist()}
        reached = np.unique(np.concatenate([one, other]))
        members: dict[int, _Channel] = {}
        for found, number, position in zip(
            label[reached].tolist(), *self._numbering.split(reached), strict=True
        ):
            channel = members.setdefault(found, _Channel(faults.get(found), found in answers))
            channel.places.append((self._numbering.sides[number], position))
        return list(members.values())

    def _add(self, item: Any, root: Side) -> None:
        """One member of a group: ``item.idxs`` are its positions, ``item.root_idxs`` the rows of the root."""
        node, module = item.dep.target, item.dep.target.module
        origins = self._numbering.of(root, item.root_idxs)
        reads = not self._graph.is_out_channel_pruning_fn(item.dep.handler)
        if not reads and any(node is end for end in self._ends):
            self.answers.append(origins)
        try:
            sides = self._sides(module, reads)
        except _NotSeparable as obstacle:
            self.faults.append((origins, str(obstacle)))
            return
        self.pairs += [(origins, self._numbering.of(side, item.idxs)) for side in sides]
        if not reads:
            self._followed.setdefault(module, set()).update(item.idxs)

    def _sides(self, module: Any, reads: bool) -> list[Side]:
        """The dimensions of tensors on which ``module`` keeps the channels that it reads or writes."""
        if isinstance(module, nn.Parameter):
            raise _NotSeparable(f"its channels meet {self._name(module)}, which belongs to no layer")
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if getattr(module, "groups", 1) > 1 and not is_depthwise(module):
                raise _NotSeparable(f"the grouped convolution {self._name(module.weight)} ties its channels")
            if reads and not is_depthwise(module):
                return [(self._name(module.weight), 1)]
            kept = [module.weight, module.bias]
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            kept = [module.weight, module.bias, module.running_mean, module.running_var]
        elif isinstance(module, nn.PReLU):
            kept = [module.weight] if module.num_parameters > 1 else []
        elif next(module.parameters(), None) is None:
            kept = []
        else:
            raise _NotSeparable(f"its channels pass {type(module).__name__}, which ties them")
        return [(self._name(tensor), 0) for tensor in kept if tensor is not None]

    def _name(self, tensor: Tensor) -> str:
        try:
            return self._names[id(tensor)]
        except KeyError:
            raise _NotSeparable("its channels pass weights that every forward pass computes anew") from None


class _NotSeparable(Exception):
    """A module through which channels cannot vanish one by one."""


def _propose(trial: Trial, weights: tuple[str, ...]) -> _Proposal:
    """Groups as Torch-Pruning sees them, not yet tried."""
    proposal = _Proposal()
    numbering = _Numbering(trial.tensors, weights)
    names = tensor_names(trial.twin)
    try:
        with torch.enable_grad():  # Torch-Pruning reads the graph of the backward pass
            links = _Links(trial, numbering)
    except Exception as error:  # it fails in many ways on what it does not know
        proposal.skip(weights, f"Torch-Pruning cannot trace the network: {first_line(error)}")
        return proposal
    layers = [module for module in trial.twin.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for name in weights:
        for layer in layers:
            if names.get(id(layer.weight)) == name:
                links.follow(name, layer)
    channels = links.channels()
    for channel in channels:
        if channel.answers:
            proposal.classifier.update(channel.writers)
    alike: dict[tuple[Side, ...], list[list[int]]] = {}
    for channel in channels:
        if channel.fault is not None:
            proposal.skip(channel.writers, channel.fault)
        elif not channel.is_read:
            proposal.skip(channel.writers, "Torch-Pruning finds no layer that reads its outputs")
        elif not channel.answers:
            alike.setdefault(channel.sides, []).append(channel.positions)
    proposal.groups = _groups(alike)
    return proposal


def _groups(alike: Mapping[tuple[Side, ...], list[list[int]]]) -> list[ChannelGroup]:
    """One group for channels that lie on the same sides; ``alike`` gives the positions of each there."""
    shared = Counter(sides[0][0] for sides in alike)
    groups = []
    for sides, channels in alike.items():
        index = torch.tensor(channels, dtype=torch.int64)
        slices = []
        for name, dim in dict.fromkeys(sides):
            columns = [number for number, side in enumerate(sides) if side == (name, dim)]
            slices.append(Slice(name, dim, index[:, columns].contiguous()))
        first = sides[0][0]
        groups.append(
            ChannelGroup(
                name=first if shared[first] == 1 else f"{first}[{channels[0][0]}]",
                channels=len(channels),
                writers=tuple(touched for touched in slices if touched.dim == 0),
                readers=tuple(touched for touched in slices if touched.dim == 1),
            )
        )
    return groups
