"""Normalization inside, the hash of weights, and which weights can be pruned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError, CheckpointError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier, Normalize, dry_run, weights_hash
from s2ap_deploy.models.used_weights import prunable
from s2ap_deploy.spec import Normalization


def test_normalizes_per_channel() -> None:
    layer = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    assert layer.mean.shape == layer.std.shape == (1, 3, 1, 1)
    image = torch.rand(2, 3, 4, 4)
    expected = torch.stack(
        [(image[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)])], 1
    )
    assert torch.allclose(layer(image), expected)


def test_without_normalization_the_image_is_unchanged() -> None:
    network = nn.Flatten()
    image = torch.rand(2, 3, 4, 4)
    classifier = Classifier(network)
    assert isinstance(classifier.normalize, nn.Identity)
    assert torch.equal(classifier(image), image.flatten(1))


def test_normalization_moves_with_the_module_and_is_saved() -> None:
    classifier = Classifier(nn.Flatten(), Normalization(mean=(0.5,), std=(0.25,)))
    assert set(classifier.state_dict()) == {"normalize.mean", "normalize.std"}
    assert classifier.to(torch.float64).get_buffer("normalize.mean").dtype == torch.float64


@pytest.mark.parametrize(
    ("mean", "std", "code"),
    [
        ((0.5,), (0.5, 0.5), "normalization-length-mismatch"),
        ((0.5,), (0.0,), "normalization-invalid"),
        ((0.5,), (-1.0,), "normalization-invalid"),
        ((float("nan"),), (1.0,), "normalization-invalid"),
        ((0.5,), (float("inf"),), "normalization-invalid"),
    ],
)
def test_an_impossible_normalization_is_refused(mean, std, code) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == code):
        Normalize(mean, std)


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def test_hash_ignores_layout_training_mode_and_gradients() -> None:
    network = small()
    before = weights_hash(network)
    network.train()
    network(torch.rand(2, 3, 8, 8)).sum()  # moves running statistics
    assert weights_hash(network) != before
    again = small().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    assert weights_hash(again) == before


@given(st.integers(0, 107), st.integers(0, 31))
@settings(max_examples=40, deadline=None)
def test_one_changed_bit_changes_the_hash(position, bit) -> None:
    network = small()
    before = weights_hash(network)
    bits = network[0].weight.data.view(torch.int32).view(-1)  # type: ignore[union-attr, operator, index]
    bits[position] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert weights_hash(network) != before


def test_hash_tells_names_shapes_and_types_apart() -> None:
    one = nn.ParameterDict({"a": torch.zeros(4)})
    variants = [
        nn.ParameterDict({"b": torch.zeros(4)}),
        nn.ParameterDict({"a": torch.zeros(2, 2)}),
        nn.ParameterDict({"a": torch.zeros(4, dtype=torch.bfloat16)}),
        nn.ParameterDict({"a": torch.zeros(())}),
        nn.ParameterDict({"a": torch.zeros(0)}),
    ]
    assert len({weights_hash(variant) for variant in [one, *variants]}) == 6


class Crooked(nn.Module):
    """Registered in another order than used; one layer unused, one reached only through a functional."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)
        self.borrowed = nn.Linear(4, 4)
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.norm(self.first(x))).mean((2, 3))
        return self.last(nn.functional.linear(out, self.borrowed.weight))  # type: ignore[no-any-return]


def test_prunable_lists_what_is_used_in_the_order_of_use() -> None:
    assert prunable(Crooked(), (1, 5, 5)) == ("first.weight", "borrowed.weight", "last.weight")


def test_prunable_leaves_the_network_as_it_was() -> None:
    network = Classifier(Crooked()).train()
    network.get_submodule("network.dropout").eval()
    modes = [module.training for module in network.modules()]
    before = weights_hash(network)
    prunable(network, (1, 5, 5))
    assert [module.training for module in network.modules()] == modes
    assert weights_hash(network) == before
    assert all(parameter.grad is None for parameter in network.parameters())


def test_prunable_names_carry_the_classifiers_prefix() -> None:
    names = prunable(Classifier(registry.build("digits-conv")), (1, 8, 8))
    assert names == tuple(f"network.{layer}.weight" for layer in (0, 2, 5, 7))


def test_attention_projections_count() -> None:
    names = prunable(nn.Sequential(Attention()), (1, 2, 4))
    assert names == ("0.attention.in_proj_weight", "0.attention.out_proj.weight", "0.head.weight")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        out, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(out.mean(1))  # type: ignore[no-any-return]


def test_a_tied_weight_is_listed_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    network = nn.Sequential(nn.Flatten(), first, second)
    assert prunable(network, (1, 2, 2)) == ("1.weight",)
    assert prunable(network, (1, 2, 2))[0] in dict(network.named_parameters())


def test_the_direction_of_a_normed_weight_is_prunable() -> None:
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    names = prunable(nn.Sequential(nn.Flatten(), computed, nn.Linear(4, 3)), (1, 2, 2))
    assert names == ("1.parametrizations.weight.original1", "2.weight")


def test_the_wrong_input_size_is_said_and_modes_are_restored() -> None:
    network = registry.build("mnist-conv").train()
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "network-cannot-run"):
        prunable(network, (1, 27, 20))
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("network", "answer"), [(nn.Identity(), "shape 1x3x2x2"), (nn.AdaptiveMaxPool2d(1, True), "tuple")]
)
def test_an_answer_that_is_no_logits_is_refused(network, answer) -> None:
    with pytest.raises(ArchitectureError, match=answer, check=lambda error: error.code == "logits-invalid"):
        dry_run(network, (3, 2, 2))
