"""Every kind of file and tensor is read where no code runs, or refused by its name with the next step."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from s2ap_deploy.errors import CheckpointError, RunFolderError, UnsafePickleError
from s2ap_deploy.models.checkpoints.checkpoint import describe, load
from s2ap_deploy.models.checkpoints.read import read_tensors

STATE = {"conv.weight": torch.arange(36.0).reshape(2, 2, 3, 3), "conv.bias": torch.ones(2)}


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def compressed(path: Path) -> Path:
    stream = io.BytesIO()
    torch.save({"state_dict": STATE}, stream)
    path.write_bytes(gzip.compress(stream.getvalue()))
    return path


def shards(path: Path) -> Path:
    first, second = list(STATE.items())
    save_file(dict([first]), path.with_name("model-1.safetensors"))
    save_file(dict([second]), path.with_name("model-2.safetensors"))
    listed = {first[0]: "model-1.safetensors", second[0]: "model-2.safetensors"}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return path


def arrays(path: Path) -> Path:
    np.savez(path, **{name: tensor.numpy() for name, tensor in STATE.items()})
    return path


@pytest.mark.parametrize(
    ("write", "name", "kind"),
    [
        (compressed, "model.pt.gz", "torch zip, gzip"),
        (shards, "model.safetensors.index.json", "safetensors shards"),
        (arrays, "model.npz", "numpy archive"),
    ],
)
def test_formats_without_code_are_read(
    write: Callable[[Path], Path], name: str, kind: str, tmp_path: Path
) -> None:
    raw = read_tensors(write(tmp_path / name))
    assert raw.format == kind
    assert set(raw.tensors) == set(STATE)
    assert all(torch.equal(raw.tensors[each], STATE[each]) for each in STATE)


def test_a_changed_shard_is_another_checkpoint(tmp_path: Path) -> None:
    path = shards(tmp_path / "model.safetensors.index.json")
    before = read_tensors(path).sha256
    save_file({"conv.bias": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    assert read_tensors(path).sha256 != before
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-missing"):
        read_tensors(path)
    path.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "path-outside"):
        read_tensors(path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(network(), (torch.rand(1, 1, 8, 8),)), path)


def distributed(path: Path) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(b"")


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "code"),
    [
        ("model.pt2", exported, "checkpoint-torch-export"),
        ("folder", distributed, "checkpoint-is-folder"),
        ("model.onnx", written(b"\x08\x0a\x12\x07pytorch"), "checkpoint-is-onnx"),
        ("model.h5", written(b"\x89HDF\r\n\x1a\n"), "checkpoint-format-foreign"),
        ("model.tflite", written(b"\x1c\0\0\0TFL3"), "checkpoint-format-foreign"),
        ("model.gguf", written(b"GGUF\x03\0\0\0"), "checkpoint-format-foreign"),
        ("model.npy", written(b"\x93NUMPY\x01\0"), "checkpoint-format-foreign"),
        ("model.pt.xz", written(b"\xfd7zXZ\0"), "checkpoint-format-foreign"),
        ("config.json", written(b'{"model_type": "vit"}'), "checkpoint-is-text"),
        ("cut.pt.gz", written(gzip.compress(b"PK" * 99)[:-9]), "checkpoint-damaged"),
        ("objects.npz", lambda path: np.savez(path, a=np.array([{}])), "checkpoint-arrays-unreadable"),
        ("plain.pkl", written(pickle.dumps({"a": 1}, 2)), "checkpoint-not-torch"),
    ],
)
def test_other_formats_are_told_by_name_with_the_next_step(
    name: str, write: Callable[[Path], object], code: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(CheckpointError, check=lambda error: error.code == code) as refused:
        read_tensors(tmp_path / name)
    assert refused.value.hint


def test_a_plain_pickle_of_arrays_is_read_when_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"params": {name: tensor.numpy() for name, tensor in STATE.items()}}))
    with pytest.raises(CheckpointError):
        read_tensors(path)
    raw = read_tensors(path, trust_pickle=True)
    assert raw.wrapper == "params"
    assert torch.equal(raw.tensors["conv.weight"], STATE["conv.weight"])


@pytest.mark.parametrize(
    "extra",
    [
        np.array(["a", "b"]),
        np.array([{}], dtype=object),
        np.array([1 + 2j]),
        np.datetime64("2024-01-01"),
        datetime.datetime(2024, 1, 1),
        3 + 4j,
        Path("runs"),
    ],
    ids=str,
)
def test_extras_of_other_types_are_no_damage(extra: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": STATE, "extra": extra}, path)
    with contextlib.suppress(UnsafePickleError):
        assert set(read_tensors(path).tensors) == set(STATE)
    assert set(read_tensors(path, trust_pickle=True).tensors) == set(STATE)


KINDS: dict[str, tuple[Callable[[], torch.Tensor], str | None]] = {
    "float16": (lambda: torch.ones(10, 64, dtype=torch.float16), None),
    "bfloat16": (lambda: torch.ones(10, 64, dtype=torch.bfloat16), None),
    "float64": (lambda: torch.ones(10, 64, dtype=torch.float64), None),
    "float8_e4m3fn": (lambda: torch.ones(10, 64).to(torch.float8_e4m3fn), None),
    "float8_e5m2": (lambda: torch.ones(10, 64).to(torch.float8_e5m2), None),
    "float4": (
        lambda: torch.zeros(10, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "tensor-dtype-unsupported",
    ),
    "sparse": (lambda: torch.ones(10, 64).to_sparse(), None),
    "sparse rows": (lambda: torch.ones(10, 64).to_sparse_csr(), None),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(4)], layout=torch.jagged),
        "tensor-nested",
    ),
    "complex": (lambda: torch.ones(10, 64, dtype=torch.complex64), "tensor-complex"),
    "integers": (lambda: torch.ones(10, 64, dtype=torch.int64), "tensor-dtype-invalid"),
    "meta": (lambda: torch.ones(10, 64, device="meta"), "tensor-without-values"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors_are_read_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, code = KINDS[kind]
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes=10):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n\n\n"
        "make.input_size = (1, 8, 8)\n"
    )
    path, arch = tmp_path / "model.pt", f"{tmp_path / 'net.py'}:make"
    torch.save({"1.weight": make(), "1.bias": torch.zeros(10)}, path)
    if code is None:
        classifier = load(path, arch=arch)[0]
        assert torch.equal(classifier.network.get_parameter("1.weight"), torch.ones(10, 64))
        assert describe(path, arch=arch)["prunable_weights"] == 640
        return
    with pytest.raises(CheckpointError, check=lambda error: error.code in (code, "pickle-unsafe")):
        load(path, arch=arch)
    if code == "tensor-dtype-invalid":
        assert any("torch.int64" in warning for warning in describe(path, arch=arch)["warnings"])
        return
    with pytest.raises(CheckpointError, check=lambda error: error.code in (code, "pickle-unsafe")):
        describe(path, arch=arch)


def sharded() -> dict[str, Tensor]:
    """Return a state dict of distributed tensors, of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        return {"weight": distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])}
    finally:
        dist.destroy_process_group()


def quantized_by_torchao() -> dict[str, Tensor]:
    """Return a state dict with weights of torchao."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    network = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())
    return network.state_dict()


@pytest.mark.parametrize("make", [sharded, pytest.param(quantized_by_torchao, marks=pytest.mark.runtimes)])
@pytest.mark.parametrize("trusted", [(), ("--trust-pickle",)])
def test_subclasses_of_tensors_are_refused_by_name_by_every_command(make, trusted, s2ap, tmp_path) -> None:
    torch.save({"state_dict": make()}, tmp_path / "model.pt")
    s2ap.refused("tensor-subclass", "inspect", "model.pt", *trusted, cwd=tmp_path)
    asked = ("--sparsity", 0.9, "--data", "digits", "--eps", "0.1")
    s2ap.refused("tensor-subclass", "prune", "model.pt", *asked, *trusted, cwd=tmp_path)
