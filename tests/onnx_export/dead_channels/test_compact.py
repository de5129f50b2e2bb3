"""Each rule of compaction on a graph of a few nodes."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node
from torch import Tensor, nn

from s2ap_deploy.onnx_export.dead_channels.compact import compact, probes
from s2ap_deploy.onnx_export.export_report import Compaction
from s2ap_deploy.onnx_export.graph import check, to_onnx

Array = NDArray[np.generic]
SIZE = (2, 6, 6)


class Net:
    """Writes a small graph node by node; weights are random, and tests then zero what they like."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, Array] = {}
        self.random = np.random.default_rng(0)

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(make_node(operator, list(inputs), [output], name=f"n_{output}", **attributes))
        return output

    def store(self, name: str, values: object) -> str:
        array = np.asarray(values)
        self.arrays[name] = array.astype(np.float32) if array.dtype == np.float64 else array
        return name

    def conv(self, source: str, name: str, shape: tuple[int, ...], *, pad: int = 1, **options: object) -> str:
        """``name`` is the weight's; its bias is ``name`` + "b"."""
        self.store(name, self.random.normal(size=shape))
        self.store(f"{name}b", self.random.normal(size=shape[0]))
        return self.add("Conv", source, name, f"{name}b", pads=[pad] * 4, kernel_shape=shape[2:], **options)

    def head(self, source: str, channels: int) -> str:
        """Mean over the image, then a matrix: a reader without padding."""
        axes = self.store("axes", np.array([2, 3], np.int64))
        mean = self.add("ReduceMean", source, axes, keepdims=0)
        self.store("head", self.random.normal(size=(channels, 3)))
        return self.add("MatMul", mean, "head", output="logits")

    def constant(self, name: str, channels: list[int], values: list[float]) -> None:
        """Make output channels of a convolution constants."""
        self.arrays[name][channels] = 0
        self.arrays[f"{name}b"][channels] = values

    def model(self) -> ModelProto:
        inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *SIZE])]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])]
        stored = [numpy_helper.from_array(each, name) for name, each in self.arrays.items()]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, stored)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


Same = Callable[[Net], tuple[dict[str, Array], Compaction]]


@pytest.fixture
def same(double, evaluate) -> Same:
    """Compact, check that the logits stay to 1e-10 in float64, and return the new arrays and the report."""

    def run(net: Net) -> tuple[dict[str, Array], Compaction]:
        exact = double(net.model())
        onnx.checker.check_model(exact, full_check=True)
        smaller, removal = compact(exact)
        onnx.checker.check_model(smaller, full_check=True)
        inputs = probes(SIZE).astype(np.float64)
        before, after = evaluate(exact, inputs), evaluate(smaller, inputs)
        assert np.ptp(before, axis=0).max() > 1e-3, "the test's network must depend on its input"
        assert np.abs(after - before).max() <= 1e-10 * max(1, np.abs(before).max())
        single, rounded = compact(net.model())
        assert rounded == removal
        assert (smaller is exact) == (single == net.model()) == (removal.removed == 0)
        return {each.name: numpy_helper.to_array(each) for each in smaller.graph.initializer}, removal

    return run


def chain(reader_pad: int = 1) -> Net:
    """conv a (2 -> 6), ReLU, conv b (6 -> 4), ReLU, head."""
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (6, 2, 3, 3)))
    hidden = net.add("Relu", net.conv(hidden, "b", (4, 6, 3, 3), pad=reader_pad))
    net.head(hidden, 4)
    return net


def test_nothing_to_remove(same) -> None:
    _, removal = same(chain())
    assert (removal.removed, removal.tensors) == (0, ())
    assert removal.macs_before == removal.macs_after == 36 * (6 * 2 * 9 + 4 * 6 * 9) + 4 * 3
    assert removal.parameters_before == removal.parameters_after == 108 + 6 + 216 + 4 + 12


def test_a_channel_that_nobody_reads_goes(same) -> None:
    net = chain()
    net.arrays["b"][:, [1, 4]] = 0
    arrays, removal = same(net)
    assert (arrays["a"].shape, arrays["ab"].shape, arrays["b"].shape) == ((4, 2, 3, 3), (4,), (4, 4, 3, 3))
    (row,) = removal.tensors
    assert (row.name, row.channels_before, row.channels_after, row.merged) == ("a", 6, 4, 0)


def test_a_channel_that_is_zero_after_the_activation_goes(same) -> None:
    net = chain()
    net.constant("a", [0, 3], [0.0, -2.0])
    arrays, removal = same(net)
    assert arrays["a"].shape == (4, 2, 3, 3)
    assert removal.merged == 0


def test_dead_rows_free_what_only_they_read(same) -> None:
    net = chain()
    net.arrays["head"][[0, 1]] = 0
    net.arrays["b"][2:, :4] = 0
    arrays, _ = same(net)
    assert (arrays["a"].shape, arrays["b"].shape, arrays["head"].shape) == (
        (2, 2, 3, 3),
        (2, 2, 3, 3),
        (2, 3),
    )


def test_positive_constants_merge_into_one_channel_where_borders_read_zeros(same, evaluate) -> None:
    net = chain()
    net.constant("a", [1, 2, 5], [0.5, 2.0, 1.5])
    arrays, removal = same(net)
    assert arrays["a"].shape == (4, 2, 3, 3)
    assert (removal.removed, removal.merged) == (2, 2)
    # Putting the constants into the bias instead is right inside the image and wrong at its border.
    naive, whole = chain(), net.model()
    naive.arrays = {name: array.copy() for name, array in net.arrays.items()}
    naive.arrays["bb"] += net.arrays["b"][:, [1, 2, 5]].sum((2, 3)) @ np.float32([0.5, 2.0, 1.5])
    naive.arrays["b"][:, [1, 2, 5]] = 0
    images = probes(SIZE)
    assert np.abs(evaluate(naive.model(), images) - evaluate(whole, images)).max() > 0.01


def test_a_single_constant_with_a_padded_reader_stays(same) -> None:
    net = chain()
    net.constant("a", [2], [1.0])
    assert same(net)[1].removed == 0


@pytest.mark.parametrize("options", [{}, {"strides": [2, 2]}, {"dilations": [2, 2]}])
def test_constants_go_into_the_bias_of_a_reader_without_padding(same, options) -> None:
    net = chain(reader_pad=0)
    net.nodes[2].attribute.extend(helper.make_attribute(*each) for each in options.items())
    net.constant("a", [1, 2, 5], [0.5, 2.0, 1.5])
    arrays, removal = same(net)
    assert arrays["a"].shape == (3, 2, 3, 3)
    assert (removal.removed, removal.merged) == (3, 3)
    assert not np.allclose(arrays["bb"], net.arrays["bb"])


def test_a_reader_without_a_bias_gets_one(same) -> None:
    net = chain(reader_pad=0)
    del net.nodes[2].input[2]
    net.constant("a", [1], [0.5])
    net.constant("b", [3], [0.7])
    del net.arrays["bb"]
    arrays, removal = same(net)
    assert removal.removed == 2  # the last reader is a MatMul, and becomes a Gemm
    assert {array.shape for array in arrays.values()} >= {(3,)}


def test_automatic_padding_counts_as_padding(same) -> None:
    net = chain()
    del net.nodes[2].attribute[:]
    net.nodes[2].attribute.extend(
        [helper.make_attribute("auto_pad", "SAME_UPPER"), helper.make_attribute("kernel_shape", [3, 3])]
    )
    net.constant("a", [1, 2], [0.5, 2.0])
    assert same(net)[1].removed == 1


def test_constants_of_features_go_through_a_flattening(same) -> None:
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (5, 2, 3, 3)))
    flat = net.add("Reshape", hidden, net.store("shape", np.array([-1, 180], np.int64)), allowzero=1)
    net.store("m", net.random.normal(size=(3, 180)))
    net.store("mb", net.random.normal(size=3))
    net.add("Gemm", flat, "m", "mb", output="logits", transB=1)
    net.constant("a", [0, 4], [1.5, -1.0])
    arrays, removal = same(net)
    assert (arrays["m"].shape, arrays["shape"].tolist()) == ((3, 108), [-1, 108])
    assert (removal.removed, removal.merged) == (2, 1)


def stream(net: Net) -> str:
    """A residual block: stem a and branch c write the stream, b reads the stem."""
    stem = net.add("Relu", net.conv("image", "a", (5, 2, 3, 3)))
    inner = net.add("Relu", net.conv(stem, "b", (4, 5, 3, 3)))
    return net.add("Relu", net.add("Add", stem, net.conv(inner, "c", (5, 4, 3, 3))))


def test_a_stream_keeps_a_channel_that_one_writer_fills(same) -> None:
    net = Net()
    net.head(stream(net), 5)
    net.constant("a", [1], [-1.0])
    net.constant("c", [2], [0.0])
    assert same(net)[1].removed == 0


def test_a_stream_loses_a_channel_that_no_writer_fills(same) -> None:
    net = Net()
    net.head(stream(net), 5)
    net.constant("a", [1], [-1.0])
    net.constant("c", [1], [-1.0])
    arrays, removal = same(net)
    assert [len(arrays[name]) for name in "abc"] == [4, 4, 4]
    assert (removal.removed, removal.merged) == (2, 0)


def test_a_stream_loses_a_channel_that_no_reader_reads(same) -> None:
    net = Net()
    net.head(stream(net), 5)
    net.arrays["head"][3] = 0
    assert same(net)[1].removed == 0  # b still reads it
    net.arrays["b"][:, 3] = 0
    assert same(net)[1].removed == 2


def test_two_readers_of_a_stream_share_the_channel_that_stands_in(same) -> None:
    net = Net()
    net.head(net.add("Relu", net.conv(stream(net), "d", (4, 5, 3, 3))), 4)
    net.constant("a", [0, 1, 2], [1.0, 1.0, 0.5])
    net.constant("c", [0, 1, 2], [0.5, -0.4, 1.0])  # b prefers 0 or 1, d prefers 0 or 2
    arrays, removal = same(net)
    assert [len(arrays[name]) for name in "abcd"] == [3, 4, 3, 4]
    assert removal.merged == 4


def test_a_rounding_error_does_not_stand_in(same) -> None:
    net = Net()
    net.head(net.add("Relu", net.conv(stream(net), "d", (4, 5, 3, 3))), 4)
    net.arrays["b"][:, 1] = 0  # only d is left to be served
    net.constant("a", [0, 1], [1.0, 1.0])
    net.constant("c", [0, 1], [-0.9999999, 1.0])
    arrays, _ = same(net)
    assert len(arrays["a"]) == 5 or arrays["ab"][0] + arrays["cb"][0] > 1e-3


def test_every_tensor_keeps_a_channel(same) -> None:
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (5, 2, 3, 3)))
    branch = net.add("Relu", net.conv(hidden, "b", (4, 5, 3, 3)))
    branch = net.conv(branch, "c", (6, 4, 3, 3))
    net.head(net.add("Add", branch, net.conv("image", "d", (6, 2, 1, 1), pad=0)), 6)
    net.arrays["c"][:] = 0
    arrays, removal = same(net)
    assert (arrays["a"].shape, arrays["b"].shape, arrays["c"].shape) == (
        (1, 2, 3, 3),
        (1, 1, 3, 3),
        (6, 1, 3, 3),
    )
    assert removal.channels_after == 1 + 1 + 6 + 6 + 3


def test_a_filler_that_others_took_for_zero_stays_out(double, evaluate) -> None:
    net = chain()
    net.constant("a", [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1])
    net.arrays["b"][:] = 0
    net.arrays["b"][:, 0, 1, 1] = 1.0
    net.arrays["bb"][:] = -0.5
    net.constant("b", [2, 3], [-3, -3])
    exact = double(net.model())
    smaller, removal = compact(exact)
    inputs = probes(SIZE).astype(np.float64)
    assert np.allclose(evaluate(smaller, inputs), evaluate(exact, inputs), atol=1e-12, rtol=0)
    assert removal.channels_after < removal.channels_before


def test_inputs_and_outputs_keep_their_channels(same) -> None:
    net = chain()
    net.arrays["a"][:, 1] = 0
    net.arrays["head"][:, 2] = 0
    arrays, removal = same(net)
    assert (arrays["a"].shape[1], arrays["head"].shape[1], removal.removed) == (2, 3, 0)


@pytest.mark.parametrize(
    ("operator", "options", "merged"),
    [
        ("MaxPool", {"pads": [1, 1, 1, 1]}, 1),
        ("MaxPool", {"pads": [2, 2, 2, 2], "dilations": [2, 2]}, 0),
        ("AveragePool", {"pads": [1, 1, 1, 1], "count_include_pad": 0}, 1),
        ("AveragePool", {"pads": [1, 1, 1, 1], "count_include_pad": 1}, 0),
        ("AveragePool", {"count_include_pad": 1}, 1),
    ],
)
def test_pools_keep_constants_unless_they_count_the_padding(same, operator, options, merged) -> None:
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (6, 2, 3, 3)))
    pooled = net.add(operator, hidden, kernel_shape=[3, 3], **options)
    net.head(net.add("Relu", net.conv(pooled, "b", (4, 6, 3, 3))), 4)
    net.constant("a", [1, 2, 3], [0.5, 2.0, 0.0])
    _, removal = same(net)
    assert (removal.removed, removal.merged) == (1 + merged, merged)


def test_depthwise_channels_go_with_their_source(same) -> None:
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (5, 2, 1, 1), pad=0))
    hidden = net.add("Relu", net.conv(hidden, "d", (10, 1, 3, 3), group=5))
    net.head(hidden, 10)
    net.arrays["head"][[0, 1, 4]] = 0
    net.constant("d", [6, 7], [0.5, -1.0])
    arrays, removal = same(net)
    assert (arrays["a"].shape, arrays["d"].shape, arrays["head"].shape) == (
        (3, 2, 1, 1),
        (6, 1, 3, 3),
        (6, 3),
    )
    assert removal.merged == 3  # two constants, one of them zero, and the channel that they came from


def test_a_constant_becomes_a_map_behind_a_padded_depthwise_convolution(same) -> None:
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (4, 2, 1, 1), pad=0))
    net.head(net.conv(hidden, "d", (4, 1, 3, 3), group=4), 4)
    net.constant("a", [0, 1], [0.5, 2.0])
    assert same(net)[1].removed == 0


def test_groups_go_as_a_whole(same) -> None:
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (6, 2, 3, 3)))
    net.head(net.add("Relu", net.conv(hidden, "g", (6, 2, 3, 3), group=3)), 6)
    net.constant("a", [0], [-1.0])
    assert same(net)[1].removed == 0
    net.constant("g", [4, 5], [0.5, 0.5])
    arrays, _ = same(net)
    assert (arrays["a"].shape, arrays["g"].shape) == ((4, 2, 3, 3), (4, 2, 3, 3))


def test_concatenations_splits_and_slices_move_along(same) -> None:
    net = Net()
    left = net.conv("image", "a", (4, 2, 3, 3))
    right = net.conv("image", "b", (5, 2, 3, 3))
    both = net.add("Relu", net.add("Concat", left, right, axis=1))
    net.nodes.append(
        make_node("Split", [both, net.store("sizes", np.array([3, 6], np.int64))], ["p", "q"], axis=1)
    )
    for name, value in (("from", 1), ("to", 2**62), ("at", -3)):
        net.store(name, np.array([value], np.int64))
    tail = net.add("Slice", "q", "from", "to", "at")  # channels 4 to 8 of both
    chosen = net.add("Gather", tail, net.store("which", np.array([4, 0, -3], np.int64)), axis=1)
    padded = net.add("Pad", "p", net.store("pads", np.array([0, 2, 0, 0, 0, 1, 0, 0], np.int64)))
    net.head(net.add("Concat", padded, chosen, axis=1), 9)
    net.arrays["head"][[1, 2, 7]] = 0  # padding, channel 0 of a, channel 0 of b
    arrays, removal = same(net)
    assert (len(arrays["a"]), len(arrays["b"])) == (2, 2)
    assert arrays["sizes"].tolist() == [2, 2]
    assert arrays["which"].tolist() == [1, 0]
    assert arrays["pads"].tolist() == [0, 0, 0, 0, 0, 0, 0, 0]
    assert arrays["head"].shape == (4, 3)
    assert removal.removed == 5


def test_a_split_into_equal_parts_gets_sizes(same) -> None:
    net = Net()
    hidden = net.conv("image", "a", (6, 2, 3, 3))
    net.nodes.append(make_node("Split", [hidden], ["p", "q"], axis=1, num_outputs=2))
    net.head(net.add("Concat", "q", "p", axis=1), 6)
    net.arrays["head"][[0, 1]] = 0
    arrays, _ = same(net)
    assert [
        array.tolist() for array in arrays.values() if array.shape == (2,) and array.dtype == np.int64
    ] == [[2, 3], [3, 1]]


def test_batch_normalization_and_fixed_operands_are_narrowed(same) -> None:
    net = Net()
    hidden = net.conv("image", "a", (5, 2, 3, 3))
    parts = [
        net.store(name, net.random.uniform(0.5, 2, size=5)) for name in ("scale", "shift", "mean", "var")
    ]
    hidden = net.add("BatchNormalization", hidden, *parts)
    hidden = net.add("Mul", net.store("factor", net.random.normal(size=(5, 1, 1))), hidden)
    hidden = net.add("Div", hidden, net.store("by", np.array(2.0)))
    hidden = net.add("PRelu", hidden, net.store("slope", net.random.normal(size=(1, 5, 1, 1))))
    net.head(net.add("Add", hidden, net.store("map", net.random.normal(size=(1, 1, 6, 6)))), 5)
    net.arrays["head"][[0, 2]] = 0
    arrays, removal = same(net)
    shapes = [arrays[name].shape for name in ("scale", "var", "factor", "by", "slope", "map")]
    assert shapes == [(3,), (3,), (3, 1, 1), (), (1, 3, 1, 1), (1, 1, 6, 6)]
    assert removal.removed == 2


def test_a_normalization_without_scale_makes_a_constant(same) -> None:
    net = Net()
    hidden = net.conv("image", "a", (5, 2, 3, 3))
    parts = [
        net.store(name, net.random.uniform(0.5, 2, size=5)) for name in ("scale", "shift", "mean", "var")
    ]
    net.head(net.add("Relu", net.add("BatchNormalization", hidden, *parts)), 5)
    net.arrays["scale"][[1, 4]] = 0
    arrays, removal = same(net)
    assert (arrays["a"].shape, removal.merged) == ((3, 2, 3, 3), 2)


def test_a_gate_that_is_zero_kills_what_it_multiplies(same) -> None:
    net = Net()
    hidden = net.conv("image", "a", (5, 2, 3, 3))
    gate = net.add("GlobalAveragePool", net.add("Relu", net.conv("image", "g", (5, 2, 1, 1), pad=0)))
    net.head(net.add("Mul", hidden, gate), 5)
    net.constant("g", [0, 3], [-1.0, -2.0])
    arrays, removal = same(net)
    assert (len(arrays["a"]), len(arrays["g"]), removal.removed) == (3, 3, 4)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("LeakyRelu", {"alpha": 0.2}),
        ("HardSigmoid", {}),
        ("Gelu", {}),
        ("Selu", {}),
        ("Softplus", {}),
        ("Neg", {}),
    ],
)
def test_a_constant_is_followed_through_activations(same, operator, options) -> None:
    net = Net()
    hidden = net.add(operator, net.conv("image", "a", (5, 2, 3, 3)), **options)
    net.head(hidden, 5)
    net.constant("a", [2], [-0.7])
    assert same(net)[1].merged == 1


def test_weights_that_two_layers_share_part_when_they_must(same) -> None:
    net = Net()
    first = net.add("Relu", net.conv("image", "a", (4, 2, 3, 3)))
    second = net.add(
        "Relu", net.add("Conv", first, net.store("w", net.random.normal(size=(4, 4, 1, 1))), "ab")
    )
    third = net.add("Relu", net.add("Conv", second, "w", "ab"))
    net.head(third, 4)
    net.arrays["a"][1] = 0
    net.arrays["ab"][1] = -1.0
    net.arrays["w"][:, 2] = 0
    arrays, removal = same(net)
    assert removal.removed > 0
    assert sum(array.ndim == 4 for array in arrays.values()) == 3


def test_an_operator_that_is_not_known_keeps_its_channels_and_is_named(same) -> None:
    net = Net()
    hidden = net.add("Relu", net.conv("image", "a", (6, 2, 3, 3)))
    hidden = net.add("Softmax", hidden, axis=1)
    hidden = net.add("Relu", net.conv(hidden, "b", (5, 6, 3, 3)))
    net.head(net.add("Relu", net.conv(hidden, "c", (4, 5, 3, 3))), 4)
    for name in "abc":
        net.constant(name, [0, 1], [-1.0, -1.0])
    arrays, removal = same(net)
    assert [len(arrays[name]) for name in "abc"] == [6, 3, 2]
    (skipped,) = removal.skipped
    assert (skipped.operator, skipped.nodes) == ("Softmax", ("n_t2",))
    assert "does not support" in skipped.reason


@pytest.mark.parametrize(
    "mutate",
    [
        lambda node: setattr(node, "domain", "elsewhere"),
        lambda node: node.attribute.append(helper.make_attribute("training_mode", 1)),
    ],
)
def test_foreign_and_training_operators_are_left_alone(mutate) -> None:
    net = chain()
    parts = [net.store(name, np.ones(6)) for name in ("scale", "shift", "mean", "var")]
    net.nodes.insert(1, make_node("BatchNormalization", ["t0", *parts], ["n"], name="norm"))
    net.nodes[2].input[0] = "n"
    net.constant("a", [1, 2], [0.0, 0.0])
    mutate(net.nodes[1])
    _, removal = compact(net.model())
    assert [skipped.nodes for skipped in removal.skipped] == [("norm",)]
    assert removal.removed == 0


def test_what_a_nested_graph_reads_stays() -> None:
    net = chain()
    branch = helper.make_graph(
        [make_node("Identity", ["t1"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    net.nodes.insert(
        2, make_node("If", ["which"], ["either"], then_branch=branch, else_branch=branch, name="if")
    )
    net.store("which", np.array(True))
    net.constant("a", [1, 2], [0.0, 0.0])
    assert compact(net.model())[1].removed == 0


def test_a_computed_weight_is_left_alone() -> None:
    net = chain()
    net.nodes.insert(0, make_node("Neg", ["b"], ["minus"], name="minus"))
    net.nodes[3].input[1] = "minus"
    net.constant("a", [1, 2], [0.0, 0.0])
    _, removal = compact(net.model())
    assert removal.removed == 0
    assert {each.operator for each in removal.skipped} == {"Neg", "Conv"}


def test_constant_nodes_count_as_fixed(same) -> None:
    net = chain()
    for name in ("b", "bb"):
        value = numpy_helper.from_array(net.arrays[name], name)
        if name == "b":
            net.arrays["b"][:, 1] = 0
            value = numpy_helper.from_array(net.arrays.pop("b"), name)
            net.nodes.insert(0, make_node("Constant", [], [name], value=value))
    exact = net.model()
    smaller, removal = compact(exact)
    check(smaller)
    assert removal.removed == 1
    assert all(node.op_type != "Constant" for node in smaller.graph.node)


class Attention(nn.Module):
    """Patches, one block of attention and a perceptron, a mean over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.perceptron = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.perceptron(x)).mean(1))


def test_attention_is_skipped_by_name(evaluate) -> None:
    network = Attention()
    network.patches.weight.data[:4] = 0
    network.perceptron[0].weight.data[:8] = 0
    network.head[0].weight.data[:2] = 0
    model = to_onnx(network, SIZE)
    smaller, removal = compact(model)
    check(smaller)
    images = probes(SIZE)
    assert np.abs(evaluate(smaller, images) - evaluate(model, images)).max() < 1e-6
    assert [(row.name, row.channels_after, row.merged > 0) for row in removal.tensors] == [
        ("head.0.weight", 4, bool((network.head[0].bias[:2] > 0).any()))
    ]
    assert {"MatMul", "Softmax", "LayerNormalization"} <= {each.operator for each in removal.skipped}
    assert all(each.nodes and each.reason for each in removal.skipped)


def test_weights_of_wrong_rank_or_no_channels_do_no_harm() -> None:
    model = helper.make_model(
        helper.make_graph(
            [make_node("Flatten", ["image"], ["flat"], axis=0), make_node("Identity", ["flat"], ["logits"])],
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    smaller, removal = compact(model)
    assert smaller is model
    assert (removal.channels_before, removal.macs_before) == (0, 0)
