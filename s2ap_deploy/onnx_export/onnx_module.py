"""A torch module that computes what an ONNX file computes, built from the file.

White-box attacks need gradients, which a runtime does not compute. The module of a quantized file rounds as
the file does and passes gradients through the rounding, so the attack targets the network that ships.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.onnx_export.encoding import decode
from s2ap_deploy.onnx_export.inference import first_line
from s2ap_deploy.onnx_export.torch_operators import LINEAR, OPERATORS, UNROUNDED, Unsupported

_HINT = (
    "the file itself cannot be attacked here; a float32 file of s2ap-deploy export needs no attack of its own"
)


class GraphStep(NamedTuple):
    """One node: plain values only, so that a module can be copied and sent to another process."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class OnnxModule(nn.Module):
    """Images float32 [B, C, H, W] to logits [B, K], as the file computes them.

    Weights are parameters without gradient, other constants are buffers; nodes that depend on constants alone
    are evaluated once, at construction. A file with a fixed batch size is run batch by batch.
    """

    def __init__(self, model: ModelProto) -> None:
        """Build the module of a model, encoded or not. Raises ArchitectureError for unsupported operators."""
        super().__init__()
        graph = decode(model).graph
        constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in graph.initializer
        }
        inputs = [value for value in graph.input if value.name not in constants]
        if len(inputs) != 1 or not graph.output:
            raise ArchitectureError(
                f"the file takes {len(inputs)} inputs; a classifier takes one",
                code="onnx-not-classifier",
                hint=_HINT,
            )
        self._input = inputs[0].name
        self._output = graph.output[0].name
        first = inputs[0].type.tensor_type.shape.dim
        self._batch = max(0, first[0].dim_value) if first else 0  # 0 where it is open
        self._steps = _folded([step for node in graph.node for step in _node_steps(node)], constants)
        self._keys: dict[str, str] = {}
        read = {name for step in self._steps for name in step.inputs} | {self._output}
        for name, value in constants.items():
            if name in read:
                self._keep(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, K] of ``images`` [B, C, H, W]."""
        if not self._batch or len(images) == self._batch:
            return self.compute(images, {})
        parts = []
        for part in torch.split(images, self._batch):
            filled = part
            if len(part) < self._batch:
                filled = torch.cat([part, part[-1:].expand(self._batch - len(part), *part.shape[1:])])
            parts.append(self.compute(filled, {})[: len(part)])
        return torch.cat(parts)

    def unrounded(self) -> OnnxModule:
        """Return a copy that saturates as the file does but does not round."""
        return self._with("QuantizeLinear", UNROUNDED)

    def linear(self) -> OnnxModule:
        """Return a copy whose products are torch's linear layers, which converters and quantizers know."""
        return self._with("Gemm", LINEAR)

    def _with(self, old: str, new: str) -> OnnxModule:
        other = copy.deepcopy(self)
        other._steps = [
            step._replace(operator=new) if step.operator == old else step for step in other._steps
        ]
        return other

    def rename_inputs(self, node: str, weight: str, bias: str | None) -> None:
        """Let a convolution or product read ``weight``, and ``bias`` unless None, from :meth:`compute`."""
        for index, step in enumerate(self._steps):
            if step.name == node:
                third = step.inputs[2:] if bias is None else (bias,)
                self._steps[index] = step._replace(inputs=(step.inputs[0], weight, *third))

    def compute(self, images: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Compute logits [B, K] of ``images`` [B, C, H, W] with further values by name."""
        values: dict[str, Tensor] = {name: getattr(self, key) for name, key in self._keys.items()}
        values.update(given)
        values[self._input] = images
        for step in self._steps:
            values[step.output] = _compute(step, values)
        return values[self._output]

    def _keep(self, name: str, value: Tensor) -> None:
        key = f"constant_{len(self._keys)}"
        self._keys[name] = key
        if value.is_floating_point() and value.dim():
            self.register_parameter(key, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(key, value)


def uncovered(model: ModelProto) -> tuple[str, ...]:
    """Return what in ``model`` has no counterpart here: operators, or the first form of one.

    A file with such an operator can be exported and run, and not attacked: ``certify --artifact`` refuses it.
    """
    if names := missing_operators(model):
        return names
    shape = [each.dim_value for each in model.graph.input[0].type.tensor_type.shape.dim]
    try:
        with torch.no_grad():
            OnnxModule(model)(torch.full((shape[0] or 1, *shape[1:]), 0.5))
    except ArchitectureError as error:
        return (error.message.removeprefix("operator ").partition(" has no")[0],)
    return ()


def missing_operators(model: ModelProto) -> tuple[str, ...]:
    """Return the names of the operators in ``model`` that have no counterpart here, sorted."""
    known = {*OPERATORS, "Constant"}
    nodes = decode(model).graph.node
    foreign = ("", "ai.onnx")
    return tuple(
        sorted({node.op_type for node in nodes if node.domain not in foreign or node.op_type not in known})
    )


def _node_steps(node: NodeProto) -> list[GraphStep]:
    """Return the steps of a node: one, or one for each piece of a Split."""
    if node.op_type != "Split":
        return [_step(node)]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    pieces = {"pieces": len(node.output)}
    return [
        GraphStep("Split", node.name, tuple(node.input), name, {**attributes, **pieces, "piece": number})
        for number, name in enumerate(node.output)
    ]


def _step(node: NodeProto) -> GraphStep:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Constant":
        attributes = {"value": torch.from_numpy(numpy_helper.to_array(_constant(attributes)).copy())}
    elif node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        name = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        raise _unsupported(f"operator {name} has no differentiable counterpart here")
    if sum(map(bool, node.output[1:])):
        raise _unsupported(f"operator {node.op_type} with {len(node.output)} outputs")
    return GraphStep(node.op_type, node.name, tuple(node.input), node.output[0], attributes)


def _constant(attributes: Mapping[str, Any]) -> Any:
    if "value" not in attributes:
        raise _unsupported(f"operator Constant of the kind {', '.join(attributes)}")
    return attributes["value"]


def _folded(steps: Iterable[GraphStep], constants: dict[str, Tensor]) -> list[GraphStep]:
    """Return the steps that depend on the input; evaluate the others into ``constants``."""
    left = []
    with torch.no_grad():
        for step in steps:
            if step.operator == "Constant":
                constants[step.output] = step.attributes["value"]
            elif step.operator != "Shape" and all(not name or name in constants for name in step.inputs):
                constants[step.output] = _compute(step, constants)
            else:
                left.append(step)
    return left


def _compute(step: GraphStep, values: Mapping[str, Tensor]) -> Tensor:
    try:
        inputs = [values[name] if name else None for name in step.inputs]
        return OPERATORS[step.operator](step.attributes, inputs)
    except Unsupported as error:
        raise _unsupported(
            f"operator {step.operator} {error} has no differentiable counterpart here"
        ) from None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ArchitectureError(
            f"operator {step.operator} ({step.name}) cannot be run: {first_line(error)}",
            code="operator-failed",
        ) from error


def _unsupported(message: str) -> ArchitectureError:
    return ArchitectureError(message, code="operator-unsupported", hint=_HINT)
