"""COO: ONNX's own sparse tensors, a list of non-zero values and one of their positions (SparseTensorProto).

The standard allows them as initializers, but no standard operator takes one: ONNX's full check refuses
every model that uses them. ONNX Runtime turns them into dense tensors at load; OpenVINO does not load them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from s2ap_deploy.codecs.codec import Codec
from s2ap_deploy.errors import VerificationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import SparseTensorProto, TensorProto

    from s2ap_deploy.codecs.decode_graph import DecodeSubgraph
    from s2ap_deploy.codecs.values import StoredWeight

MAX_ENTRIES = 2**29  # of float32, 2 GiB, the most that a dense file holds


class Coo(Codec):
    """A sparse initializer, which the runtime makes dense."""

    name = "coo"
    title = "COO"
    summary = "ONNX sparse_initializer, for ONNX Runtime only"
    order = 50
    automatic = False
    statement = (
        "Its weights are ONNX sparse initializers, which no standard operator takes: ONNX's full check "
        "refuses the file, so it was checked without; ONNX Runtime runs it, OpenVINO does not load it."
    )
    operators = frozenset({"Cast", "Mul"})
    intermediate_ratio = 1.0
    node_bytes = (55, 55)

    def decode_graph(self, graph: DecodeSubgraph, weight: StoredWeight, output: str) -> None:
        # Store a sparse initializer; convert and scale rounded values.
        name = graph.name() if weight.cast else output
        graph.sparse.append(sparse_tensor(name, weight.data))
        if weight.cast:
            graph.restore(name, weight, output)

    def data_bytes(self, nonzeros: int, entries: int, value_bytes: int) -> float:
        """Predict the bytes with each position stored at 7 bits a byte."""
        return max(0, min(nonzeros, entries)) * (value_bytes + _varint_bytes(entries))


def sparse_tensor(name: str, dense: NDArray[np.generic]) -> SparseTensorProto:
    """Return ``dense`` as a sparse tensor called ``name``; positions count its entries in row-major order.

    They are stored as ``int64_data``, where a number takes as many bytes as it needs, not eight.
    """
    import numpy as np
    from onnx import SparseTensorProto, TensorProto, numpy_helper

    # Positions and values of the non-zero entries.
    flat = dense.reshape(-1)
    positions = np.flatnonzero(flat)
    indices = TensorProto(data_type=TensorProto.INT64, dims=[positions.size])
    indices.int64_data.extend(positions.tolist())
    return SparseTensorProto(
        values=numpy_helper.from_array(flat[positions], name), indices=indices, dims=dense.shape
    )


def dense_tensor(sparse: SparseTensorProto) -> TensorProto:
    """Return the dense form of a sparse tensor from any file, under the same name.

    Raises VerificationError when its positions do not fit its shape or its values.
    """
    import numpy as np
    from onnx import numpy_helper

    name = sparse.values.name
    shape = tuple(sparse.dims)
    entries = math.prod(shape)
    if not shape or min(shape) < 0 or entries > MAX_ENTRIES:
        raise _damaged(name, f"a sparse tensor of shape {list(shape)} cannot be read")
    try:
        values = numpy_helper.to_array(sparse.values)
        positions = _positions(numpy_helper.to_array(sparse.indices), shape)
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(name, f"a damaged sparse tensor: {error}") from error
    # Check the content before it is used: the file is untrusted.
    if values.ndim != 1 or positions.shape != values.shape:
        raise _damaged(name, f"{values.size} values, but {positions.size} positions")
    if positions.size and (positions.min() < 0 or positions.max() >= entries):
        raise _damaged(name, "a position is outside the tensor")
    # Scatter the values.
    flat = np.zeros(entries, values.dtype)
    flat[positions] = values
    return numpy_helper.from_array(flat.reshape(shape), name)


def _damaged(name: str, message: str) -> VerificationError:
    return VerificationError(f"{name}: {message}", code="sparse-tensor-damaged")


def _positions(indices: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return [nnz] positions in row-major order, from such positions or from [nnz, rank] coordinates."""
    import numpy as np

    if indices.dtype.kind not in "iu" or indices.ndim not in (1, 2):
        raise ValueError(f"positions of type {indices.dtype} and shape {list(indices.shape)}")
    wide = indices.astype(np.int64)
    if wide.ndim == 1:
        return wide
    if wide.shape[1] != len(shape) or np.any(wide < 0) or np.any(wide >= np.array(shape)):
        raise ValueError("coordinates outside the tensor")
    flat: NDArray[np.int64] = np.ravel_multi_index(tuple(wide.T), shape).astype(np.int64)
    return flat


def _varint_bytes(entries: int) -> float:
    """Compute the mean bytes of a number below ``entries`` at 7 bits a byte."""
    below, total, size = 0, 0, 1
    while below < entries:
        upto = min(entries, 1 << (7 * size))
        total += (upto - below) * size
        below, size = upto, size + 1
    return total / entries if entries > 0 else 0.0


CODEC = Coo()
