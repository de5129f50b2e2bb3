"""Find the channels of a network that can only be removed together.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900) proposes which rows and columns belong
to one channel. It treats every operation that it does not know as an element-wise one, so every proposal is
verified by ``coupling_check``, and what fails is left out and named.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.func import functional_call

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.channels.layer_channels import (
    ChannelGroup,
    Coupling,
    Slice,
    is_depthwise,
    places,
    sliced,
    tensor_names,
    unread,
)
from s2ap_deploy.models.classifier import dry_run
from s2ap_deploy.models.used_weights import prunable
from s2ap_deploy.plugins import reason
from s2ap_deploy.runtime import generator


class CouplingCheck:
    """A copy of the network with random weights, on which proposed groups are verified.

    The weights are random, because a pruned network does not use all of its connections; the precision is
    double where the network allows it, so that a wrong coupling is not hidden by rounding.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.network, self.tolerance = _randomized(network, torch.float64), 1e-9
        try:
            dry_run(self.network, input_size)
        except ArchitectureError:  # its forward pass needs single precision
            self.network, self.tolerance = _randomized(network, torch.float32), 1e-4
            dry_run(self.network, input_size)
        dtype = next((tensor.dtype for tensor in self.network.parameters()), torch.float32)
        self.tensors: dict[str, Tensor] = dict(
            (*self.network.named_parameters(), *self.network.named_buffers())
        )
        self.image = torch.randn(1, *input_size, generator=generator("coupling", "image"), dtype=dtype)

    def verify(
        self, groups: Sequence[ChannelGroup], accepted: list[ChannelGroup]
    ) -> Iterator[tuple[ChannelGroup, str]]:
        """Append the ``groups`` that pass to ``accepted``; yield the others, with the reason."""
        if not groups:
            return
        fault = self._fault([*accepted, *groups])
        if fault is None:
            accepted += groups
        elif len(groups) == 1:
            yield groups[0], fault
        else:
            middle = len(groups) // 2
            yield from self.verify(groups[:middle], accepted)
            yield from self.verify(groups[middle:], accepted)

    def _fault(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Return why channels of all these groups cannot be removed together; None if they can."""
        faults = (self._fault_of(groups, kept) for kept in _choices(groups))
        return next((fault for fault in faults if fault is not None), None)

    def _fault_of(self, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor]) -> str | None:
        small = sliced(self.tensors, groups, kept)
        with torch.no_grad():
            expected = functional_call(self.network, unread(self.tensors, groups, kept), self.image)
            try:
                with _narrowed(self.network, small):
                    found = functional_call(self.network, small, self.image)
            except Exception as error:  # the network may be the user's own code
                return f"the network does not run without some of its channels: {reason(error)}"
        bound = self.tolerance * expected.abs().max()
        if found.shape != expected.shape or not (found - expected).abs().max() <= bound:
            return "removing channels changes what the others compute"
        return None


def _choices(groups: Sequence[ChannelGroup]) -> Iterator[dict[str, Tensor]]:
    """Yield the channels of each group to keep, one experiment after the other.

    Channels are numbered at random, and every experiment divides them by one binary digit. So any two of up
    to sixteen are distinguished, and an error among more would have to respect sixteen random classes.
    """
    codes = {
        group.name: torch.randperm(group.channels, generator=generator("coupling", group.name))
        for group in groups
    }
    # The first digit both ways: a channel that a ReLU keeps at 0 does not show what depends on it.
    for digit, value in ((0, 0), (0, 1), (1, 0), (2, 1), (3, 0)):
        kept = {name: ((code >> digit) & 1 == value).nonzero().squeeze(1) for name, code in codes.items()}
        # A group with too few channels for this digit may have none left, and stays whole.
        yield {name: channels for name, channels in kept.items() if len(channels)}


def _randomized(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    try:
        network = copy.deepcopy(network).to("cpu", dtype).eval().requires_grad_(True)
    except Exception as error:  # computed weights, modules that refuse
        raise ArchitectureError(
            f"the network cannot be copied: {reason(error)}", code="network-not-copyable"
        ) from error
    draws = generator("coupling", "weights")

    def uniform(tensor: Tensor) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=draws, dtype=dtype) + 0.5)

    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() < 2:
                uniform(parameter)
                continue
            # He et al. 2015 (arXiv 1502.01852), equation 10: what happens early still shows at the end.
            gain = math.sqrt(2 / max(1, math.prod(parameter.shape[1:])))
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=dtype) * gain)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        uniform(statistic)
    return network


@contextlib.contextmanager
def _narrowed(network: nn.Module, small: Mapping[str, Tensor]) -> Iterator[None]:
    """Give depthwise convolutions of ``network`` as many groups as their weights in ``small`` have rows."""
    names = tensor_names(network)
    depthwise: list[Any] = [module for module in network.modules() if is_depthwise(module)]
    widths = [module.groups for module in depthwise]
    for module in depthwise:
        module.groups = small[names[id(module.weight)]].shape[0]
    try:
        yield
    finally:
        for module, width in zip(depthwise, widths, strict=True):
            module.groups = width


__all__ = ["Coupling", "Slice", "channel_groups"]

Indices = npt.NDArray[np.int64]
Side = tuple[str, int]
"""A tensor's name and one of its dimensions."""
_NOTHING = np.empty(0, dtype=np.int64)


def channel_groups(network: nn.Module, input_size: tuple[int, int, int]) -> Coupling:
    """Return the groups of ``network`` for images of ``input_size`` (C, H, W); the network is not changed.

    The image's own channels and the logits are in no group.

    Raises:
        ArchitectureError: when the network cannot run on ``input_size`` or cannot be copied.
    """
    names = tensor_names(network)
    weights = tuple(names[id(network.get_parameter(name))] for name in prunable(network, input_size))
    positions = places(network, input_size)
    with torch.inference_mode(False):
        check = CouplingCheck(network, input_size)
        proposal = _propose(check, weights)
        accepted: list[ChannelGroup] = []
        for group, fault in check.verify(proposal.groups, accepted):
            proposal.skip((touched.parameter for touched in group.writers), fault)
    rows: Counter[str] = Counter()
    for group in accepted:
        rows.update({touched.parameter: touched.index.numel() for touched in group.writers})
    lost = (name for name in weights if rows[name] < check.tensors[name].shape[0])
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
    """Groups as Torch-Pruning proposes them, not yet verified; what is left out of them, and why."""

    groups: list[ChannelGroup] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    classifier: set[str] = field(default_factory=set)

    def skip(self, names: Iterable[str], fault: str) -> None:
        """Record ``fault`` for those of ``names`` that have no record yet."""
        for name in names:
            if name not in self.classifier:
                self.skipped.setdefault(name, fault)


class _Indexing:
    """One index for every row and column: rows of weights in forward order, other rows, columns."""

    def __init__(self, tensors: Mapping[str, Tensor], weights: tuple[str, ...]) -> None:
        others = (name for name, tensor in tensors.items() if name not in weights and tensor.dim() > 0)
        self.sides: list[Side] = [(name, 0) for name in (*weights, *others)] + [(name, 1) for name in weights]
        self.sizes = {(name, dim): tensors[name].shape[dim] for name, dim in self.sides}
        self.starts = np.cumsum([0, *self.sizes.values()])
        self._start = dict(zip(self.sides, self.starts.tolist(), strict=False))

    def of(self, side: Side, positions: list[int]) -> Indices:
        """Return the indices of ``positions`` on ``side``; raises ValueError for one that is not there."""
        found = np.asarray(positions, dtype=np.int64)
        if found.size and not 0 <= found.min() <= found.max() < self.sizes[side]:
            raise ValueError(f"it maps them to positions that {side[0]} does not have")
        return np.asarray(found + self._start[side], dtype=np.int64)

    def split(self, indices: Indices) -> tuple[list[int], list[int]]:
        """Return for each index the entry of ``sides`` that it belongs to, and its position there."""
        side = np.searchsorted(self.starts, indices, side="right") - 1
        return side.tolist(), (indices - self.starts[side]).tolist()


class _Channel:
    """Positions that can only be removed together: ``positions[i]`` on ``sides[i]``, rows of weights first.

    ``fault`` says why they cannot; ``is_logit`` whether they are among the logits.
    """

    def __init__(self, fault: str | None, is_logit: bool) -> None:
        self.fault = fault
        self.is_logit = is_logit
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
    """Connections that Torch-Pruning finds by following the rows of each layer.

    ``pairs`` are indices of positions of one channel; ``faults`` rows that reach something whose channels
    cannot be removed, with the reason; ``logits`` rows that reach the logits.
    """

    def __init__(self, check: CouplingCheck, indexing: _Indexing) -> None:
        self.pairs: list[tuple[Indices, Indices]] = []
        self.faults: list[tuple[Indices, str]] = []
        self.logits: list[Indices] = []
        self._names = tensor_names(check.network)
        self._indexing = indexing
        self._followed: dict[nn.Module, set[int]] = {}
        # Not its own way of calling the network, which tries an image without a batch first.
        self._graph = torch_pruning.DependencyGraph().build_dependency(
            check.network, check.image, forward_fn=lambda network, image: network(image), verbose=False
        )
        self._ends = [node for node in self._graph.module2node.values() if not node.outputs]

    def follow(self, name: str, layer: nn.Module) -> None:
        """Add the connections of the rows of ``layer``, whose weight is called ``name``."""
        count = self._indexing.sizes[name, 0]
        if layer not in self._graph.module2node or len(self._followed.get(layer, ())) == count:
            return
        every = self._indexing.of((name, 0), list(range(count)))
        try:
            rows = self._graph.get_pruner_of_module(layer).prune_out_channels
            for item in self._graph.get_pruning_group(layer, rows, list(range(count))):
                self._add(item, (name, 0))
        except Exception as error:  # it fails in many ways on what it does not know
            self.faults.append((every, f"Torch-Pruning cannot follow its channels: {reason(error)}"))

    def channels(self) -> list[_Channel]:
        """Return everything that was followed, channel by channel, in order of the rows."""
        pairs = [*self.pairs, *((rows, rows) for rows, _ in self.faults), (_NOTHING, _NOTHING)]
        one, other = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
        total = int(self._indexing.starts[-1])
        matrix = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(total, total))
        label = connected_components(matrix, directed=False)[1]
        faults = {found: reason for rows, reason in reversed(self.faults) for found in label[rows].tolist()}
        logits = {found for rows in self.logits for found in label[rows].tolist()}
        reached = np.unique(np.concatenate([one, other]))
        members: dict[int, _Channel] = {}
        for found, number, position in zip(
            label[reached].tolist(), *self._indexing.split(reached), strict=True
        ):
            channel = members.setdefault(found, _Channel(faults.get(found), found in logits))
            channel.places.append((self._indexing.sides[number], position))
        return list(members.values())

    def _add(self, item: Any, root: Side) -> None:
        """Add one member of a group: its positions ``item.idxs``, and the root's rows ``item.root_idxs``."""
        node, module = item.dep.target, item.dep.target.module
        origins = self._indexing.of(root, item.root_idxs)
        reads = not self._graph.is_out_channel_pruning_fn(item.dep.handler)
        if not reads and any(node is end for end in self._ends):
            self.logits.append(origins)
        try:
            sides = self._sides(module, reads)
        except _NotSeparable as obstacle:
            self.faults.append((origins, str(obstacle)))
            return
        self.pairs += [(origins, self._indexing.of(side, item.idxs)) for side in sides]
        if not reads:
            self._followed.setdefault(module, set()).update(item.idxs)

    def _sides(self, module: Any, reads: bool) -> list[Side]:
        """Return the dimensions of tensors on which ``module`` keeps the channels that it reads or writes."""
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
            raise _NotSeparable(
                "its channels pass weights that are recomputed in every forward pass"
            ) from None


class _NotSeparable(Exception):
    """A module through which channels cannot be removed one by one."""


def _propose(check: CouplingCheck, weights: tuple[str, ...]) -> _Proposal:
    """Return the groups that Torch-Pruning proposes, not yet verified."""
    proposal = _Proposal()
    indexing = _Indexing(check.tensors, weights)
    names = tensor_names(check.network)
    try:
        with torch.enable_grad():  # Torch-Pruning reads the graph of the backward pass
            links = _Links(check, indexing)
    except Exception as error:  # it fails in many ways on what it does not know
        proposal.skip(weights, f"Torch-Pruning cannot trace the network: {reason(error)}")
        return proposal
    layers = [module for module in check.network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for name in weights:
        for layer in layers:
            if names.get(id(layer.weight)) == name:
                links.follow(name, layer)
    channels = links.channels()
    for channel in channels:
        if channel.is_logit:
            proposal.classifier.update(channel.writers)
    alike: dict[tuple[Side, ...], list[list[int]]] = {}
    for channel in channels:
        if channel.fault is not None:
            proposal.skip(channel.writers, channel.fault)
        elif not channel.is_read:
            proposal.skip(channel.writers, "Torch-Pruning finds no layer that reads its outputs")
        elif not channel.is_logit:
            alike.setdefault(channel.sides, []).append(channel.positions)
    proposal.groups = _groups(alike)
    return proposal


def _groups(alike: Mapping[tuple[Side, ...], list[list[int]]]) -> list[ChannelGroup]:
    """Return one group for channels on the same sides; ``alike`` gives the positions of each there."""
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
