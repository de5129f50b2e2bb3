"""A network as a list of layers that bounds can go through, found by symbolic tracing (torch.fx)."""

from __future__ import annotations

import copy
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.evaluation.bounds.layers import (
    Affine,
    ConvolutionLayer,
    DenseLayer,
    Node,
    PoolingLayer,
    Relu,
    Reshape,
    ScaleLayer,
    Shape,
    Sum,
    Trace,
)

HINT = (
    "supported are convolutions, linear layers, batch normalization, ReLU, average pooling, flattening, "
    "zero padding, slicing, sums, and arithmetic with constants"
)
BATCH = type("Batch", (), {"__repr__": lambda self: "batch size"})()
"""The symbolic number of images while a network is traced."""

IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}


def trace(network: nn.Module, size: Shape, device: torch.device) -> Trace:
    """Trace the layers of a copy of ``network`` in eval mode, in float64, for images of ``size`` (C, H, W).

    Raises ArchitectureError that names the first module or function that bounds cannot go through.
    """
    # Copy the network; hooks could change results and are refused.
    private = copy.deepcopy(network).eval().requires_grad_(False).float().to(device)
    for name, module in private.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _refused(f"a forward hook on {_named(name, module)}")
    try:
        graph = _Tracer().trace(private)
    except Exception as error:  # the user's own code runs here
        reason = str(error).strip().splitlines()
        detail = f"{type(error).__name__}: {reason[0] if reason else ''}"
        raise _refused(f"a forward pass that cannot be traced ({detail})") from error
    return _Builder(private, size, device).build(graph)


class _Tracer(fx.Tracer):
    """Traces into every module except torch's own layers, so that an error can name them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        return type(m).__module__.startswith("torch.nn.modules") and not isinstance(m, containers)


class _Unsupported(Exception):
    """An operation that cannot be bounded; the message is the reason, if there is more than its name."""


@dataclass(frozen=True)
class _Ref:
    """A node, as the traced code sees it: a tensor of shape [batch, \\*shape]."""

    index: int
    shape: Shape


class _Builder:
    """Interprets the traced code once; ``_on_NAME`` takes the arguments of torch's NAME."""

    def __init__(self, network: nn.Module, size: Shape, device: torch.device) -> None:
        self._network, self._device = network, device
        self._nodes: list[Node] = [Node(None, (), size)]
        self._values: dict[fx.Node, Any] = {}

    def build(self, graph: fx.Graph) -> Trace:
        for node in graph.nodes:
            if node.op == "output":
                return self._finish(fx.map_arg(node.args[0], self._values.__getitem__))
            try:
                self._values[node] = self._value(node)
            except (_Unsupported, TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
                detail = str(error).strip().splitlines()
                raise _refused(self._describe(node) + (f": {detail[0]}" if detail else "")) from error
        raise AssertionError("torch.fx graphs end with an output")

    def _value(self, node: fx.Node) -> Any:
        target = str(node.target)
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return operator.attrgetter(target)(self._network)
        # Operations on images become layers; all others are evaluated.
        args: Any = fx.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "call_module":
            (x,) = args
            return self._module(self._network.get_submodule(target), x)
        depends = _depends([*args, *kwargs.values()])
        if node.op == "call_method":
            return (
                self._call(target, args, kwargs) if depends else getattr(args[0], target)(*args[1:], **kwargs)
            )
        assert callable(node.target)
        name = getattr(node.target, "__name__", target)
        return self._call(name, args, kwargs) if depends else node.target(*args, **kwargs)

    def _placeholder(self, node: fx.Node) -> Any:
        if not self._values:
            return _Ref(0, self._nodes[0].shape)
        if not node.args:
            raise _Unsupported("a second input")
        return node.args[0]

    def _call(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Interpret a function or method of torch or ``operator``; a name with a final _ is in place."""
        in_place = (name.endswith("_") and not name.startswith("_")) or name in IN_PLACE
        plain = IN_PLACE.get(name, name.rstrip("_") if in_place else name)
        handler: Callable[..., Any] | None = getattr(self, f"_on_{plain}", None)
        if handler is None:
            raise _Unsupported
        result = handler(*args, **kwargs)
        if in_place or kwargs.get("inplace"):
            self._changed(args[0], result)
        return result

    def _changed(self, before: Any, after: Any) -> None:
        for key, value in self._values.items():
            if isinstance(value, _Ref) and value == before:
                self._values[key] = after

    def _module(self, module: nn.Module, x: _Ref) -> Any:
        result = self._layer(module, x)
        if getattr(module, "inplace", False):
            self._changed(x, result)
        return result

    def _layer(self, module: nn.Module, x: _Ref) -> Any:
        match module:
            case nn.Conv2d():
                if module.padding_mode != "zeros":
                    raise _Unsupported(f"padding_mode {module.padding_mode!r}")
                geometry = (module.stride, module.padding, module.dilation, module.groups)
                return self._on_conv2d(x, module.weight, module.bias, *geometry)
            case nn.Linear():
                return self._on_linear(x, module.weight, module.bias)
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                mean, variance = module.running_mean, module.running_var
                return self._on_batch_norm(x, mean, variance, module.weight, module.bias, eps=module.eps)
            case nn.ReLU():
                return self._on_relu(x)
            case nn.AvgPool2d():
                windows = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
                return self._on_avg_pool2d(x, *windows, module.count_include_pad, module.divisor_override)
            case nn.AdaptiveAvgPool2d():
                return self._on_adaptive_avg_pool2d(x, module.output_size)
            case nn.Flatten():
                return self._on_flatten(x, module.start_dim, module.end_dim)
            case nn.ZeroPad2d():
                return self._on_pad(x, module.padding)
            case nn.Identity() | nn.Dropout() | nn.Dropout2d():
                return x
        raise _Unsupported

    # One method per function or method of torch that bounds can go through, with torch's own arguments.

    def _on_conv2d(
        self, x: _Ref, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> _Ref:  # fmt: skip
        if len(x.shape) != 3:
            raise _Unsupported(f"an input of shape {list(x.shape)} per image")
        dilation = _pair(dilation)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            pad = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
        else:
            rows, columns = (0, 0) if padding == "valid" else _pair(padding)
            pad = (rows, rows, columns, columns)
        double = None if bias is None else bias.double()
        layer = ConvolutionLayer(weight.double(), double, x.shape, _pair(stride), pad, dilation, groups)
        return self._add_node(layer, layer.shape, x)

    def _on_linear(self, x: _Ref, weight: Tensor, bias: Tensor | None = None) -> _Ref:
        if len(x.shape) != 1 or x.shape[0] != weight.shape[1]:
            raise _Unsupported(f"an input of shape {list(x.shape)} per image")
        layer = DenseLayer(weight.double(), None if bias is None else bias.double())
        return self._add_node(layer, (len(weight),), x)

    def _on_batch_norm(
        self, x: _Ref, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> _Ref:  # fmt: skip
        if training or running_mean is None or running_var is None:
            raise _Unsupported("statistics of the batch make images depend on each other")
        scale = (running_var.double() + eps).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        shift = torch.zeros_like(scale) if bias is None else bias.double()
        moved = scale * running_mean.double()
        values = (scale, shift - moved, shift.abs() + moved.abs())
        return self._scaled(x, *(value.reshape(1, -1, *[1] * (len(x.shape) - 1)) for value in values))

    def _on_relu(self, x: _Ref, inplace: bool = False) -> _Ref:
        return self._add_node(Relu(), x.shape, x)

    def _on_avg_pool2d(
        self, x: _Ref, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> _Ref:  # fmt: skip
        if divisor_override is not None and divisor_override < 0:
            raise _Unsupported("a negative divisor")
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return self._pooled(x, lambda t: F.avg_pool2d(t, *options), math.prod(_pair(kernel_size)) + 1)

    def _on_adaptive_avg_pool2d(self, x: _Ref, output_size: Any) -> _Ref:
        return self._pooled(x, lambda t: F.adaptive_avg_pool2d(t, output_size), math.prod(x.shape[1:]) + 1)

    def _on_mean(self, x: _Ref, dim: Any = None, keepdim: bool = False) -> _Ref:
        dims = [dim] if isinstance(dim, int) else list(dim or ())
        axes = [d % (len(x.shape) + 1) for d in dims]
        if not axes or 0 in axes:
            raise _Unsupported("a mean over images")
        return self._pooled(x, lambda t: t.mean(axes, keepdim), math.prod(x.shape) + 1)

    def _on_pad(self, x: _Ref, pad: Any, mode: str = "constant", value: float | None = None) -> _Ref:
        if mode != "constant" or value or len(pad) > 2 * len(x.shape):
            raise _Unsupported("other than zeros around an image")
        return self._pooled(x, lambda t: F.pad(t, tuple(pad)), 1)

    def _on_getitem(self, x: Any, index: Any) -> Any:
        if not isinstance(x, _Ref):
            return x[index]
        parts = index if isinstance(index, tuple) else (index,)
        if (
            parts[0] != slice(None)
            or not all(isinstance(part, (int, slice)) for part in parts)
            or _depends(parts)
        ):
            raise _Unsupported("other than slices of each image")
        return self._pooled(x, lambda t: t[parts], 1)

    def _on_getattr(self, x: Any, name: str) -> Any:
        if name != "shape":
            raise _Unsupported(f".{name}")
        return self._on_size(x)

    def _on_size(self, x: _Ref, dim: int | None = None) -> Any:
        sizes = (BATCH, *x.shape)
        return sizes if dim is None else sizes[dim]

    def _on_flatten(self, x: _Ref, start_dim: int = 0, end_dim: int = -1) -> _Ref:
        if start_dim % (len(x.shape) + 1) == 0:
            raise _Unsupported("images among each other")
        shape = torch.zeros(1, *x.shape).flatten(start_dim, end_dim).shape[1:]
        return self._add_node(Reshape(x.shape, tuple(shape)), tuple(shape), x)

    def _on_reshape(self, x: _Ref, *shape: Any) -> _Ref:
        batch, *rest = shape[0] if isinstance(shape[0], (tuple, list)) else shape
        if _depends(rest) or (batch is not BATCH and batch != -1):
            raise _Unsupported("the size of the batch must come first")
        found = tuple(torch.zeros(x.shape).reshape(rest).shape)
        return self._add_node(Reshape(x.shape, found), found, x)

    _on_view = _on_reshape

    def _on_contiguous(self, x: _Ref) -> _Ref:
        return x

    def _on_dropout(self, x: _Ref, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Ref:
        if training:
            raise _Unsupported("which is random: pass training=self.training")
        return x

    def _on_add(self, x: Any, y: Any, *, alpha: float = 1) -> _Ref:
        if alpha != 1:
            raise _Unsupported("with alpha")
        if isinstance(x, _Ref) and isinstance(y, _Ref):
            return self._combined(x, y, Sum())
        return self._shifted(x, y, 1.0) if isinstance(x, _Ref) else self._shifted(y, x, 1.0)

    def _on_sub(self, x: Any, y: Any, *, alpha: float = 1) -> _Ref:
        if alpha != 1:
            raise _Unsupported("with alpha")
        if isinstance(x, _Ref) and isinstance(y, _Ref):
            return self._combined(x, y, Sum((1, -1)))
        return self._shifted(x, -y, 1.0) if isinstance(x, _Ref) else self._shifted(y, x, -1.0)

    def _on_mul(self, x: Any, y: Any) -> _Ref:
        x, y = (x, y) if isinstance(x, _Ref) else (y, x)
        scale = _constant(y)
        return self._scaled(x, scale, torch.zeros_like(scale))

    def _on_truediv(self, x: _Ref, y: Any) -> _Ref:
        return self._on_mul(x, 1.0 / _constant(y))

    _on_div = _on_truediv

    def _on_neg(self, x: _Ref) -> _Ref:
        return self._on_mul(x, -1.0)

    # What they are made of.

    def _shifted(self, x: _Ref, constant: Any, scale: float) -> _Ref:
        bias = _constant(constant)
        return self._scaled(x, torch.full_like(bias, scale), bias)

    def _combined(self, x: _Ref, y: _Ref, layer: Sum) -> _Ref:
        if x.shape != y.shape:
            raise _Unsupported(f"of shapes {list(x.shape)} and {list(y.shape)}")
        return self._add_node(layer, x.shape, x, y)

    def _pooled(self, x: _Ref, apply: Callable[[Tensor], Tensor], terms: int) -> _Ref:
        shape = tuple(apply(torch.zeros(1, *x.shape, dtype=torch.float64)).shape[1:])
        return self._add_node(PoolingLayer(apply, x.shape, terms), shape, x)

    def _scaled(self, x: _Ref, scale: Tensor, bias: Tensor, canceling: Tensor | None = None) -> _Ref:
        values = (scale, bias, bias.abs() if canceling is None else canceling)
        # ``expand`` refuses what would add images or values.
        full = (value.to(self._device).expand(1, *x.shape)[0] for value in values)
        return self._add_node(ScaleLayer(*full), x.shape, x)

    def _add_node(self, layer: Affine | Relu | Sum, shape: Shape, *parents: _Ref) -> _Ref:
        if not all(isinstance(parent, _Ref) for parent in parents) or not math.prod(shape):
            raise _Unsupported("without values of the image")
        self._nodes.append(Node(layer, tuple(parent.index for parent in parents), shape))
        return _Ref(len(self._nodes) - 1, shape)

    def _finish(self, result: Any) -> Trace:
        if not isinstance(result, _Ref) or len(result.shape) != 1 or result.shape[0] < 2:
            found = (
                f"shape {list(result.shape)} per image" if isinstance(result, _Ref) else type(result).__name__
            )
            raise ArchitectureError(
                f"the network returns {found} instead of logits [batch, classes] of 2 classes or more"
            )
        return Trace(tuple(self._nodes[: result.index + 1]))

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return _named(str(node.target), self._network.get_submodule(str(node.target)))
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
        return re.sub(r"_\d+$", "", node.name) + "()" + (f" in {stack[-1]}" if stack else "")


def _depends(values: Iterable[Any]) -> bool:
    """Return whether a value of the images, or their number, is among the arguments."""
    for value in values:
        if isinstance(value, slice):
            value = (value.start, value.stop, value.step)
        if isinstance(value, _Ref) or value is BATCH:
            return True
        if isinstance(value, (tuple, list)) and _depends(value):
            return True
    return False


def _constant(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    raise _Unsupported("with other than a constant")


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _named(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _refused(what: str) -> ArchitectureError:
    return ArchitectureError(f"provable bounds do not support {what}", hint=HINT)
