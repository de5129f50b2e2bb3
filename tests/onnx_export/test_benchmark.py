"""Measurements on networks small enough to take no time; no test asks how long anything took."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export import benchmark, encoding
from s2ap_deploy.onnx_export.benchmark import Effort, benchmark_export
from s2ap_deploy.onnx_export.export_report import Performance
from s2ap_deploy.onnx_export.inference import session
from s2ap_deploy.recorder import Silent

IMAGE = np.zeros((1, 1, 1, 1), np.float32)
SIZE = (3, 8, 8)
SHORT = Effort(seconds=0.0, pairs=5, processes=1)


class Clock:
    """A clock that only the fake sessions move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeSession:
    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds, self.runs = clock, itertools.cycle(seconds), 0

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="image")]

    def run(self, _outputs: None, feed: dict[str, np.ndarray]) -> None:
        assert feed["image"] is IMAGE
        self.runs += 1
        self.clock.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    return clock


def test_the_ratio_is_first_over_second(clock) -> None:
    first, second = FakeSession(clock, [0.003]), FakeSession(clock, [0.002])
    assert benchmark.paired_latency(first, second, IMAGE, repeats=6) == benchmark.PairedLatency(
        pytest.approx(1.5), pytest.approx(3.0)
    )
    assert (first.runs, second.runs) == (7, 7)


def test_one_disturbed_pair_does_not_move_the_median(clock) -> None:
    first = FakeSession(clock, [0.01, 0.01, 0.9, 0.01, 0.01, 0.01])
    found = benchmark.paired_latency(first, FakeSession(clock, [0.01]), IMAGE, repeats=5)
    assert found.ratio == pytest.approx(1.0)
    assert found.median_ms == pytest.approx(10.0)


def test_time_is_bounded_but_five_pairs_are_run(clock) -> None:
    slow = FakeSession(clock, [10.0])
    benchmark.paired_latency(slow, FakeSession(clock, [10.0]), IMAGE, repeats=100, seconds=1.0)
    assert slow.runs == 6
    quick = FakeSession(clock, [0.05])
    benchmark.paired_latency(quick, FakeSession(clock, [0.05]), IMAGE, repeats=100, seconds=1.0)
    assert 10 <= quick.runs <= 12


def test_a_summary_gives_quantiles_of_times_and_of_ratios() -> None:
    pairs = [(0.001 * k, 0.002) for k in range(1, 6)]
    found = benchmark.summary(pairs)
    assert found.pairs == 5
    assert (found.p50_ms, found.dense_p50_ms) == (pytest.approx(3), pytest.approx(2))
    assert (found.p95_ms, found.dense_p95_ms) == (pytest.approx(4.8), pytest.approx(2))
    assert (found.ratio_q1, found.ratio, found.ratio_q3) == pytest.approx((1.0, 1.5, 2.0))
    assert found.difference_ms == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.floats(1e-7, 10), st.floats(1e-7, 10)), min_size=1, max_size=30),
    st.floats(0.01, 100),
)
@settings(deadline=None)
def test_a_machine_that_is_slower_for_both_changes_no_ratio(pairs, factor) -> None:
    found = benchmark.summary(pairs)
    slower = benchmark.summary([(mine * factor, theirs * factor) for mine, theirs in pairs])
    assert found.ratio_q1 <= found.ratio <= found.ratio_q3
    assert (slower.ratio, slower.ratio_q1) == pytest.approx((found.ratio, found.ratio_q1), rel=1e-6)
    swapped = benchmark.summary([(theirs, mine) for mine, theirs in pairs])
    assert swapped.difference_ms == pytest.approx(-found.difference_ms)
    assert (swapped.p50_ms, swapped.p95_ms) == (found.dense_p50_ms, found.dense_p95_ms)


def test_a_clock_that_stands_still_gives_numbers(clock) -> None:
    pairs = benchmark.timed_pairs(lambda: None, lambda: None, repeats=5, seconds=0.0)
    assert pairs == [(0.0, 0.0)] * 5
    assert benchmark.summary(pairs).ratio == 1


def test_the_order_alternates_and_each_runs_once_before(clock) -> None:
    order: list[str] = []
    benchmark.timed_pairs(
        lambda: order.append("a"), lambda: order.append("b"), repeats=3, seconds=0.0, least=3
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_taking_the_result_apart_is_not_timed(clock) -> None:
    class Slow:
        def __del__(self) -> None:
            clock.now += 5.0

    pairs = benchmark.timed_pairs(Slow, Slow, repeats=2, seconds=0.0, least=2)
    assert pairs == [(0.0, 0.0)] * 2


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
def pair(dense_model, tmp_path) -> tuple[Path, Path]:
    """A sparse file and its dense twin."""
    paths = tmp_path / "sparse.onnx", tmp_path / "dense.onnx"
    for path, model in zip(paths, (encoding.encode(dense_model)[0], dense_model), strict=True):
        path.write_bytes(model.SerializeToString())
    return paths


def test_every_combination_is_measured_once_and_announced(pair) -> None:
    steps = Steps()
    found = benchmark.benchmark(*pair, int8=False, effort=replace(SHORT, threads=(1, 2)), recorder=steps)
    assert [(row.threads, row.batch) for row in found.inference] == [(1, 1), (1, 32), (2, 1), (2, 32)]
    for times in (*(row.times for row in found.inference), found.load):
        assert times.pairs == 5
        assert 0 < times.p50_ms <= times.p95_ms
        assert 0 < times.dense_p50_ms <= times.dense_p95_ms
        assert times.ratio_q1 <= times.ratio <= times.ratio_q3
    assert found.memory is not None
    assert (found.memory.processes, found.memory.batch) == (1, 1)
    assert found.int8_instructions is None
    assert "ONNX Runtime computes unstructured zeros at dense speed." in found.statement
    assert steps.announced == [6]
    assert steps.done == 6
    assert Performance.model_validate_json(found.model_dump_json()) == found


def test_by_default_one_thread_and_all_cores(pair, monkeypatch) -> None:
    for cores, expected in ((1, [1]), (3, [1, 3])):
        monkeypatch.setattr(benchmark, "cores", lambda cores=cores: cores)
        found = benchmark.benchmark(*pair, int8=True, effort=replace(SHORT, batches=(1,)), recorder=Silent())
        assert [row.threads for row in found.inference] == expected
    assert found.int8_instructions == benchmark.int8_instructions()


def test_a_fixed_batch_is_the_only_one(classifier, pair, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "DEFAULT_EFFORT", SHORT)
    model = ModelProto.FromString(pair[0].read_bytes())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    pair[0].write_bytes(model.SerializeToString())
    found = benchmark_export(classifier, pair[0], SIZE, opset=20, int8=False, recorder=Silent())
    assert {row.batch for row in found.inference} == {4}
    assert found.memory is not None
    assert found.memory.batch == 4


def test_a_file_that_is_no_model_is_refused(pair) -> None:
    pair[0].write_bytes(b"no model")
    with pytest.raises(VerificationError, check=lambda error: error.code == "onnx-not-loadable"):
        benchmark.benchmark(*pair, int8=False, effort=SHORT, recorder=Silent())


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


def test_peaks_are_those_of_the_model_and_not_of_whoever_asks(tmp_path) -> None:
    mine = np.ones(2**27, np.float32)  # half a gigabyte that a child must not inherit
    bare, loaded, ran = benchmark.peaks(big(tmp_path / "big.onnx", 64), 1)
    assert mine[0] == 1
    assert bare < 2**28
    assert loaded - bare >= 64 * 2**20
    assert loaded <= ran < bare + 2**28


def test_the_larger_model_needs_more(tmp_path) -> None:
    found = benchmark.paired_memory(
        big(tmp_path / "a.onnx", 48), big(tmp_path / "b.onnx", 1), batch=1, processes=1
    )
    assert found.load_bytes - found.dense_load_bytes > 30 * 2**20
    assert found.run_bytes >= found.load_bytes


def test_a_model_that_does_not_run_alone_is_named(tmp_path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, check=lambda error: error.code == "onnx-not-runnable"):
        benchmark.peaks(tmp_path / "bad.onnx", 1)


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
def test_what_linux_says_of_the_processor(content, instructions, name, tmp_path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_bytes(content.encode("latin-1"))
    assert benchmark.int8_instructions(path) == instructions
    assert benchmark.processor_name(path) == (name or benchmark.platform.machine())


def test_where_there_is_no_cpuinfo_nothing_is_claimed(tmp_path) -> None:
    assert benchmark.int8_instructions(tmp_path / "none") is None
    assert benchmark.processor_name(tmp_path / "none")
    assert benchmark.cores() >= 1


def test_images_are_noise_of_the_models_size(pair) -> None:
    images = benchmark._images(session(pair[0]), 7)
    assert images.shape == (7, *SIZE)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
