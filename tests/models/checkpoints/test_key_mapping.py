"""Prefixes, RST's layers and normalization in published files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.models.checkpoints.key_mapping import (
    adapt_rst,
    find_normalization,
    for_unit_images,
    is_normalization,
    strip_prefixes,
)
from s2ap_deploy.spec import Normalization

WEIGHTS = {"conv.weight": torch.rand(2), "linear.bias": torch.rand(3)}


def named(prefix: str, tensors: dict[str, Tensor] = WEIGHTS) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.encoder.", "1.")


@given(st.lists(st.sampled_from(PREFIXES), max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_stack_of_prefixes_comes_off_one_by_one(stack) -> None:
    prefix = "".join(stack)
    found = {removed: tensors for removed, tensors, _ in strip_prefixes(named(prefix))}
    assert list(found) == sorted(found, key=len)
    deep = ["".join(stack[:depth]) for depth in range(len(stack) + 1)]
    assert set(found) >= {each for each in deep if each.count(".") <= 5}
    if prefix.count(".") <= 5:
        assert found[prefix] == WEIGHTS


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
def test_stripping_loses_no_tensor_and_is_undone_by_the_prefix(tensors) -> None:
    for removed, stripped, aside in strip_prefixes(tensors):
        assert len(stripped) + len(aside) == len(tensors)
        assert all(stripped), "no name may become empty"
        for name in tensors:
            assert name.removeprefix(removed) in stripped or name in aside or is_normalization(name)


def test_a_prefix_that_only_some_share_stays() -> None:
    tensors = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(strip_prefixes(tensors)) == [("", tensors, ())]


def test_strays_outside_of_the_prefix_are_left_aside_by_name() -> None:
    tensors = {**named("net.body."), "n_averaged": torch.zeros(()), "criterion.weight": torch.zeros(4)}
    found = list(strip_prefixes({**tensors, "net.normalize.mean": torch.zeros(3)}))
    assert [removed for removed, *_ in found] == ["", "", "net.", "net.body."]
    assert set(found[-1][1]) == {*WEIGHTS, "net.normalize.mean"}
    assert found[-1][2] == ("n_averaged", "criterion.weight")


def test_a_normalization_need_not_share_the_prefix() -> None:
    found = list(strip_prefixes({**named("model."), "mu": torch.zeros(3)}))
    assert found[-1] == ("model.", {**WEIGHTS, "mu": found[-1][1]["mu"]}, ())


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
def test_a_convolution_as_head_becomes_a_linear_layer_of_either_name(bias) -> None:
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
def test_networks_of_the_usual_kind_are_not_adapted(tensors) -> None:
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
        "module.backbone.norm.pixel_mean",
        "layer1.mean",
    ],
)
def test_habitual_names_of_a_normalization(name) -> None:
    assert is_normalization(name)


@pytest.mark.parametrize("name", ["bn1.running_mean", "mean.weight", "mus", "norm.weight"])
def test_other_names_are_weights(name) -> None:
    assert not is_normalization(name)


def test_a_wide_tensor_of_such_a_name_is_a_weight() -> None:
    assert is_normalization("mean", torch.zeros(1, 3, 1, 1))
    assert not is_normalization("layer.mean", torch.zeros(64))


@pytest.mark.parametrize(
    ("mean", "std", "scaled"),
    [
        ((0.5,), (0.25,), ((0.5,), (0.25,))),
        ((127.5,), (63.75,), ((0.5,), (0.25,))),
        ((51.0, 102.0, 153.0), (255.0, 51.0, 25.5), ((0.2, 0.4, 0.6), (1.0, 0.2, 0.1))),
    ],
)
def test_a_normalization_for_bytes_is_rescaled(mean, std, scaled) -> None:
    found, note = for_unit_images(Normalization(mean=mean, std=std))
    assert found.mean == pytest.approx(scaled[0])
    assert found.std == pytest.approx(scaled[1])
    assert (note is None) == (mean == scaled[0])


@pytest.mark.parametrize(
    ("mean", "std"), [((300.0,), (60.0,)), ((120.0,), (0.2,)), ((1.5, -3.0), (2.0, 2.0))]
)
def test_a_normalization_of_no_images_is_refused(mean, std) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "normalization-not-for-images"):
        for_unit_images(Normalization(mean=mean, std=std))


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
        ({"mean": torch.zeros(3), "0.mean": torch.ones(3), "std": torch.ones(3)}, "normalization-ambiguous"),
        ({"mean": torch.zeros(3), "std": torch.ones(1)}, "normalization-length-mismatch"),
    ],
)
def test_half_a_normalization_is_refused(tensors, code) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == code):
        find_normalization(tensors)
