"""Check that a network without some channels computes what the full one does with them unread."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.channels.layer_channels import (
    ChannelGroup,
    is_depthwise,
    sliced,
    tensor_names,
    unread,
)
from s2ap_deploy.models.classifier import dry_run
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
                return f"without some of its channels the network does not run: {reason(error)}"
        bound = self.tolerance * expected.abs().max()
        if found.shape != expected.shape or not (found - expected).abs().max() <= bound:
            return "taking channels out changes what the others compute"
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
