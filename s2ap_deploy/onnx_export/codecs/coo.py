"""ONNX's own sparse tensors: a list of non-zero values and one of their positions (SparseTensorProto, COO).

The standard allows them as initializers, but no standard operator takes one: ONNX's full check refuses
every model that uses them. ONNX Runtime turns them into dense tensors at load; OpenVINO does not load them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, SparseTensorProto, TensorProto, numpy_helper

from s2ap_deploy.errors import VerificationError

MAX_ENTRIES = 2**29  # of float32, 2 GiB, the most that a dense file holds


def sparse_tensor(name: str, dense: NDArray[np.generic]) -> SparseTensorProto:
    """``dense`` as a sparse tensor called ``name``; positions count its entries in row-major order.

    They are stored as ``int64_data``, where a number takes as many bytes as it needs, not eight.
    """
    flat = dense.reshape(-1)
    positions = np.flatnonzero(flat)
    indices = TensorProto(data_type=TensorProto.INT64, dims=[positions.size])
    indices.int64_data.extend(positions.tolist())
    return SparseTensorProto(
        values=numpy_helper.from_array(flat[positions], name), indices=indices, dims=dense.shape
    )


def dense_tensor(sparse: SparseTensorProto) -> TensorProto:
    """The dense tensor that a sparse one of any writer stands for, under the same name.

    Raises VerificationError when its positions do not fit its shape or its values.
    """
    name = sparse.values.name
    shape = tuple(sparse.dims)
    entries = math.prod(shape)
    if not shape or min(shape) < 0 or entries > MAX_ENTRIES:
        raise VerificationError(f"{name}: a sparse tensor of shape {list(shape)} cannot be read")
    try:
        values = numpy_helper.to_array(sparse.values)
        positions = _positions(numpy_helper.to_array(sparse.indices), shape)
    except (ValueError, TypeError, KeyError) as error:
        raise VerificationError(f"{name}: a damaged sparse tensor: {error}") from error
    if values.ndim != 1 or positions.shape != values.shape:
        raise VerificationError(f"{name}: {values.size} values, but {positions.size} positions")
    if positions.size and (positions.min() < 0 or positions.max() >= entries):
        raise VerificationError(f"{name}: a position lies outside the tensor")
    flat = np.zeros(entries, values.dtype)
    flat[positions] = values
    return numpy_helper.from_array(flat.reshape(shape), name)


def has_sparse(model: ModelProto) -> bool:
    """Whether any weight of the main graph is stored as a sparse tensor."""
    return bool(model.graph.sparse_initializer)


def _positions(indices: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """[nnz] positions in row-major order, from those or from [nnz, rank] coordinates."""
    if indices.dtype.kind not in "iu" or indices.ndim not in (1, 2):
        raise ValueError(f"positions of type {indices.dtype} and shape {list(indices.shape)}")
    wide = indices.astype(np.int64)
    if wide.ndim == 1:
        return wide
    if wide.shape[1] != len(shape) or np.any(wide < 0) or np.any(wide >= np.array(shape)):
        raise ValueError("coordinates outside the tensor")
    flat: NDArray[np.int64] = np.ravel_multi_index(tuple(wide.T), shape).astype(np.int64)
    return flat
