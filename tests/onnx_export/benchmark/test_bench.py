"""The long measurement, on networks small enough to take no time; no test asks how long anything took."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.onnx_export.benchmark import bench as module
from s2ap_deploy.onnx_export.benchmark import peak_memory, processor
from s2ap_deploy.onnx_export.benchmark.bench import bench, bench_beside
from s2ap_deploy.onnx_export.benchmark.performance import Memory, Performance
from s2ap_deploy.onnx_export.codecs import encoding
from s2ap_deploy.recorder import Silent

SIZE = (3, 8, 8)
SHORT = {"seconds": 0.0, "least": 5, "processes": 1, "recorder": Silent()}


class Steps(Silent):
    """Counts what is announced and what is done."""

    def __init__(self) -> None:
        self.announced: list[int | None] = []
        self.done = 0

    def begin(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.announced.append(total)

    def advance(self, amount: float = 1, **_: object) -> None:
        self.done += int(amount)


@pytest.fixture
def pair(dense_model: ModelProto, tmp_path: Path) -> tuple[Path, Path]:
    """A sparse file and its dense twin."""
    paths = tmp_path / "sparse.onnx", tmp_path / "dense.onnx"
    for path, model in zip(paths, (encoding.encode(dense_model)[0], dense_model), strict=True):
        path.write_bytes(model.SerializeToString())
    return paths


def test_every_combination_is_measured_once_and_announced(pair: tuple[Path, Path]) -> None:
    steps = Steps()
    found = bench(*pair, int8=False, threads=(1, 2), **{**SHORT, "recorder": steps})
    assert [(row.threads, row.batch) for row in found.inference] == [(1, 1), (1, 32), (2, 1), (2, 32)]
    for times in (*(row.times for row in found.inference), found.load):
        assert times.pairs == 5
        assert 0 < times.p50_ms <= times.p95_ms
        assert 0 < times.dense_p50_ms <= times.dense_p95_ms
        assert times.ratio_q1 <= times.ratio <= times.ratio_q3
    assert found.memory is not None
    assert (found.memory.processes, found.memory.batch) == (1, 1)
    assert found.int8_instructions is None
    assert "Unstructured sparsity does not speed up CPU inference." in found.statement
    assert steps.announced == [6]
    assert steps.done == 6
    assert Performance.model_validate_json(found.model_dump_json()) == found


def test_by_default_one_thread_and_all_cores(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, expected in ((1, [1]), (3, [1, 3])):
        monkeypatch.setattr(processor, "cores", lambda cores=cores: cores)
        found = bench(*pair, int8=True, batches=(1,), **SHORT)  # type: ignore[arg-type]
        assert [row.threads for row in found.inference] == expected
    assert found.int8_instructions == processor.int8_instructions()


def test_a_fixed_batch_is_the_only_one(classifier: Classifier, pair: tuple[Path, Path]) -> None:
    model = ModelProto.FromString(pair[0].read_bytes())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    pair[0].write_bytes(model.SerializeToString())
    found = bench_beside(classifier, pair[0], SIZE, opset=20, batch=4, int8=False, **QUICK)
    assert {row.batch for row in found.inference} == {4}
    assert found.memory is not None
    assert found.memory.batch == 4


QUICK = {"recorder": Silent()}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """``bench_beside`` leaves the lengths to their defaults."""
    monkeypatch.setitem(bench.__kwdefaults__, "seconds", 0.0)
    monkeypatch.setitem(bench.__kwdefaults__, "least", 5)
    monkeypatch.setitem(bench.__kwdefaults__, "processes", 1)


def test_a_file_that_is_no_model_is_refused(pair: tuple[Path, Path]) -> None:
    pair[0].write_bytes(b"no model")
    with pytest.raises(VerificationError, match="ONNX Runtime refuses the model"):
        bench(*pair, int8=False, **SHORT)  # type: ignore[arg-type]


def big(path: Path, megabytes: int) -> Path:
    """A model that adds a vector of so many megabytes to its image, summed up."""
    weight = numpy_helper.from_array(np.ones(megabytes * 2**18, np.float32), "w")
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 1, 1])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    # Relu of a value that depends on the image, so that nothing is computed when the model is loaded.
    nodes = [helper.make_node("Mul", ["x", "w"], ["m"]), helper.make_node("ReduceMax", ["m"], ["y"])]
    graph = helper.make_graph(nodes, "big", [image], [logits], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def test_peaks_are_those_of_the_model_and_not_of_whoever_asks(tmp_path: Path) -> None:
    mine = np.ones(2**27, np.float32)  # half a gigabyte that a child must not inherit
    bare, loaded, ran = peak_memory.peaks(big(tmp_path / "big.onnx", 64), 1)
    assert mine[0] == 1
    assert bare < 2**28
    assert loaded - bare >= 64 * 2**20
    assert loaded <= ran < bare + 2**28


def test_the_larger_model_needs_more(tmp_path: Path) -> None:
    found = peak_memory.paired_memory(
        big(tmp_path / "a.onnx", 48), big(tmp_path / "b.onnx", 1), batch=1, processes=1
    )
    assert isinstance(found, Memory)
    assert found.load_bytes - found.dense_load_bytes > 30 * 2**20
    assert found.run_bytes >= found.load_bytes


def test_a_model_that_does_not_run_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, match=r"bad\.onnx does not run in a process of its own: .*INVALID"):
        peak_memory.peaks(tmp_path / "bad.onnx", 1)


X86 = "processor\t: 0\nmodel name\t: A Processor: Fast\nflags\t\t: fpu avx2 avx512_vnni avx_vnni\n\n"


@pytest.mark.parametrize(
    ("content", "instructions", "name"),
    [
        (X86, ("avx512_vnni", "avx_vnni"), "A Processor: Fast"),
        (X86 + X86.replace("avx512_vnni", ""), ("avx_vnni",), "A Processor: Fast"),
        ("model name : Old\nflags : fpu sse2\n", (), "Old"),
        ("processor : 0\nFeatures : fp asimd asimddp\n", ("asimddp",), None),
        ("", None, None),
        ("\xff\x00:\n:::", None, None),
    ],
)
def test_what_linux_says_of_the_processor(
    content: str, instructions: tuple[str, ...] | None, name: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_bytes(content.encode("latin-1"))
    assert processor.int8_instructions(path) == instructions
    assert processor.name(path) == (name or processor.platform.machine())


def test_where_there_is_no_cpuinfo_nothing_is_claimed(tmp_path: Path) -> None:
    assert processor.int8_instructions(tmp_path / "none") is None
    assert processor.name(tmp_path / "none")
    assert processor.cores() >= 1


def test_images_are_noise_of_the_models_size(pair: tuple[Path, Path]) -> None:
    images = module._images(module._opened(pair[0], 1), 7)
    assert images.shape == (7, *SIZE)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
