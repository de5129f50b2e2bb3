import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export import encoding, verification
from s2ap_deploy.onnx_export.encoding import weights
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.verification import compare_logits, compare_quantized, session


def identity_model(classes: int) -> bytes:
    """Returns its [n, classes, 1, 1] input as the logits: a judge whose verdicts the test writes down."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["logits"])],
        "identity",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", classes, 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
    )
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


class Shifted(nn.Module):
    """The identity as logits, plus a constant on one of them."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).clone()
        x[:, 0] += self.shift
        return x


def one_hot(classes: list[int] | NDArray[np.integer], count: int) -> NDArray[np.float32]:
    return np.eye(count, dtype=np.float32)[np.asarray(classes, int)].reshape(-1, count, 1, 1)


@pytest.mark.parametrize("choice", ["auto", "dense"])
def test_logits_agree_at_every_batch_size(classifier, dense_model, images, choice) -> None:
    model, _ = encoding.encode(dense_model, encoding=choice)
    running = session(model.SerializeToString())
    agreement = verification.compare(classifier, running, images)
    assert agreement.passed
    assert agreement.argmax_agree == agreement.n == 70
    reference = verification.logits(running, images, 64)
    for size in (1, 2, 7, 70):
        assert np.allclose(verification.logits(running, images, size), reference, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.99])
def test_plain_convolutions_agree_too(sparsity) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data *= torch.rand_like(parameter) >= sparsity
    model, table = encoding.encode(to_onnx(network, (1, 8, 8)))
    running = session(model.SerializeToString())
    assert verification.compare(
        network, running, np.random.default_rng(0).random((9, 1, 8, 8), np.float32)
    ).passed
    assert {row.encoding for row in table} <= ({"dense"} if sparsity == 0 else {"ef", "gaps"})


def test_a_shift_beyond_the_tolerance_fails() -> None:
    running = session(identity_model(4))
    inputs = np.random.default_rng(0).random((5, 4, 1, 1), np.float32)
    assert verification.compare(Shifted(0.9e-5), running, inputs).passed
    agreement = verification.compare(Shifted(2e-5), running, inputs)
    assert not agreement.passed
    assert agreement.max_logit_difference == pytest.approx(2e-5, rel=0.01)


def test_the_tolerance_grows_with_the_logits() -> None:
    running = session(identity_model(4))
    inputs = 1000 * one_hot([1, 2, 3], 4)
    agreement = verification.compare(Shifted(0.0), running, inputs)
    assert (agreement.largest_logit, agreement.tolerance) == (1000, pytest.approx(0.01))


def test_a_tie_within_the_tolerance_is_no_disagreement() -> None:
    running = session(identity_model(3))
    tied = np.array([0.5, 0.5 + 1e-7, 0.0], np.float32).reshape(1, 3, 1, 1)
    agreement = verification.compare(Shifted(1e-6), running, tied)
    assert (agreement.argmax_agree, agreement.ties, agreement.passed) == (0, 1, True)


def test_logits_that_are_not_numbers_fail() -> None:
    running = session(identity_model(3))
    assert not verification.compare(Shifted(float("nan")), running, one_hot([0, 1], 3)).passed


def test_a_fault_at_one_batch_size_only_fails(monkeypatch) -> None:
    exact = verification.logits

    def faulty(running: object, images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        return exact(running, images, size) * (np.nan if size == 2 else 1)

    monkeypatch.setattr(verification, "logits", faulty)
    agreement = verification.compare(Shifted(0.0), session(identity_model(3)), one_hot([0, 1, 2], 3))
    assert np.isnan(agreement.max_logit_difference)
    assert not agreement.passed


def test_coded_weights_are_folded_at_load(dense_model) -> None:
    model, _ = encoding.encode(dense_model)
    assert len(model.graph.node) > len(dense_model.graph.node)
    assert verification.decodes_at_load(model)
    assert verification.decodes_at_load(dense_model)


def test_a_decode_step_that_stays_in_the_graph_is_noticed() -> None:
    # Random numbers are the one constant input that no runtime may compute ahead of time.
    graph = helper.make_graph(
        [
            helper.make_node("RandomUniformLike", ["_s21"], ["weight"]),
            helper.make_node("MatMul", ["image", "weight"], ["logits"]),
        ],
        "unfoldable",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.zeros((4, 2), np.float32), "_s21")],
    )
    opset = [helper.make_opsetid("", 20)]
    assert not verification.decodes_at_load(helper.make_model(graph, opset_imports=opset, ir_version=10))


def test_a_decode_step_under_another_name_is_noticed(dense_model, monkeypatch) -> None:
    model, _ = encoding.encode(dense_model)
    rewritten = ModelProto()
    rewritten.CopyFrom(dense_model)
    rewritten.graph.node.add(op_type="CumSum", output=["renamed"])
    monkeypatch.setattr(verification.onnx, "load", lambda path: rewritten)
    assert not verification.decodes_at_load(model)


@given(st.integers(1, 30), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_points_are_counted_as_a_loop_would(n, seed) -> None:
    generator = np.random.default_rng(seed)
    clean, attacked, labels, clean_seen, attacked_seen = generator.integers(0, 3, (5, n))
    points = verification.CertifiedPoints(
        "c" * 64, one_hot(clean, 3), one_hot(attacked, 3), labels, clean_seen, attacked_seen
    )
    result = verification.check_points(session(identity_model(3)), points, batch_size=7)
    rows = list(zip(clean, attacked, labels, clean_seen, attacked_seen, strict=True))
    assert result.n == n
    assert result.clean_correct == sum(c == y for c, _, y, _, _ in rows)
    assert result.survived == sum(c == y and a == y for c, a, y, _, _ in rows)
    assert result.clean_disagreements == sum(c != s for c, _, _, s, _ in rows)
    assert result.adversarial_disagreements == sum(a != s for _, a, _, _, s in rows)
    assert result.ties == 0
    assert result.same_predictions == all(c == s and a == t for c, a, _, s, t in rows)
    expected = [(i, False, y, s, c) for i, (c, _, y, s, _) in enumerate(rows) if c != s]
    expected += [(i, True, y, t, a) for i, (_, a, y, _, t) in enumerate(rows) if a != t]
    assert [tuple(each.model_dump().values()) for each in result.changed] == expected
    lost = sum(before == label != after for _, _, label, before, after in expected)
    assert f"{lost} lost" in result.changed_text


def test_a_point_where_rounding_decides_is_a_tie() -> None:
    tied = np.array([[0.5, 0.5 + 1e-6, 0.0], [0.5, 0.6, 0.0]], np.float32).reshape(2, 3, 1, 1)
    recorded = np.array([0, 0])
    points = verification.CertifiedPoints("c" * 64, tied, tied, np.array([1, 1]), recorded, recorded)
    result = verification.check_points(session(identity_model(3)), points)
    assert (result.disagreements, result.ties) == (4, 2)


def test_a_file_that_the_runtime_refuses_is_reported() -> None:
    with pytest.raises(VerificationError, check=lambda error: error.code == "onnx-not-loadable"):
        session(identity_model(3)[:-20])


def test_inputs_of_another_size_are_reported() -> None:
    with pytest.raises(VerificationError, check=lambda error: error.code == "onnx-not-runnable"):
        verification.logits(session(identity_model(3)), np.zeros((1, 4, 1, 1), np.float32))


def test_twin_in_float_may_round_but_not_differ() -> None:
    file = np.array([[0.0, 2.0], [3.0, 1.0]], np.float32)
    assert compare_logits(file + np.float32(9e-4), file, quantized=False).passed
    assert not compare_logits(file + np.float32(4e-3), file, quantized=False).passed
    tied = np.array([[1.0, 1.0005], [3.0, 1.0]], np.float32)
    assert compare_logits(tied[:, ::-1], tied, quantized=False).ties == 1
    assert not compare_logits(np.full_like(file, np.nan), file, quantized=False).passed


def test_twin_of_int8_may_differ_by_steps_and_rarely_in_class() -> None:
    file = np.zeros((300, 2), np.float32)
    file[:, 1] = 127.0  # one step is 1
    assert compare_logits(file + 3, file, quantized=True).passed
    assert not compare_logits(file + 5, file, quantized=True).passed
    near = np.tile(np.array([[125.0, 127.0]], np.float32), (300, 1))
    flipped = near.copy()
    flipped[:3] = flipped[:3, ::-1]
    assert compare_logits(flipped, near, quantized=True).passed
    flipped[:4] = near[:4, ::-1]
    assert not compare_logits(flipped, near, quantized=True).passed


def test_quantized_file_is_held_against_a_floor_of_classes(classifier, dense_model, images) -> None:
    agreement = compare_quantized(classifier, session(dense_model.SerializeToString()), images)
    assert (agreement.tolerance, agreement.required, agreement.passed) == (None, 0.9, True)
    poor = agreement.model_copy(update={"argmax_agree": int(0.89 * agreement.n), "ties": 0})
    assert not poor.passed
    assert not agreement.model_copy(update={"max_logit_difference": float("nan")}).passed


class Tokens(nn.Module):
    """A linear layer on [batch, tokens, channels], whose weight the exporter transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x.flatten(2).transpose(1, 2)).mean(1))


def as_arrays(masks: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: mask.numpy() for name, mask in masks.items()}


def test_only_what_products_read_is_a_weight(dense_model) -> None:
    assert weights(dense_model).keys() == {
        "network.stem.weight",
        "network.block.weight",
        "network.linear.weight",
    }


def test_an_export_within_its_masks_passes(dense_model, masks) -> None:
    verification.check_masks(dense_model, as_arrays(masks))


def test_a_weight_outside_its_mask_is_found(dense_model, masks) -> None:
    narrower = as_arrays(masks)
    name = "network.linear.weight"
    narrower[name] = np.zeros_like(narrower[name])
    with pytest.raises(VerificationError, check=lambda error: error.code == "mask-violated"):
        verification.check_masks(dense_model, narrower)


def test_a_mask_of_an_unknown_shape_is_not_passed_over(dense_model) -> None:
    with pytest.raises(VerificationError, check=lambda error: error.code == "mask-violated"):
        verification.check_masks(dense_model, {"extra.weight": np.ones((3, 3), np.bool_)})


def test_a_transposed_weight_is_held_against_its_mask() -> None:
    torch.manual_seed(0)
    network = Tokens()
    mask = torch.rand(7, 4) > 0.5
    network.mix.weight.data *= mask
    model = to_onnx(network, (4, 2, 2))
    assert "mix.weight" not in weights(model)
    verification.check_masks(model, {"mix.weight": mask.numpy()})
    with pytest.raises(VerificationError, check=lambda error: error.code == "mask-violated"):
        verification.check_masks(model, {"mix.weight": ~mask.numpy()})


def test_a_network_that_amplifies_its_rounding_is_compared_by_it() -> None:
    class Rough(Shifted):
        def __init__(self, shift: float, noise: float) -> None:
            super().__init__(shift)
            self.noise = noise

        def forward(self, x: Tensor) -> Tensor:
            found = super().forward(x)
            return found if found.dtype == torch.float64 else found + self.noise

    images = one_hot([0, 1, 2, 1], 3)
    running = session(identity_model(3))
    allowed = verification.compare(Rough(4e-5, 2e-5), running, images)
    assert allowed.passed
    assert not verification.compare(Rough(4e-5, 0.0), running, images).passed
    assert not verification.compare(Rough(2e-3, 1e-2), running, images).passed
