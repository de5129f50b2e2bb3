"""Every weight that multiplies activations is counted, whoever holds it; sparsity is a share of them all."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.architectures.architecture import fold_parametrizations
from s2ap_deploy.models.architectures.custom import with_plain_weights
from s2ap_deploy.models.channels.layer_channels import macs
from s2ap_deploy.models.used_weights import used_weights, weight_count
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.stages.prune import score

SIZE = (2, 6, 6)


class Own(nn.Module):
    """A module of one forward function over parameters of the given shapes."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def standardized(net: Own, x: Tensor) -> Tensor:
    return F.conv2d(x, (net.w - net.w.mean()) / net.w.std()).mean((2, 3))


CASES: dict[str, tuple[Own, tuple[str, ...], set[str], dict[str, str]]] = {
    "convolution on an own parameter": (
        Own(lambda net, x: F.conv2d(x, net.w, net.b).mean((2, 3)), w=(4, 2, 3, 3), b=(4,)),
        ("w",),
        set(),
        {"b": "bias"},
    ),
    "matrix products, by einsum and transposed": (
        Own(lambda net, x: torch.einsum("bi,ij->bj", x.flatten(1), net.w) @ net.v.T, w=(72, 5), v=(3, 5)),
        ("w", "v"),
        set(),
        {},
    ),
    "a mask and a scale keep zeros": (
        Own(
            lambda net, x: F.linear(x.flatten(1), net.w * torch.ones(4, 72).tril() * net.g),
            w=(4, 72),
            g=(4, 1),
        ),
        ("w",),
        set(),
        {"g": "scale"},
    ),
    "a standardized weight is computed": (Own(standardized, w=(4, 2, 3, 3)), (), {"w"}, {}),
    "a low-rank update is computed": (
        Own(lambda net, x: F.linear(x.flatten(1), net.w + net.u @ net.v), w=(4, 72), u=(4, 2), v=(2, 72)),
        (),
        {"w", "u", "v"},
        {},
    ),
    "a map that multiplies element by element": (
        Own(lambda net, x: F.linear((x * net.m).flatten(1), net.w), m=(6, 6), w=(3, 72)),
        ("w",),
        {"m"},
        {},
    ),
    "positions, scales and tokens": (
        Own(
            lambda net, x: F.linear((x + net.p) * net.s, net.w).sum((1, 2)) + net.t[0],
            p=(1, 2, 6, 6),
            s=(2, 1, 1),
            w=(3, 6),
            t=(2, 3),
        ),
        ("w",),
        set(),
        {"p": "table", "s": "scale", "t": "table"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_told_apart_by_what_they_do(case) -> None:
    network, prunable, outside, uncounted = CASES[case]
    used = used_weights(network, SIZE)
    assert used.prunable == prunable
    assert set(used.outside) == outside
    assert used.uncounted == uncounted
    count = weight_count(network, used)
    assert count.counted - count.prunable == sum(each.weights for each in count.outside)
    assert all(each.name in count.text for each in count.outside)


def test_the_meta_device_and_images_give_the_same_answer() -> None:
    network = layers(["conv", "transposed", "attention"], 3)
    expected = used_weights(network, SIZE)
    assert used_weights(network, SIZE, torch.rand(3, *SIZE)) == expected
    assert used_weights(network.to("meta"), SIZE) == expected


def test_an_unused_layer_is_told() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    network[1].register_module("aside", nn.Linear(2, 2))
    assert used_weights(network, SIZE).unused == ("1.aside.weight", "1.aside.bias")


def test_multiply_accumulates_are_those_of_the_equations() -> None:
    transposed = nn.ConvTranspose2d(2, 3, 4, 2, 1)
    assert macs(nn.Sequential(transposed, nn.Flatten(), nn.Linear(432, 2)), SIZE) == 36 * 2 * 3 * 16 + 864
    attention = Tokens(6)
    assert macs(nn.Sequential(attention, nn.Linear(6, 2)), SIZE) == 12 * 6 * 18 + 12 * 36 + 12


class Tokens(nn.Module):
    """Attention over the rows of all channels, averaged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "grouped": lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 2, 3, padding=1),
    "rows": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 2, 3, padding=1), nn.Unflatten(2, (6, 6))),
    "norm": lambda: nn.BatchNorm2d(2),
    "own": lambda: Own(lambda net, x: F.conv2d(x, net.w, padding=1), w=(2, 2, 3, 3)),
    "linear": lambda: nn.Linear(6, 6),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)),
    "attention": lambda: Rows(),
}
# Values that multiply activations in each, by the definition of the layer.
WEIGHTS = {
    "conv": 36,
    "grouped": 18,
    "transposed": 36,
    "rows": 12,
    "norm": 0,
    "own": 36,
    "linear": 36,
    "weight_norm": 36,
    "spectral_norm": 4,
    "old weight_norm": 36,
    "old spectral_norm": 4,
    "attention": 144,
}


class Rows(nn.Module):
    """Attention among the rows of an image, which keeps its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2)
        return x + self.attention(rows, rows, rows, need_weights=False)[0].unflatten(1, (2, 6))  # type: ignore[no-any-return]


def layers(names: list[str], classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(LAYERS[name]() for name in names), nn.Flatten(), nn.Linear(72, classes)).eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@given(
    st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    st.sampled_from(["uniform", "erk", "global"]),
    st.sampled_from([0.5, 0.8, 0.9]),
)
@settings(max_examples=25, deadline=None)
def test_reported_sparsity_is_zeros_over_all_weights_of_the_saved_file(names, budget, sparsity) -> None:
    network = layers(names, 3)
    images = torch.rand(2, *SIZE)
    expected = network(images)
    network = with_plain_weights(network)
    assert torch.allclose(network(images), expected, atol=1e-6)
    used = used_weights(network, SIZE)
    section = PruneSection(sparsity=sparsity, method="magnitude", budget=budget)
    scored = score(network, used, SIZE, section, 0).scored
    masks = scored.finish()
    reported = 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(m.numel() for m in masks.values())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    # By definition of the layers and from the file alone: no name of the code under test is used.
    total = sum(WEIGHTS[name] for name in names) + 72 * 3
    zeros = sum(
        int((tensor == 0).sum())
        for name, tensor in state.items()
        if tensor.dim() >= 2 and not name.endswith("running_mean")
    )
    assert sum(mask.numel() for mask in masks.values()) == total
    assert zeros / total == pytest.approx(reported)
    assert zeros == total - math.floor((1 - sparsity) * total + 0.5 + 1e-9)


def test_the_file_of_a_pruned_network_has_the_zeros(tmp_path) -> None:
    network = layers(["attention", "rows"], 3)
    section = PruneSection(sparsity=0.9, method="magnitude", budget="uniform")
    score(network, used_weights(network, SIZE), SIZE, section, 0).scored.finish()
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    weights = [tensor for tensor in load_file(tmp_path / "m.safetensors").values() if tensor.dim() >= 2]
    assert sum(tensor.numel() for tensor in weights) == 144 + 12 + 216
    assert sum(int((tensor == 0).sum()) for tensor in weights) == 335


def test_weights_that_cannot_be_pruned_count_in_the_request() -> None:
    network = nn.Sequential(Own(lambda net, x: standardized(net, x), w=(4, 2, 3, 3)), nn.Linear(4, 3))
    used = used_weights(network, SIZE)
    section = PruneSection(sparsity=0.9, method="magnitude", budget="uniform")
    with pytest.raises(UsageError, check=lambda error: error.code == "sparsity-unaffordable") as refused:
        score(network, used, SIZE, section, 0)
    assert f"{(12 - 1) / 84:.6f}" in str(refused.value.hint)  # 12 of 84 can be pruned, one stays
    allowed = section.model_copy(update={"allow_unpruned": True, "sparsity": 0.5})
    masks = score(network, used, SIZE, allowed, 0).scored.finish()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"1.weight": 6}
    reached = section.model_copy(update={"sparsity": 0.1})
    masks = score(network, used, SIZE, reached, 0).scored.finish()
    assert sum(int((~mask).sum()) for mask in masks.values()) == 8


def test_folding_leaves_the_original_as_it_was() -> None:
    network = layers(["weight_norm", "spectral_norm"], 3)
    images = torch.rand(2, *SIZE)
    expected = network(images)
    folded = with_plain_weights(network)
    assert torch.equal(network(images), expected)
    assert "0.weight" in folded.state_dict()
    assert fold_parametrizations(folded) == ()
