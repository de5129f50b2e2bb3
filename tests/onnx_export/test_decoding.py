import errno
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from s2ap_deploy.codecs.decode_graph import is_internal
from s2ap_deploy.codecs.registry import CODECS, ENCODINGS
from s2ap_deploy.codecs.values import VALUES
from s2ap_deploy.errors import CheckpointError, StorageError, VerificationError
from s2ap_deploy.onnx_export import decoding, encoding
from s2ap_deploy.onnx_export.encoding import round_weights
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.onnx_file import load
from s2ap_deploy.onnx_export.quantization import quantize

SPARSE = [codec.name for codec in CODECS.values() if codec.sparse]


def written(path: Path, model: ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("choice", ENCODINGS)
@pytest.mark.parametrize("values", list(VALUES))
def test_every_file_of_ours_becomes_dense(tmp_path, dense_model, images, choice, values) -> None:
    rounded, stored, _ = round_weights(dense_model, values)
    model, _ = encoding.encode(rounded, encoding=choice, rounded=stored)
    source = written(tmp_path / "sparse.onnx", model)
    output = tmp_path / "dense.onnx"
    decoded = decoding.decode_file(load(source), output)
    found = onnx.load(output)
    onnx.checker.check_model(found, full_check=True)
    assert not found.graph.sparse_initializer
    assert not any(is_internal(name) for name in encoding.arrays(found.graph.initializer))
    assert (
        encoding.arrays(found.graph.initializer).keys() == encoding.arrays(rounded.graph.initializer).keys()
    )
    for name, array in encoding.arrays(rounded.graph.initializer).items():
        assert encoding.arrays(found.graph.initializer)[name].tobytes() == array.tobytes()
    assert found.metadata_props == dense_model.metadata_props
    assert decoded.metadata == {"s2ap.sparsity": "0.9"}
    assert decoded.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert decoded.tensors == (0 if choice == "dense" and values == "float32" else 2)
    assert np.array_equal(logits(session(output), images), logits(session(source), images))


def test_an_int8_file_becomes_its_uncoded_self(tmp_path, dense_model, images) -> None:
    int8 = quantize(dense_model, images)
    source = written(tmp_path / "sparse.onnx", encoding.encode(int8)[0])
    decoding.decode_file(load(source), tmp_path / "dense.onnx")
    found = encoding.arrays(onnx.load(tmp_path / "dense.onnx").graph.initializer)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in encoding.arrays(int8.graph.initializer).items()
    }


def test_a_dense_file_is_left_as_it_is(tmp_path, dense_model) -> None:
    source = written(tmp_path / "a.onnx", dense_model)
    decoded = decoding.decode_file(load(source), tmp_path / "b.onnx")
    assert (decoded.tensors, decoded.bytes) == (0, decoded.source_bytes)
    assert (tmp_path / "b.onnx").read_bytes() == source.read_bytes()


def test_a_file_may_replace_itself(tmp_path, dense_model) -> None:
    source = written(tmp_path / "a.onnx", encoding.encode(dense_model)[0])
    decoded = decoding.decode_file(load(source), source)
    assert source.stat().st_size == decoded.bytes > decoded.source_bytes


def one_bit_off(original: Any) -> Any:
    def evaluate(model: ModelProto, outputs: list[str]) -> list[np.ndarray]:
        arrays = [array.copy() for array in original(model, outputs)]
        arrays[0].reshape(-1).view(np.int32)[0] ^= 1
        return arrays

    return evaluate


def another_bias(original: Any) -> Any:
    def decode(model: ModelProto) -> ModelProto:
        dense = original(model)
        (bias,) = [tensor for tensor in dense.graph.initializer if tensor.name.endswith("linear.bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1), bias.name))
        return dense

    return decode


def full_disk(original: Any) -> Any:
    def write(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    return write


@pytest.mark.parametrize(
    ("place", "name", "change", "error"),
    [
        (encoding, "evaluate", one_bit_off, VerificationError),
        (encoding, "decode", another_bias, VerificationError),
        (Path, "write_bytes", full_disk, StorageError),
    ],
)
def test_other_bits_other_answers_and_a_full_disk_leave_nothing(
    tmp_path, dense_model, monkeypatch, place, name, change, error
) -> None:
    opened = load(written(tmp_path / "a.onnx", encoding.encode(dense_model)[0]))
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    with pytest.raises(error):
        decoding.decode_file(opened, tmp_path / "b.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("choice", SPARSE)
def test_no_damage_passes_unnoticed(tmp_path, dense_model, choice) -> None:
    """A flipped bit may give other weights, but no crash, and no file that answers differently."""
    data = encoding.encode(dense_model, encoding=choice)[0].SerializeToString()
    generator = np.random.default_rng(0)
    source = tmp_path / "a.onnx"
    outcomes = set()
    for position in generator.integers(0, len(data), 25):
        damaged = bytearray(data)
        damaged[position] ^= 1 << generator.integers(8)
        source.write_bytes(damaged)
        try:
            opened = load(source)
            decoding.decode_file(opened, tmp_path / "b.onnx")
        except (CheckpointError, VerificationError):
            outcomes.add("refused")
            continue
        probe = generator.random((2, 3, 8, 8), dtype=np.float32)
        assert np.allclose(opened.answers(probe), logits(session(tmp_path / "b.onnx"), probe), atol=1e-4)
        outcomes.add("decoded")
    assert outcomes == {"refused", "decoded"}


def test_steps_that_lead_out_of_the_tensor_are_refused(tmp_path, dense_model) -> None:
    model, _ = encoding.encode(dense_model, encoding="gaps")
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.UINT8:
            tensor.raw_data = b"\xff" * len(tensor.raw_data)
    with pytest.raises((CheckpointError, VerificationError)):
        decoding.decode_file(load(written(tmp_path / "a.onnx", model)), tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()
