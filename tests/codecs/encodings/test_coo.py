import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import SparseTensorProto, TensorProto, numpy_helper

from s2ap_deploy.codecs.encodings import coo
from s2ap_deploy.errors import VerificationError


def made(values: object, indices: object, dims: list[int], dtype: type = np.float32) -> SparseTensorProto:
    return SparseTensorProto(
        values=numpy_helper.from_array(np.array(values, dtype), "weight"),
        indices=numpy_helper.from_array(np.array(indices, np.int64)),
        dims=dims,
    )


@given(st.sampled_from([(7,), (4, 5), (3, 2, 3, 3)]), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
@settings(deadline=None)
def test_there_and_back(shape, seed, density) -> None:
    generator = np.random.default_rng(seed)
    dense = generator.standard_normal(shape).astype(np.float32) * (generator.random(shape) < density)
    sparse = coo.sparse_tensor("weight", dense)
    if sparse.values.dims[0]:
        onnx.checker.check_sparse_tensor(sparse)
    found = coo.dense_tensor(sparse)
    assert found.name == "weight"
    assert numpy_helper.to_array(found).tobytes() == (dense + np.float32(0)).tobytes()


def test_positions_take_as_many_bytes_as_they_need() -> None:
    dense = np.zeros(100, np.float32)
    dense[:50] = 1
    assert coo.sparse_tensor("w", dense).indices.ByteSize() < 50 + 10


def test_coordinates_are_read_as_well() -> None:
    found = numpy_helper.to_array(coo.dense_tensor(made([5.0, 6.0], [[0, 2], [1, 0]], [2, 3])))
    assert found.tolist() == [[0, 0, 5], [6, 0, 0]]


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        (made([1.0], [6], [2, 3]), "outside the tensor"),
        (made([1.0], [-1], [2, 3]), "outside the tensor"),
        (made([1.0], [[0, 3]], [2, 3]), "coordinates outside"),
        (made([1.0], [[0]], [2, 3]), "coordinates outside"),
        (made([1.0, 2.0], [1], [2, 3]), "2 values, but 1 positions"),
        (made([[1.0]], [1], [2, 3]), "1 values, but 1 positions"),
        (made([1.0], [1], []), "cannot be read"),
        (made([1.0], [1], [2**40]), "cannot be read"),
        (made([1.0], [1], [-2, -3]), "cannot be read"),
    ],
)
def test_contradictions_are_refused(sparse, words) -> None:
    with pytest.raises(VerificationError, match=words):
        coo.dense_tensor(sparse)


def test_damaged_numbers_are_refused() -> None:
    sparse = made([1.0, 2.0], [1, 2], [2, 3])
    sparse.values.raw_data = b"\0\0\0"
    with pytest.raises(VerificationError, check=lambda error: error.code == "sparse-tensor-damaged"):
        coo.dense_tensor(sparse)
    sparse = made([1.0, 2.0], [1, 2], [2, 3])
    sparse.indices.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32)))
    with pytest.raises(VerificationError, check=lambda error: error.code == "sparse-tensor-damaged"):
        coo.dense_tensor(sparse)
    sparse.values.data_type = TensorProto.UNDEFINED
    with pytest.raises(VerificationError):
        coo.dense_tensor(sparse)
