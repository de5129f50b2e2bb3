"""BatchNorm inside the convolution before it, for as long as an attack lasts.

In eval mode BatchNorm is an affine map of each channel, so a convolution with scaled weights and a shifted
bias computes both at once: the same function up to the rounding of sums, without a pass over the activations
there and another one back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2ap_deploy.training.image_layer import hooked
from s2ap_deploy.training.precision import in_bfloat16

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]

_KNOWN: weakref.WeakKeyDictionary[nn.Module, list[Pair]] = weakref.WeakKeyDictionary()
_LOOKS = ("dim", "size", "__get__", "is_floating_point")  # at a tensor's shape or type, not at its values


class _Passing(nn.BatchNorm2d):
    """A BatchNorm whose work the layer before it does."""

    def forward(self, input: Tensor) -> Tensor:
        return input


@contextmanager
def folded(network: nn.Module, images: Tensor) -> Iterator[None]:
    """Inside, convolutions of the frozen ``network`` in eval mode do the work of the BatchNorm after them.

    Found once per network by a pass over the first of ``images`` [B, C, H, W]. A layer that is called twice,
    whose output or weight something else reads too, that has hooks or shares its weight, stays as it is. All
    is put back.
    """
    chosen = [pair for pair in pairs(network, images) if _foldable(*pair)]
    kept = [(first, first._parameters["weight"], first._parameters["bias"]) for first, _ in chosen]
    halved = in_bfloat16(network)
    try:
        for first, norm in chosen:
            weight, bias = _merged(first, norm)
            if halved:  # once, where autocast would do it in every pass
                weight, bias = weight.bfloat16(), bias.bfloat16()
            # Plain tensors in the parameters' places: the parameters themselves rest untouched.
            first._parameters["weight"], first._parameters["bias"] = weight, bias  # type: ignore[assignment]
            norm.__class__ = _Passing
        yield
    finally:
        for first, weight, bias in kept:  # type: ignore[assignment]
            first._parameters["weight"], first._parameters["bias"] = weight, bias  # type: ignore[assignment]
        for _, norm in chosen:
            norm.__class__ = nn.BatchNorm2d


@torch.no_grad()
def pairs(network: nn.Module, images: Tensor) -> list[Pair]:
    """Convolutions whose output goes into a BatchNorm and nowhere else, each called once in a pass.

    A network whose path depends on its input is judged by the first image's path.
    """
    present = set(network.modules())
    known = _KNOWN.get(network)
    if known is not None and all(first in present and norm in present for first, norm in known):
        return known
    convolutions = {module for module in present if type(module) is nn.Conv2d and not hooked(module)}
    norms = {module for module in present if type(module) is nn.BatchNorm2d and not hooked(module)}
    found: list[Pair] = []
    if convolutions and norms:
        watch = _Watch(convolutions, norms)
        handles = [module.register_forward_hook(watch.called) for module in (*convolutions, *norms)]
        try:
            with watch:
                network(images[:1])
        finally:
            for handle in handles:
                handle.remove()
        found = [pair for pair in watch.pairs() if _alone(network, pair[0])]
    _KNOWN[network] = found
    return found


class _Watch(TorchFunctionMode):
    """Who makes which tensor, and how often a value of it is read."""

    def __init__(self, convolutions: set[Any], norms: set[Any]) -> None:
        super().__init__()
        self.convolutions, self.norms = convolutions, norms
        self.made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
        self.reads: dict[int, int] = {}
        self.calls: dict[nn.Module, int] = {}
        self.found: list[tuple[nn.Conv2d, nn.BatchNorm2d, int]] = []
        self.weights = {id(module.weight) for module in convolutions}

    def called(self, module: Any, inputs: Sequence[Any], output: Any) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1
        if module in self.convolutions:
            self.made[id(output)] = (module, output)  # held, so that its identity stays its own
        elif module in self.norms and id(inputs[0]) in self.made:
            self.found.append((self.made[id(inputs[0])][0], module, id(inputs[0])))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _LOOKS:
            for value in _flat((*args, *kwargs.values())):
                if id(value) in self.made or id(value) in self.weights:
                    self.reads[id(value)] = self.reads.get(id(value), 0) + 1
        return func(*args, **kwargs)

    def pairs(self) -> list[Pair]:
        return [
            (first, norm)
            for first, norm, tensor in self.found
            if self.calls[first] == self.calls[norm] == 1
            and self.reads.get(tensor) == self.reads.get(id(first.weight)) == 1
        ]


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _alone(network: nn.Module, layer: nn.Conv2d) -> bool:
    """Whether no other layer has this weight, and nothing computes it anew at every pass."""
    holders = [module for module in network.modules() if module._parameters.get("weight") is layer.weight]
    return holders == [layer]


def _foldable(first: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether both are, right now, what they were found to be."""
    return (
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.running_var is not None
        and not hooked(first)
        and not hooked(norm)
    )


@torch.no_grad()
def _merged(first: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does the work of both."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    if first.bias is not None:
        shift = shift + first.bias * scale
    return first.weight * scale.view(-1, 1, 1, 1), shift
