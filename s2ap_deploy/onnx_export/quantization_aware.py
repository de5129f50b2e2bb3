"""Train a network while it computes as its int8 file will.

The graph of the int8 file is run with the network's own weights in the places of the file's: weights are
rounded per output channel and biases to the steps of the products, activations by the ranges that export
will use. Gradients pass straight through the rounding (Jacob et al. 2018, arXiv 1712.05877; Bengio et al.
2013, arXiv 1308.3432) and end where a range does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.onnx_export.graph import MIN_OPSET, to_onnx
from s2ap_deploy.onnx_export.onnx_module import OnnxModule
from s2ap_deploy.onnx_export.quantization import activation_ranges, quantize
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.training.folding import find_pairs, merged

_LAYERS: Mapping[Any, Any] = {nn.Conv2d: nn.BatchNorm2d, nn.Linear: nn.BatchNorm1d}
_CLOSE = 1e-4  # of the largest weight: folding in another order rounds differently


@dataclass(frozen=True, eq=False)
class QuantizationAware:
    """The last ``epochs`` of a training compute as the int8 file of ``section`` will.

    ``images`` [n, C, H, W] in [0, 1] set the ranges of activations when the first of these epochs begins.
    """

    epochs: int
    images: NDArray[np.float32]
    section: ExportSection

    def prepare(
        self, network: nn.Module, ranges: Mapping[str, Tensor]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a module that computes as the int8 file of ``network`` with its weights, and the ranges.

        ``ranges`` [2] by tensor name are those of an earlier call, or empty. BatchNorm computes with its
        running statistics. Raises ArchitectureError where no weight can be trained like this.
        """
        size = self.images.shape[1:]
        traced = to_onnx(network, (size[0], size[1], size[2]), opset=max(self.section.opset, MIN_OPSET))
        if not ranges:
            found = activation_ranges(traced, self.images, method=self.section.calibration)
            ranges = {name: torch.tensor(limits) for name, limits in found.items()}
        known = {name: (float(limits[0]), float(limits[1])) for name, limits in ranges.items()}
        model = quantize(traced, self.images[:1], weight_bits=self.section.weight_bits, ranges=known)
        image = torch.from_numpy(self.images[:1]).to(next(network.parameters()).device)
        levels = 64 if self.section.weight_bits == 7 else 127
        return FakeQuantized(network, model, traced, image, levels), dict(ranges)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer whose weight the file rounds, the BatchNorm folded into it, and the names of both in the graph.

    ``step`` is that of its quantized input, None where it is not quantized.
    """

    first: Any
    norm: Any
    weight: str
    bias: str
    step: float | None

    def tensors(self, levels: int) -> Iterator[tuple[str, Tensor]]:
        """Yield weight and bias as the file holds them."""
        weight, bias = (
            (self.first.weight, self.first.bias) if self.norm is None else merged(self.first, self.norm)
        )
        rounded, scale = per_channel(weight, levels)
        yield self.weight, rounded
        if bias is not None:
            yield self.bias, bias if self.step is None else straight_through(bias, scale * self.step)


def per_channel(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Round ``weight`` [out, in, ...] to ``levels`` steps on either side of zero; return the steps [out] too.

    The largest magnitude of an output channel is its last step; a channel of zeros stays one.
    """
    scale = weight.detach().flatten(1).abs().amax(dim=1) / levels
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
    return straight_through(weight, scale.view(-1, *[1] * (weight.dim() - 1))), scale


def straight_through(values: Tensor, step: Tensor) -> Tensor:
    """Round ``values`` to multiples of ``step``; the gradient is that of the values themselves."""
    rounded = (values.detach() / step).round() * step
    return rounded + (values - values.detach())  # adds zero: the sum is the multiple to the bit


class FakeQuantized(nn.Module):
    """Images [B, C, H, W] to logits [B, K] as an int8 file computes them, with the weights of ``network``.

    Parameters are those of ``network``. Weights that the file does not round, or that are not those of a
    convolution or linear layer, stay as they were at construction.
    """

    def __init__(
        self, network: nn.Module, model: ModelProto, traced: ModelProto, image: Tensor, levels: int
    ) -> None:
        """Build it from the int8 ``model`` of the ``traced`` network; ``image`` [1, C, H, W] finds BatchNorm.

        Raises ArchitectureError where no weight of the file is found in the network, and for operators
        without a differentiable counterpart.
        """
        super().__init__()
        self.network = network
        self.levels = levels
        graph = OnnxModule(model).to(image.device)
        layers = _layers(network, model, traced, image)
        if not layers:
            raise ArchitectureError(
                "no weight of the int8 file is that of a convolution or linear layer of the network",
                code="qat-unsupported",
                hint="fine-tune without --qat",
            )
        for name, layer in layers.items():
            graph.rename_inputs(name, layer.weight, layer.bias if _has_bias(layer) else None)
        self.layers = tuple(layers.values())
        self.graph: Sequence[OnnxModule] = (graph,)  # in a tuple: its constants are no parameters

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, K] of ``images`` [B, C, H, W]."""
        given = {name: value for layer in self.layers for name, value in layer.tensors(self.levels)}
        return self.graph[0].compute(images, given)


def _has_bias(layer: _Layer) -> bool:
    return layer.norm is not None or layer.first.bias is not None


def _layers(network: nn.Module, model: ModelProto, traced: ModelProto, image: Tensor) -> dict[str, _Layer]:
    """Find the layers of ``network`` behind the products of the file, by the names of their nodes."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    norms = dict(find_pairs(network, image, _LAYERS))
    for module, training in modes:
        module.training = training
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in traced.graph.initializer}
    nodes = {node.name: node for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    unpacked = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    steps = {tensor.name: tensor for tensor in model.graph.initializer}
    modules = dict(network.named_modules())
    found = {}
    for node in traced.graph.node:
        name = node.input[1] if node.name in nodes else ""
        first = modules.get(name.removesuffix(".weight"))
        if type(first) not in _LAYERS or name not in stored or not _by_rows(node):
            continue
        norm = _norm_of(first, norms.get(first), stored[name])
        if norm is False or nodes[node.name].input[1] not in unpacked:
            continue
        source = unpacked.get(nodes[node.name].input[0])
        step = None if source is None else float(numpy_helper.to_array(steps[source.input[1]]))
        found[node.name] = _Layer(first, norm, f"{node.name}/weight", f"{node.name}/bias", step)
    return found


def _by_rows(node: NodeProto) -> bool:
    """Return whether the output channels of the weight are its rows."""
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return node.op_type == "Conv" or bool(attributes.get("transB", 0))


def _norm_of(first: Any, norm: Any, stored: NDArray[np.generic]) -> Any:
    """Return the BatchNorm that is folded into the stored weight, None for none, False for neither."""
    wanted = torch.from_numpy(np.array(stored))
    with torch.no_grad():
        if torch.equal(first.weight.cpu(), wanted):
            return None
        if norm is not None:
            weight = merged(first, norm)[0].cpu()
            if torch.allclose(weight, wanted, rtol=0, atol=_CLOSE * max(float(wanted.abs().max()), 1e-30)):
                return norm
    return False
