"""Fold BatchNorm into the layer before it: in place while training attacks, or in a copy for certification.

In eval mode BatchNorm is an affine map of each channel, so a layer with scaled weights and a shifted bias
computes both at once: the same function up to the rounding of sums, without a pass over the activations in
either direction.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode

from s2ap_deploy.training.precision import in_bfloat16

_IMAGE_CHANNELS = 4  # up to so many, a product of matrices and a fold beat the general backward pass
_LARGEST_COLUMNS = 2**24  # values; beyond, the columns would cost more memory than they save time


class ImageConv2d(nn.Conv2d):
    """A convolution whose gradient with respect to its input is one product of matrices and one fold.

    The general backward pass is made for many input channels; for an image's one to four it takes several
    times as long. The weights are taken as constant: no gradient reaches them.
    """

    @classmethod
    def like(cls, layer: nn.Conv2d) -> ImageConv2d:
        """Return the same convolution; it shares ``layer``'s tensors."""
        twin = cls.__new__(cls)
        twin.__dict__.update(layer.__dict__)
        return twin

    def forward(self, input: Tensor) -> Tensor:
        plain = not (torch.is_grad_enabled() and input.requires_grad)
        if plain or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        values: Tensor = _ImageConvolution.apply(input, self.weight, self.bias, self.stride, self.padding)
        return values


class _ImageConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, image: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        context.save_for_backward(weight)
        context.size, context.stride, context.padding = image.shape, stride, padding
        return F.conv2d(image, weight, bias, stride, padding)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = context.saved_tensors
        (gradient,) = gradients
        size, stride, padding = context.size, context.stride, context.padding
        if gradient[:, 0].numel() * weight[0].numel() > _LARGEST_COLUMNS:
            image = conv2d_input(size, weight, gradient, stride, padding)  # type: ignore[no-untyped-call]
        else:
            columns = torch.matmul(weight.flatten(1).t(), gradient.flatten(2))
            image = F.fold(columns, size[2:], weight.shape[2:], padding=padding, stride=stride)
        return image, None, None, None, None


def reads_image(module: nn.Conv2d) -> bool:
    """Return whether :class:`ImageConv2d` computes what ``module`` does, and faster."""
    return (
        type(module) is nn.Conv2d
        and module.in_channels <= _IMAGE_CHANNELS
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.device.type == "cpu"
        and not hooked(module)
    )


def hooked(module: nn.Module) -> bool:
    """Return whether the module has hooks, so that it must not be replaced."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


Pair = tuple[Any, Any]
"""A convolution and the BatchNorm2d after it, or a linear layer and the BatchNorm1d after it."""

_CONVOLUTIONS: Mapping[Any, Any] = {nn.Conv2d: nn.BatchNorm2d}
_ALL_LAYERS: Mapping[Any, Any] = {nn.Conv2d: nn.BatchNorm2d, nn.Linear: nn.BatchNorm1d}
_MAX_DEVIATION = 1e-4  # of logits, relative to the largest; reordered sums stay near 1e-6
_COMPARED_AT_ONCE = 50
_KNOWN: weakref.WeakKeyDictionary[nn.Module, list[Pair]] = weakref.WeakKeyDictionary()
_LOOKS = ("dim", "size", "__get__", "is_floating_point")  # at a tensor's shape or type, not at its values


class _Passing(nn.BatchNorm2d):
    """A BatchNorm that is folded into the layer before it."""

    def forward(self, input: Tensor) -> Tensor:
        return input


@contextmanager
def folded(network: nn.Module, images: Tensor) -> Iterator[None]:
    """Fold BatchNorm of the frozen ``network`` in eval mode into the convolutions before it, until exit.

    The layers are found once per network by a pass over the first of ``images`` [B, C, H, W]. A layer that is
    called twice, whose output or weight something else reads too, that has hooks or shares its weight, stays
    as it is.
    """
    chosen = [pair for pair in pairs(network, images) if _foldable(*pair)]
    kept = [(first, first._parameters["weight"], first._parameters["bias"]) for first, _ in chosen]
    halved = in_bfloat16(network)
    try:
        for first, norm in chosen:
            with torch.no_grad():
                weight, bias = merged(first, norm)
            if halved:  # once, where autocast would do it in every pass
                weight, bias = weight.bfloat16(), bias.bfloat16()
            # Plain tensors in the parameters' places: the parameters themselves rest untouched.
            first._parameters["weight"], first._parameters["bias"] = weight, bias
            norm.__class__ = _Passing
        yield
    finally:
        for first, weight, bias in kept:
            first._parameters["weight"], first._parameters["bias"] = weight, bias
        for _, norm in chosen:
            norm.__class__ = nn.BatchNorm2d


@torch.no_grad()
def folded_copy(network: nn.Module, images: Tensor) -> nn.Module | None:
    """Copy the frozen ``network`` in eval mode with BatchNorm folded, and a cheaper gradient of image layers.

    ``images`` [n, C, H, W], on the network's device, decide whether the copy may be used. Returns None where
    there is nothing to fold, or where predictions or logits on them differ by more than rounding, as with a
    layer whose output something else reads too.
    """
    private = copy.deepcopy(network)
    found = find_pairs(private, images, _ALL_LAYERS)
    for first, norm in found:
        fuse: Any = fuse_linear_bn_eval if isinstance(first, nn.Linear) else fuse_conv_bn_eval
        fused = fuse(first, norm).requires_grad_(False)
        first.weight, first.bias = fused.weight, fused.bias
    _replace(private, {norm: nn.Identity() for _, norm in found})
    convolutions = [module for module in private.modules() if isinstance(module, nn.Conv2d)]
    readers = {module: ImageConv2d.like(module) for module in convolutions if reads_image(module)}
    _replace(private, readers)
    if not found and not readers:
        return None
    parts = torch.split(images, _COMPARED_AT_ONCE)
    return private if all(agree(network, private, part) for part in parts) else None


def pairs(network: nn.Module, images: Tensor) -> list[Pair]:
    """Find convolutions whose output goes into a BatchNorm and nowhere else; remembered for each network.

    A network whose path depends on its input is judged by the first image's path.
    """
    present = set(network.modules())
    known = _KNOWN.get(network)
    if known is None or not all(first in present and norm in present for first, norm in known):
        known = _KNOWN[network] = find_pairs(network, images, _CONVOLUTIONS, exclusive=True)
    return known


@torch.no_grad()
def find_pairs(
    network: nn.Module, images: Tensor, kinds: Mapping[Any, Any], *, exclusive: bool = False
) -> list[Pair]:
    """Find layers whose output goes straight into a normalization of their kind, each called once in a pass.

    ``exclusive`` leaves out layers whose output or weight something else reads too.
    """
    layers = {module for module in network.modules() if type(module) in kinds and not hooked(module)}
    norms = {module for module in network.modules() if type(module) in kinds.values() and not hooked(module)}
    if not layers or not norms:
        return []
    watch = _Watch(layers, norms)
    handles = [module.register_forward_hook(watch.called) for module in (*layers, *norms)]
    try:
        with watch if exclusive else nullcontext():
            network(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return [
        (first, norm)
        for first, norm in watch.pairs(exclusive)
        if type(norm) is kinds[type(first)] and norm.running_mean is not None and _alone(network, first)
    ]


class _Watch(TorchFunctionMode):
    """Records which layer makes which tensor and, as a function mode, how often each is read."""

    def __init__(self, layers: set[Any], norms: set[Any]) -> None:
        super().__init__()
        self.layers, self.norms = layers, norms
        self.made: dict[int, tuple[Any, Tensor]] = {}
        self.reads: dict[int, int] = {}
        self.calls: dict[nn.Module, int] = {}
        self.found: list[tuple[Any, Any, int]] = []
        self.weights = {id(module.weight) for module in layers}

    def called(self, module: Any, inputs: Sequence[Any], output: Any) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1
        if module in self.layers:
            self.made[id(output)] = (module, output)  # held, so that its identity stays its own
        elif module in self.norms and inputs and id(inputs[0]) in self.made:
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

    def pairs(self, exclusive: bool) -> list[Pair]:
        return [
            (first, norm)
            for first, norm, tensor in self.found
            if self.calls[first] == self.calls[norm] == 1
            and (not exclusive or self.reads.get(tensor) == self.reads.get(id(first.weight)) == 1)
        ]


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _alone(network: nn.Module, layer: nn.Module) -> bool:
    """Return whether no other layer has this weight, and that it is not recomputed in every pass."""
    holders = [module for module in network.modules() if getattr(module, "weight", None) is layer.weight]
    return holders == [layer] and "weight" in layer._parameters


def agree(network: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Return whether two networks give the same answers, up to rounding."""
    expected, found = network(images), other(images)
    same = (found.argmax(dim=1) == expected.argmax(dim=1)).all()
    near = (found - expected).abs().amax() <= _MAX_DEVIATION * expected.abs().amax().clamp(min=1.0)
    return bool(same and near)


def _replace(network: nn.Module, substitutes: Mapping[Any, nn.Module]) -> None:
    """Replace each module that has a substitute, wherever it occurs."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in substitutes:
                setattr(parent, name, substitutes[child])


def _foldable(first: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Return whether both can still be folded."""
    return (
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.running_var is not None
        and not hooked(first)
        and not hooked(norm)
    )


def merged(first: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the layer that computes ``first`` and then ``norm`` in eval mode.

    Both are differentiable functions of the parameters of the two.
    """
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
    weight: Tensor = first.weight * scale.view(-1, *[1] * (first.weight.dim() - 1))
    return weight, shift
