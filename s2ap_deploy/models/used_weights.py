"""Find what each parameter does in a forward pass: multiply activations, scale them, or be added to them.

Counted are the parameters that multiply activations, whatever module holds them. A zero in one of them is a
product saved as long as the pass reads the parameter itself, or values that are zero where it is (a mask, a
scale). Where a pass computes other values from it, such as a standardized weight, the parameter is counted
and cannot be pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2ap_deploy.models.classifier import dry_run
from s2ap_deploy.spec import OutsideWeight, WeightCount

Kind = Literal["bias", "scale", "table"]
KINDS: tuple[Kind, ...] = ("bias", "scale", "table")

# Names of operators of torch (aten). A trailing underscore, in place, is removed before they are looked up.
_CONVOLUTIONS = {"convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv_depthwise3d"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul"}
# Position of the argument that is added to the products.
_ADDED = {"addmm": 0, "baddbmm": 0, "addbmm": 0, "addmv": 0, **dict.fromkeys(_CONVOLUTIONS, 2), "linear": 2}
_SUMS = {
    *("add", "sub", "rsub", "cat", "stack", "where", "copy", "index", "index_select", "embedding", "gather"),
    *("maximum", "minimum", "clamp", "index_put", "slice_scatter", "select_scatter", "masked_fill", "fill"),
    *("gt", "ge", "lt", "le", "eq", "ne", "index_add", "scatter", "scatter_add", "lerp", "expand_as"),
}
_ELEMENTWISE = {"mul", "div", "addcmul", "addcdiv", "true_divide"}
_NORMALIZATIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu")
# The result is zero wherever the parameter is.
_KEEP_ZEROS = {
    *("mul", "neg", "clone", "_to_copy", "copy", "cat", "stack", "repeat", "roll", "flip", "index_select"),
    *("contiguous", "constant_pad_nd", "abs", "relu", "tanh", "sign"),
}


@dataclass(frozen=True)
class UsedWeights:
    """The parameters of a network by what a forward pass does with them; names as in ``named_parameters``.

    Attributes:
        prunable: multiply activations, and a zero in them is a zero of the function; in order of first use.
        outside: multiply activations as well, and cannot be pruned; the reason by name.
        uncounted: biases, scales and additive tables, by name.
        unused: registered parameters that the pass does not reach.
        macs: multiply-accumulates per image of every counted parameter, products of two activations not
            among them.
        reads: for every prunable weight, the dimension along which it reads activations.
    """

    prunable: tuple[str, ...]
    outside: Mapping[str, str] = field(default_factory=dict)
    uncounted: Mapping[str, Kind] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    macs: Mapping[str, int] = field(default_factory=dict)
    reads: Mapping[str, int] = field(default_factory=dict)

    @property
    def counted(self) -> tuple[str, ...]:
        """Every parameter that multiplies activations."""
        return (*self.prunable, *self.outside)


def prunable(network: nn.Module, input_size: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the names of the weights that can be pruned, in the order of first use.

    Raises ArchitectureError when the network cannot run on ``input_size`` (C, H, W).
    """
    return used_weights(network, input_size).prunable


def used_weights(
    network: nn.Module, input_size: tuple[int, int, int], images: Tensor | None = None
) -> UsedWeights:
    """Run the network once in eval mode and return what the pass does with its parameters.

    Args:
        network: modes and statistics are restored; weights may lie on the meta device.
        input_size: (C, H, W).
        images: [n, C, H, W] in [0, 1]; None is one black image.

    Raises:
        ArchitectureError: when the network cannot run on them.
    """
    if images is None:
        parameter = next(network.parameters(), torch.empty(0))
        images = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    trace = _Trace(network, images)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide what reads what
    try:
        with torch.inference_mode(False):  # it would hide what composite operators consist of
            dry_run(network, input_size, watch=trace, images=images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return trace.result(len(images))


def weight_count(network: nn.Module, used: UsedWeights) -> WeightCount:
    """Return the numbers of values of each kind, and the counted weights that cannot be pruned."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    apart = {
        kind: sum(sizes[name] for name, found in used.uncounted.items() if found == kind) for kind in KINDS
    }
    return WeightCount(
        counted=sum(sizes[name] for name in used.counted),
        prunable=sum(sizes[name] for name in used.prunable),
        outside=tuple(
            OutsideWeight(name=name, weights=sizes[name], reason=reason)
            for name, reason in used.outside.items()
        ),
        biases=apart["bias"],
        scales=apart["scale"],
        tables=apart["table"],
        unused=sum(sizes[name] for name in used.unused),
    )


@dataclass(frozen=True)
class _Origin:
    """The inputs of a tensor: the image (``active``), and parameters.

    It is zero wherever the parameters ``kept`` are, which does not hold for those ``mixed`` in.
    """

    active: bool = False
    kept: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()


_INERT = _Origin()
_ACTIVE = _Origin(active=True)
Found = tuple[Any, Tensor, _Origin]
"""The position of a tensor among an operator's arguments, the tensor, and its origin."""


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows parameters through views and arithmetic to the operators where they meet activations."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler, for seconds, to exclude this class from it."""
        return False

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = dict(network.named_parameters())
        self.origins = {_memory(images): _ACTIVE}
        for name, parameter in reversed(self.parameters.items()):
            self.origins[_memory(parameter)] = _Origin(kept=frozenset({name}))
        self.weights: dict[str, int] = {}  # direct uses, with the dimension that reads
        self.outside: dict[str, str] = {}
        self.others: dict[str, Kind] = {}
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        found: list[Found] = []
        for position, value in (*enumerate(args), *kwargs.items()):
            found += [(position, tensor, self._origin(tensor)) for tensor in _tensors(value)]
        operator = func.overloadpacket.__name__.removesuffix("_")
        outputs = list(_tensors(output))
        if any(origin.active for _, _, origin in found):
            for position, tensor, origin in found:
                if not origin.active and (origin.kept or origin.mixed) and outputs:
                    self._meet(operator, position, tensor, origin, args, outputs[0])
            result = _ACTIVE
        else:
            result = _derived(operator, found)
        writes = func._schema.is_mutable
        memories = {_memory(tensor) for _, tensor, _ in found}
        for tensor in outputs:
            if writes or _memory(tensor) not in memories:  # a view keeps the origin of what it shows
                self.origins[_memory(tensor)] = result
        return output

    def result(self, images: int) -> UsedWeights:
        """Return what was found in a pass over so many images."""
        direct = {name: dim for name, dim in self.weights.items() if name not in self.outside}
        counted = {*direct, *self.outside}
        others = {name: kind for name, kind in self.others.items() if name not in counted}
        return UsedWeights(
            prunable=tuple(direct),
            outside=dict(self.outside),
            uncounted=others,
            unused=tuple(name for name in self.parameters if name not in counted and name not in others),
            macs={name: count // images for name, count in self.macs.items() if name in counted},
            reads=direct,
        )

    def _origin(self, tensor: Tensor) -> _Origin:
        return self.origins.get(_memory(tensor), _INERT)

    def _meet(
        self, operator: str, position: Any, tensor: Tensor, origin: _Origin, args: Any, output: Tensor
    ) -> None:
        """Record that an operator reads ``tensor``, computed from parameters, together with activations."""
        names = (*sorted(origin.kept), *sorted(origin.mixed - origin.kept))
        product = operator in _CONVOLUTIONS or operator in _PRODUCTS
        if product and _ADDED.get(operator) != position:
            reads, macs = _convolved(args, output) if operator in _CONVOLUTIONS else _multiplied(tensor, args)
            for name in names:
                self._weight(name, tensor, name in origin.kept, reads, macs)
            return
        for name in names:
            flat = _extents(self.parameters[name]) <= 1
            if product or operator in _SUMS:
                self.others.setdefault(name, "bias" if flat and operator not in ("cat", "stack") else "table")
            elif flat or any(norm in operator for norm in _NORMALIZATIONS):
                self.others.setdefault(name, "scale")
            else:
                element = operator in _ELEMENTWISE
                how = "it multiplies element by element" if element else f"it goes into {operator}"
                self.outside.setdefault(name, how)
                self.macs[name] = self.macs.get(name, 0) + output.numel()

    def _weight(self, name: str, tensor: Tensor, direct: bool, reads: int, macs: int) -> None:
        parameter = self.parameters[name]
        if _extents(parameter) <= 1 and (not direct or tensor.numel() > parameter.numel()):
            self.others.setdefault(
                name, "scale"
            )  # of the values that are multiplied, such as a weight's norm
            return
        self.macs[name] = self.macs.get(name, 0) + macs
        if not direct:
            self.outside.setdefault(name, "every forward pass computes other values from it")
        elif parameter.dim() < 2:
            self.outside.setdefault(name, "it has one dimension")
        else:
            self.weights.setdefault(name, reads)


def _derived(operator: str, found: list[Found]) -> _Origin:
    """Return the origin of what an operator makes of parameters and constants alone."""
    kept: set[str] = set()
    mixed: set[str] = set()
    for number, (_, _, origin) in enumerate(found):
        through = operator in _KEEP_ZEROS or (operator == "div" and number == 0)
        if operator == "_weight_norm_interface":  # g v / |v| of (v, g)
            through = number == 0
        (kept if through else mixed).update(origin.kept)
        mixed |= origin.mixed
    return _Origin(kept=frozenset(kept), mixed=frozenset(mixed - kept))


def _convolved(args: Any, output: Tensor) -> tuple[int, int]:
    """Return the dimension of a convolution's weight that reads, and its multiply-accumulates."""
    image, weight = args[0], args[1]
    transposed = len(args) > 6 and bool(args[6])
    applied = image if transposed else output
    return int(not transposed), applied.numel() * weight[0].numel()


def _multiplied(tensor: Tensor, args: Any) -> tuple[int, int]:
    """Return the dimension along which a factor of a matrix product reads, and the multiply-accumulates."""
    factors = [each for each in args if isinstance(each, Tensor)][-2:]
    first, second = factors[0], factors[-1]
    shared = -1 if tensor is first else max(-2, -second.dim())
    across = second.shape[-1] if second.dim() > 1 else 1
    return int(tensor.stride(shared) == 1), first.numel() * across


def _extents(parameter: Tensor) -> int:
    """Count the dimensions with more than one position."""
    return sum(size > 1 for size in parameter.shape)


def _memory(tensor: Tensor) -> int:
    """Return the identity of the memory that a tensor and its views share, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
