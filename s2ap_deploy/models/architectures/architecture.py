"""An image classifier that can be built, and the names and shapes of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.overrides import TorchFunctionMode

from s2ap_deploy.spec import Normalization

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Architecture:
    """A network that can be built, and the names that its checkpoints may hold beyond its own weights.

    Attributes:
        name: what ``--arch`` takes.
        build: maps a number of classes to a network without input normalization.
        input_size: the (C, H, W) that it is meant for; None for a custom factory that does not state it.
        num_classes: the default.
        unused: prefixes of parts that published checkpoints of this family hold but no forward pass reaches
            (an auxiliary head of training, a block that was registered and never called).
        parameters: number of learnable values at the default number of classes, where it is known without
            building a network whose head is a single layer; matching skips hundreds of networks by it.
        function: how the network differs from others of the same names and shapes, where there are any.
        normalization: by number of classes, the input normalization that the family's published code holds as
            constants; 0 stands for any other number. Empty if a checkpoint or a user states it.
        published: the input normalization that published weights of this name expect, for a note.
        parametrized: like ``build``, where that folds parametrizations of the user's code to plain weights:
            the network as its code defines it, under whose names its checkpoints are.
        converted: maps the tensors of a file of the family's library to those of the network, where the
            library stores them under other names; returns None for a file that does not fit exactly.
    """

    name: str
    build: Callable[[int], nn.Module]
    input_size: tuple[int, int, int] | None
    num_classes: int
    unused: tuple[str, ...] = ()
    parameters: int | None = None
    function: str = ""
    normalization: Mapping[int, Normalization] = field(default_factory=dict, hash=False)
    published: Normalization | None = None
    parametrized: Callable[[int], nn.Module] | None = None
    converted: Callable[[Mapping[str, Tensor]], dict[str, Tensor] | None] | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.function}" if self.function else self.name


@dataclass(frozen=True)
class StateDictSpec:
    """``shapes`` of a state dict; ``heads`` maps each tensor that depends on the number of classes to that
    dimension."""

    shapes: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, int]

    def shape(self, name: str, num_classes: int) -> tuple[int, ...]:
        """Return the shape of a tensor at this number of classes."""
        shape = list(self.shapes[name])
        if name in self.heads:
            shape[self.heads[name]] = num_classes
        return tuple(shape)


def state_dict_spec(architecture: Architecture) -> StateDictSpec:
    """Build twice, with the default number of classes and one more: what changes shape is the head."""
    return _spec(architecture.build, architecture.num_classes)


def parametrized_spec(architecture: Architecture) -> StateDictSpec | None:
    """Return the spec of the network as its code defines it; None where nothing in it is parametrized."""
    build = architecture.parametrized
    if build is None or not fold_parametrizations(build(architecture.num_classes)):
        return None
    return _spec(build, architecture.num_classes)


def _spec(build: Callable[[int], nn.Module], num_classes: int) -> StateDictSpec:
    shapes = _shapes(build(num_classes))
    wider = _shapes(build(num_classes + 1))
    heads = {}
    for name, shape in shapes.items():
        moved = [i for i, (a, b) in enumerate(zip(shape, wider.get(name, ()), strict=False)) if a != b]
        if len(moved) == 1:
            heads[name] = moved[0]
    return StateDictSpec(shapes, heads)


@functools.cache
def registered_spec(architecture: Architecture) -> StateDictSpec:
    """Return the spec of a built-in network in milliseconds: no weight is stored."""
    with WithoutStorage():
        return state_dict_spec(architecture)


class WithoutStorage(TorchFunctionMode):
    """Create parameters and buffers on the meta device, and keep arithmetic on small constants real.

    ``torch.device("meta")`` alone would also move the arithmetic by which RegNet derives its widths.
    """

    CREATORS = (torch.empty, torch.zeros, torch.ones)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.CREATORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def fold_parametrizations(network: nn.Module) -> tuple[str, ...]:
    """Replace weights that are computed from others by their values in eval mode; return their names.

    Covers weight_norm and spectral_norm, old and new, and every parametrization of
    ``torch.nn.utils.parametrize``. The network is changed, and left in eval mode if anything was folded.
    """
    names = []
    for prefix, module in list(network.named_modules()):
        old = {
            id(hook): hook
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, WeightNorm | SpectralNorm)
        }
        if not old and not parametrize.is_parametrized(module):
            continue
        network.eval()  # outside of it, spectral_norm moves at every look
        for hook in old.values():
            if isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
                # torch 2.14 looks for its own hook inside a wrapper, finds none, and leaves it.
                module._load_state_dict_pre_hooks.clear()
            else:
                remove_weight_norm(module, hook.name)
            names.append(f"{prefix}.{hook.name}".lstrip("."))
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                names.append(f"{prefix}.{name}".lstrip("."))
    return tuple(names)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
