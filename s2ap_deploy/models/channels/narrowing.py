"""Layers with fewer channels: a network takes on the shapes of tensors that were sliced.

What a layer was built with has to follow its tensors: ``in_channels``, ``num_features`` and the like. A shape
may come out of a stranger's file, so each is held against the layer that it is for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import CheckpointError, VerificationError
from s2ap_deploy.models.channels.layer_channels import ChannelGroup, is_depthwise, sliced

Numbers = dict[str, int]
"""What a layer is built with: ``in_channels``, ``out_channels``, ``groups``; ``in_features``; ..."""

RELATIVE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def compacted(
    network: nn.Module, groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Numbers]]:
    """A copy of ``network`` that has only the channels ``kept`` (numbers by name of group), in their order.

    The copy computes what ``network`` computes when nothing reads the other channels. Also returns the
    changed :data:`Numbers` of every layer. Errors as for
    :func:`~s2ap_deploy.models.channels.layer_channels.sliced`.
    """
    tensors = sliced(network.state_dict(), tuple(groups), kept)
    tensors |= {name: tensors[first] for name, first in tied(network).items()}
    small = copy.deepcopy(network)
    changed = narrow(small, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    small.load_state_dict(tensors, strict=True)
    return small, changed


def narrow(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, Numbers]:
    """Give the tensors of ``network`` the ``shapes`` (by name in its state dict), its layers their numbers.

    Changes ``network`` itself; of every tensor the leading rows and columns stay. Only channels of Conv2d,
    Linear, BatchNorm and PReLU layers may go. Returns the numbers that changed, by name of layer. Raises
    CheckpointError, and leaves ``network`` as it was, for shapes that the layers cannot have; that they fit
    together shows only when the network runs.
    """
    _check_names(network.state_dict(), shapes)
    for name, first in tied(network).items():
        if tuple(shapes[name]) != tuple(shapes[first]):
            raise CheckpointError(f"{first} and {name} are one tensor, but not of one shape")
    changed: dict[str, Numbers] = {}
    for prefix, module in network.named_modules():
        own = _own_shapes(prefix, module, shapes)
        numbers = _numbers(prefix, module, own)
        if numbers:
            changed[prefix] = numbers
    for prefix, numbers in changed.items():
        module = network.get_submodule(prefix)
        _resize(prefix, module, shapes)
        for name, value in numbers.items():
            setattr(module, name, value)
    return changed


def check_equal(reference: nn.Module, small: nn.Module, images: Tensor) -> float:
    """The largest difference of their logits on ``images`` [n, C, H, W], both in evaluation mode.

    Raises VerificationError when it exceeds 1e-5 x max(1, largest |logit|) in float32, 1e-10 in float64:
    sums over fewer terms round differently, and nothing else may.
    """
    with torch.no_grad():
        expected, found = reference(images), small(images)
    largest = float(expected.abs().max())
    tolerance = RELATIVE_TOLERANCE[images.dtype] * max(1.0, largest)
    difference = float((found - expected).abs().max())
    if not difference <= tolerance < float("inf"):  # written so that NaN fails
        raise VerificationError(
            f"without the channels that are gone the logits differ by up to {difference:.3g} "
            f"(allowed {tolerance:.3g})",
            hint="export with --no-compact, and please report the network",
        )
    return difference


def _check_names(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    for name in tensors:
        if name not in shapes:
            raise CheckpointError(f"it lacks {name}, which the network has")
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"it has {name}, which the network lacks")
        full = tensors[name].shape
        # Kernels keep their size; channels are the first two dimensions.
        fits = len(shape) == len(full) and tuple(shape[2:]) == tuple(full[2:])
        if not fits or not all(1 <= few <= many for few, many in zip(shape, full, strict=True)):
            raise CheckpointError(f"{name} is {list(shape)}, of which {list(full)} cannot be the whole")


def tied(network: nn.Module) -> dict[str, str]:
    """Further names of the tensors that have several, each with the first one."""
    first: dict[int, str] = {}
    every = (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    )
    stored = network.state_dict().keys()
    names = ((name, first.setdefault(id(tensor), name)) for name, tensor in every if name in stored)
    return {name: original for name, original in names if name != original}


def _own_shapes(prefix: str, module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Shapes of the tensors that ``module`` itself holds and that a state dict has."""
    held = (*module._parameters, *module._buffers)
    return {leaf: list(shapes[name]) for leaf in held if (name := _join(prefix, leaf)) in shapes}


def _numbers(prefix: str, module: Any, own: Mapping[str, list[int]]) -> Numbers:
    """What of ``module`` changes with shapes ``own``. Raises CheckpointError where they fit no such layer."""
    if all(shape == list(getattr(module, leaf).shape) for leaf, shape in own.items()):
        return {}
    before, after = _built(prefix, module, own)
    rows = {shape[0] for shape in own.values() if shape}
    if len(rows) > 1:
        raise CheckpointError(f"the tensors of {prefix} have {min(rows)} and {max(rows)} rows")
    return {name: value for name, value in after.items() if value != before[name]}


def _built(prefix: str, module: Any, own: Mapping[str, list[int]]) -> tuple[Numbers, Numbers]:
    """The numbers that ``module`` was built with, and those for shapes ``own``."""
    if isinstance(module, nn.Conv2d) and (module.groups == 1 or is_depthwise(module)):
        rows, columns = own["weight"][:2]
        before = {
            "in_channels": module.in_channels,
            "out_channels": module.out_channels,
            "groups": module.groups,
        }
        if module.groups == 1:
            return before, {"in_channels": columns, "out_channels": rows, "groups": 1}
        return before, {"in_channels": rows, "out_channels": rows, "groups": rows}
    if isinstance(module, nn.Linear):
        rows, columns = own["weight"]
        before = {"in_features": module.in_features, "out_features": module.out_features}
        return before, {"in_features": columns, "out_features": rows}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        rows = max(shape[0] for shape in own.values() if shape)
        return {"num_features": module.num_features}, {"num_features": rows}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.num_parameters}, {"num_parameters": own["weight"][0]}
    raise CheckpointError(f"{prefix or 'the network'} is {type(module).__name__}, whose channels cannot go")


def _resize(prefix: str, module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Cut the tensors of one layer; a parameter stays the same object, so that tied layers stay tied."""
    for leaf in (*module._parameters, *module._buffers):
        tensor: Tensor | None = getattr(module, leaf)
        shape = shapes.get(_join(prefix, leaf))
        if tensor is not None and shape is not None and tuple(shape) != tuple(tensor.shape):
            tensor.data = tensor.data[tuple(slice(size) for size in shape)].clone()
            tensor.grad = None


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf
