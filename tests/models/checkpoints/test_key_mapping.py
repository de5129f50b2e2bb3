"""Prefixes, RST's layers and normalization in published files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.models.checkpoints.key_mapping import (
    PREFIXES,
    adapt_rst,
    find_normalization,
    is_normalization,
    strip_prefixes,
)

WEIGHTS = {"conv.weight": torch.rand(2), "linear.bias": torch.rand(3)}


def named(prefix: str, tensors: dict[str, Tensor] = WEIGHTS) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@given(st.lists(st.sampled_from(PREFIXES), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_stack_of_prefixes_comes_off_one_by_one(stack: list[str]) -> None:
    prefix = "".join(stack)
    found = list(strip_prefixes(named(prefix)))
    assert [removed for removed, _ in found] == ["".join(stack[:depth]) for depth in range(len(stack) + 1)]
    assert found[-1][1] == WEIGHTS


@given(
    st.dictionaries(
        st.lists(
            st.sampled_from(["module", "model", "1", "conv", "mean", "weight"]), min_size=1, max_size=4
        ).map(".".join),
        st.just(torch.zeros(1)),
        max_size=6,
    )
)
@settings(max_examples=150, deadline=None)
def test_stripping_loses_no_tensor_and_is_undone_by_the_prefix(tensors: dict[str, Tensor]) -> None:
    for removed, stripped in strip_prefixes(tensors):
        assert len(stripped) == len(tensors)
        assert all(stripped), "no name may become empty"
        for name in tensors:
            assert name.removeprefix(removed) in stripped or is_normalization(name)


def test_a_prefix_that_only_some_share_stays() -> None:
    tensors = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(strip_prefixes(tensors)) == [("", tensors)]


def test_a_normalization_need_not_share_the_prefix() -> None:
    found = list(strip_prefixes({**named("model."), "mu": torch.zeros(3)}))
    assert found[-1] == ("model.", {**WEIGHTS, "mu": found[-1][1]["mu"]})


def test_two_names_that_would_become_one_stop_the_stripping() -> None:
    tensors = {"module.mean": torch.zeros(1), "mean": torch.zeros(1), "module.w": torch.zeros(1)}
    assert len(list(strip_prefixes(tensors))) == 1


BARE = {"bn.running_mean": torch.rand(4), "bn.running_var": torch.rand(4), "running_mean": torch.rand(2)}


def test_normalization_without_scale_and_shift_gets_one_and_zero() -> None:
    ((adapted, notes),) = adapt_rst(WEIGHTS | BARE)
    assert adapted.keys() - WEIGHTS.keys() - BARE.keys() == {"bn.weight", "bn.bias", "weight", "bias"}
    assert adapted["bn.weight"].tolist() == [1.0] * 4
    assert adapted["bn.bias"].tolist() == [0.0] * 4
    assert notes == ("2 batch normalizations have no scale and shift: filled with 1 and 0",)


@pytest.mark.parametrize("bias", [None, torch.rand(3)])
def test_a_convolution_as_head_becomes_a_linear_layer_of_either_name(bias: Tensor | None) -> None:
    head = {"fc.weight": torch.rand(3, 5, 1, 1)} | ({} if bias is None else {"fc.bias": bias})
    found = list(adapt_rst({"conv.weight": torch.rand(2)} | head))
    assert [set(tensors) - {"conv.weight"} for tensors, _ in found] == [
        {"fc.weight", "fc.bias"},
        {"linear.weight", "linear.bias"},
    ]
    for tensors, _ in found:
        name = "fc" if "fc.weight" in tensors else "linear"
        assert torch.equal(tensors[f"{name}.weight"], head["fc.weight"][:, :, 0, 0])
        assert torch.equal(tensors[f"{name}.bias"], torch.zeros(3) if bias is None else bias)
    assert all(("bias 0" in notes[0]) is (bias is None) for _, notes in found)
    taken = list(adapt_rst(WEIGHTS | head))
    assert [set(tensors) - WEIGHTS.keys() for tensors, _ in taken] == [{"fc.weight", "fc.bias"}]


@pytest.mark.parametrize(
    "tensors",
    [
        WEIGHTS,
        {"fc.weight": torch.rand(3, 5)},
        {"fc.weight": torch.rand(3, 5, 3, 3)},
        {"bn.running_mean": torch.rand(4), "bn.weight": torch.rand(4)},
    ],
)
def test_networks_of_the_usual_kind_are_not_adapted(tensors: dict[str, Tensor]) -> None:
    assert list(adapt_rst(tensors)) == []


@pytest.mark.parametrize(
    "name",
    [
        "mu",
        "sigma",
        "mean",
        "std",
        "normalize.mean",
        "module.normalizer.new_std",
        "0.mean",
        "model.mu",
        "0.sds",
    ],
)
def test_habitual_names_of_a_normalization(name: str) -> None:
    assert is_normalization(name)


@pytest.mark.parametrize(
    "name", ["bn1.running_mean", "conv.std", "mean.weight", "layer1.mean", "1.mean", "mus", "norm.weight"]
)
def test_other_names_are_weights(name: str) -> None:
    assert not is_normalization(name)


def test_normalization_is_read_from_any_shape() -> None:
    found = find_normalization(
        {"mu": torch.tensor([0.5, 0.25, 0.125]).reshape(1, 3, 1, 1), "sigma": torch.ones(3, 1, 1)}
    )
    assert found is not None
    assert (found.mean, found.std) == ((0.5, 0.25, 0.125), (1.0, 1.0, 1.0))


def test_no_normalization_is_none() -> None:
    assert find_normalization({}) is None


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"mean": torch.zeros(3)}, "normalization-ambiguous"),
        (
            {"mean": torch.zeros(3), "0.mean": torch.ones(3), "std": torch.ones(3)},
            "normalization-ambiguous",
        ),
        ({"mean": torch.zeros(3), "std": torch.ones(1)}, "normalization-length-mismatch"),
    ],
)
def test_half_a_normalization_is_refused(tensors: dict[str, Tensor], code: str) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == code):
        find_normalization(tensors)
