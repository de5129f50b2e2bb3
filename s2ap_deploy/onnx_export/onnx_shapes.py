"""Predict the tensors of an exported file from shapes alone; weights may be on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from s2ap_deploy.codecs.registry import Contents, WeightTensor
from s2ap_deploy.models.channels.layer_channels import Coupling
from s2ap_deploy.models.classifier import dry_run
from s2ap_deploy.models.used_weights import UsedWeights, used_weights, weight_count
from s2ap_deploy.spec import WeightCount

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightedLayer:
    """One counted weight [out, in, ...], how often it is applied per image, and whether it gets a bias.

    A BatchNorm that follows a convolution becomes its bias in the file.
    """

    name: str
    shape: tuple[int, ...]
    places: int
    bias: bool

    @property
    def macs(self) -> int:
        return math.prod(self.shape) * self.places


@dataclass(frozen=True)
class Outline:
    """The layers in forward order, other stored tensors by shape, and all shapes of learnable parameters.

    ``sums`` counts the places where two branches are added, ``used`` says what the weights do.
    """

    layers: tuple[WeightedLayer, ...]
    others: tuple[tuple[int, ...], ...]
    parameters: Shapes
    sums: int
    used: UsedWeights
    count: WeightCount

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the counted weights."""
        return {layer.name: layer.shape for layer in self.layers}

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image with the counted weights."""
        return sum(layer.macs for layer in self.layers)

    @property
    def size(self) -> int:
        """Learnable parameters."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    def contents(self, kept: Mapping[str, int]) -> Contents:
        """Return the file's contents with ``kept`` non-zero weights per layer; other layers stay dense."""
        weights = tuple(
            WeightTensor(layer.name, layer.shape, kept.get(layer.name, math.prod(layer.shape)))
            for layer in self.layers
        )
        biases = [layer.shape[0] for layer in self.layers if layer.bias]
        return Contents(weights, (*biases, *(math.prod(shape) for shape in self.others)), self.sums)


def outline(network: nn.Module, input_size: tuple[int, int, int]) -> Outline:
    """Return the outline of ``network`` on images of ``input_size`` (C, H, W).

    The network runs twice on one black image and is as before afterwards. Raises ArchitectureError
    when it cannot run on that size.
    """
    used = used_weights(network, input_size)
    adds = _Sums()
    folded, followed = _folded(network, input_size, adds)
    owners = {id(module.weight): module for module in _layers(network)}
    layers = []
    for name in used.counted:
        weight = network.get_parameter(name)
        owner = owners.get(id(weight))
        # Another layout's bias is listed with the other tensors.
        joined = owner is not None and (owner.bias is not None or id(owner) in followed)
        bias = joined and used.reads.get(name) == 1
        layers.append(WeightedLayer(name, tuple(weight.shape), used.macs[name] // weight.numel(), bias))
    turned = {id(network.get_parameter(name)) for name in used.prunable if used.reads[name] == 0}
    aside = {id(module.weight) for module in _layers(network)}
    aside |= {id(module.bias) for module in _layers(network) if id(module.weight) not in turned}
    aside |= {id(tensor) for norm in folded for tensor in norm.parameters()}
    aside |= {id(network.get_parameter(name)) for name in used.counted}
    others = [tuple(tensor.shape) for tensor in network.parameters() if id(tensor) not in aside]
    for module in network.modules():  # buffers of a BatchNorm that cannot be folded
        if isinstance(module, _BatchNorm) and module not in folded and module.running_mean is not None:
            others += [tuple(module.running_mean.shape)] * 2
    parameters = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    count = weight_count(network, used)
    return Outline(tuple(layers), tuple(others), parameters, adds.count, used, count)


def narrowed(whole: Outline, coupling: Coupling, keep: Mapping[str, int]) -> Outline:
    """Return the outline after each group of ``coupling`` keeps ``keep`` of its channels.

    Groups that ``keep`` does not name stay whole. Other stored tensors are left as they are.
    """
    shapes = {name: list(shape) for name, shape in whole.parameters.items()}
    for group in coupling.groups:
        gone = group.channels - keep.get(group.name, group.channels)
        for touched in (*group.writers, *group.readers):
            if touched.parameter in shapes:
                shapes[touched.parameter][touched.dim] -= gone * touched.index.shape[1]
    parameters = {name: tuple(shape) for name, shape in shapes.items()}
    layers = tuple(replace(layer, shape=parameters[layer.name]) for layer in whole.layers)
    return replace(whole, layers=layers, parameters=parameters)


def _layers(network: nn.Module) -> Iterable[Any]:
    return (module for module in network.modules() if isinstance(module, (_ConvNd, nn.Linear)))


class _Sums(TorchFunctionMode):
    """Counts additions of two maps."""

    ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        maps = [value for value in args if isinstance(value, Tensor) and value.dim() >= 2]
        self.count += func in self.ADDITIONS and len(maps) == 2
        return func(*args, **(kwargs or {}))


def _folded(
    network: nn.Module, input_size: tuple[int, int, int], watch: TorchFunctionMode
) -> tuple[set[nn.Module], set[int]]:
    """Return the BatchNorms that directly follow a convolution, and the ids of those convolutions."""
    written: dict[int, tuple[nn.Module, Tensor, int]] = {}
    folded: set[nn.Module] = set()
    followed: set[int] = set()

    def write(module: nn.Module, _: Any, output: Tensor) -> None:
        # Held, so that no other tensor takes its identity.
        written[id(output)] = (module, output, output._version)

    def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        writer, tensor, version = written.get(id(inputs[0]), (None, None, 0)) if inputs else (None, None, 0)
        if writer is not None and tensor is not None and tensor._version == version:  # not changed in place
            folded.add(module)
            followed.add(id(writer))

    convolutions = (layer for layer in _layers(network) if isinstance(layer, _ConvNd))
    hooks = [layer.register_forward_hook(write) for layer in convolutions]
    hooks += [
        module.register_forward_pre_hook(read)
        for module in network.modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        dry_run(network, input_size, watch=watch)
    finally:
        for hook in hooks:
            hook.remove()
    return folded, followed
