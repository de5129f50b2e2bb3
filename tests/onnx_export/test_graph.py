import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError, InputError, UsageError
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.onnx_export import graph
from s2ap_deploy.onnx_export.encoding import default_opset
from s2ap_deploy.onnx_export.inference import logits, session


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_names_batch_and_metadata(dense_model) -> None:
    onnx.checker.check_model(dense_model, full_check=True)
    (entry,), (exit_,) = dense_model.graph.input, dense_model.graph.output
    assert (entry.name, exit_.name) == ("image", "logits")
    shape = entry.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", 3, 8, 8]
    assert {prop.key: prop.value for prop in dense_model.metadata_props} == {"s2ap.sparsity": "0.9"}
    assert default_opset(dense_model) == 20


def test_batchnorm_is_folded_and_normalization_is_inside(dense_model) -> None:
    operators = {node.op_type for node in dense_model.graph.node}
    assert "BatchNormalization" not in operators
    assert {"Sub", "Div"} <= operators


def test_zeros_survive_folding_and_none_is_negative(dense_model, masks) -> None:
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in dense_model.graph.initializer}
    for name, mask in masks.items():
        assert np.array_equal(tensors[name] != 0, mask.numpy()), name
    for array in tensors.values():
        assert not np.any(np.signbit(array) & (array == 0))


def test_nothing_of_the_machine_is_in_the_file(dense_model) -> None:
    texts = re.findall(rb"[\x20-\x7e]{5,}", dense_model.SerializeToString())
    repository = str(Path(__file__).resolve().parents[2]).encode()
    for text in texts:
        assert repository not in text
        assert b"site-packages" not in text
        assert b".py" not in text
    assert not dense_model.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in dense_model.graph.node)


def test_the_classifier_is_not_touched(capfd) -> None:
    network = tiny().train()
    before = weights_hash(network)
    graph.to_onnx(network, (1, 6, 6))
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert weights_hash(network) == before
    assert capfd.readouterr().out == ""


def test_train_mode_exports_the_evaluation_function() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    network(torch.rand(8, 1, 4, 4))
    image = torch.rand(3, 1, 4, 4)
    model = graph.to_onnx(network.train(), (1, 4, 4))
    (found,) = ReferenceEvaluator(model).run(None, {"image": image.numpy()})
    with torch.no_grad():
        expected = network.eval()(image).numpy()
    assert np.allclose(found, expected, atol=1e-6)


def test_half_precision_weights_become_float32() -> None:
    model = graph.to_onnx(Classifier(tiny().half()), (1, 6, 6))
    assert {tensor.data_type for tensor in model.graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 19, 21, 22, 23, 24, 25])
def test_every_offered_opset_is_written(opset) -> None:
    assert default_opset(graph.to_onnx(tiny(), (1, 6, 6), opset=opset)) == opset


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_in_the_shape(batch) -> None:
    model = graph.to_onnx(tiny(), (1, 6, 6), batch=batch)
    for value in (model.graph.input[0], model.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_value == batch
    images = np.random.default_rng(0).random((7, 1, 6, 6), np.float32)
    found = logits(session(model.SerializeToString()), images)
    with torch.no_grad():
        assert np.allclose(found, tiny()(torch.from_numpy(images)).numpy(), atol=1e-6)


def test_a_network_for_one_batch_size_is_exported_at_that_size() -> None:
    class OfTwo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.flatten(1)
            return torch.stack([first, second])

    assert (
        graph.to_onnx(OfTwo(), (1, 2, 2), batch=2).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    )
    with pytest.raises(ArchitectureError):
        graph.to_onnx(OfTwo(), (1, 2, 2), batch=3)


def test_weights_over_2_gib_are_refused_before_any_work(monkeypatch) -> None:
    class Vast(nn.Module):
        """What it says of its size is all that is asked: no such memory is taken."""

        def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
            vast = nn.Parameter(torch.empty(2**29 + 1, dtype=torch.int8, device="meta"), requires_grad=False)
            return iter([("weight", vast)])

    monkeypatch.setattr(graph, "_trace", lambda *args, **options: pytest.fail("work was begun"))
    with pytest.raises(UsageError, check=lambda error: error.code == "weights-too-large"):
        graph.to_onnx(Vast(), (1, 6, 6))


def with_weight(network: nn.Sequential, *layers: int, value: float) -> nn.Sequential:
    for layer in layers:
        network[layer].weight.data.view(-1)[0] = value
    return network


OVERFLOWING = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Flatten())


@pytest.mark.parametrize(
    ("code", "network", "options"),
    [
        *(("opset-unsupported", tiny(), {"opset": opset}) for opset in (11, 17, 26)),
        *(("batch-unsupported", tiny(), {"batch": batch}) for batch in (0, -1, 1025)),
        ("weights-nonfinite", with_weight(tiny(), 0, value=float("nan")), {}),
        ("weights-nonfinite", with_weight(OVERFLOWING, 0, 1, value=1e30), {"size": (1, 3, 3)}),
        ("input-size-unsupported", tiny(), {"size": (3, 6, 6)}),
        ("output-not-logits", Pair(), {}),
        ("output-not-logits", nn.Identity(), {}),
        ("network-not-traceable", Branching(), {}),
    ],
)
def test_what_cannot_be_exported_is_refused(code, network, options) -> None:
    size = options.pop("size", (1, 6, 6))
    with pytest.raises(InputError, check=lambda error: error.code == code):
        graph.to_onnx(network, size, **options)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [("default_opset", lambda model: 18, "opset-unsupported"), ("MAX_BYTES", 100, "weights-too-large")],
)
def test_what_was_written_is_looked_at(name, value, code, monkeypatch) -> None:
    monkeypatch.setattr(graph, name, value)
    with pytest.raises(UsageError, check=lambda error: error.code == code):
        graph.to_onnx(tiny(), (1, 6, 6))
