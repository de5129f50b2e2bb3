"""The weight tensors of an ONNX graph: which they are, what they hold, and whether a mask covers them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from s2ap_deploy.errors import VerificationError

_WEIGHT_INPUTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}


def weights(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """Every dense tensor that a convolution or a matrix product of the main graph reads, by name."""
    read = {
        node.input[position]
        for node in model.graph.node
        for position in _WEIGHT_INPUTS.get(node.op_type, ())
        if position < len(node.input)
    }
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in read and len(tensor.dims) >= 2
    }


def kept_but_zero(model: ModelProto, masks: Mapping[str, NDArray[np.bool_]]) -> int:
    """How many entries the masks keep although the exported weight is exactly zero there.

    ``masks``: parameter name -> bool, True where a weight is kept, in the parameter's own shape.
    The exporter may transpose a linear layer's weight, and stores equal tensors once: a mask whose
    parameter has no tensor of that name is held against the tensors of its shape.

    Raises VerificationError when a weight outside its mask is not zero, or a masked weight is not found.
    """
    tensors = weights(model)
    return sum(_kept_but_zero(name, mask, tensors) for name, mask in masks.items())


def _kept_but_zero(name: str, mask: NDArray[np.bool_], tensors: Mapping[str, NDArray[np.generic]]) -> int:
    named = tensors.get(name)
    if named is not None and named.shape == mask.shape:
        outside = np.count_nonzero(named[~mask])
        if outside:
            raise VerificationError(f"{name}: {outside} exported weights outside the mask are not zero")
        return int(np.count_nonzero(named[mask] == 0))
    fitting = [
        tensor
        for stored in tensors.values()
        for tensor in (stored, stored.T)
        if tensor.shape == mask.shape and not np.any(tensor[~mask])
    ]
    if not fitting:
        raise VerificationError(f"{name}: no exported tensor has its shape and keeps to its mask")
    return min(int(np.count_nonzero(tensor[mask] == 0)) for tensor in fitting)
