"""Pruned checkpoints of HYDRA, HARP, RST and torch.nn.utils.prune, built from the layouts that they have."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import prune

from s2ap_deploy.errors import ArchitectureError, CheckpointError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints.checkpoint import describe, load
from s2ap_deploy.models.checkpoints.masked import apply_masks, layout_of
from s2ap_deploy.models.used_weights import prunable

State = dict[str, Tensor]
Options = dict[str, Any]
QUOTAS = {"0": -2.0, "2": 0.5, "5": -4.0, "7": 1.5}
KEEP, ALPHA = 0.1, 0.2


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digits() -> nn.Module:
    """A random network that looks at its image more than at its biases, so that attacks are over at once."""
    torch.manual_seed(0)
    network = registry.build("digits-conv").eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(0.1 if name.endswith("bias") else 4)
    return network


def scored(network: nn.Module, key: str) -> State:
    """Weights with independent, signed scores beside those of every convolution and linear layer."""
    state = dict(network.state_dict())
    for number, (name, module) in enumerate(network.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            state[f"{name}.{key}"] = noise(100 + number, *module.weight.shape)
    return state


def with_quotas(state: State) -> State:
    return state | {f"{layer}.k_score": torch.tensor(quota) for layer, quota in QUOTAS.items()}


def by_channels(state: State) -> State:
    """One score per input channel instead of one per weight."""
    cut = {
        n: t.flatten(2).sum((0, 2)) if t.dim() == 4 else t.sum(0) for n, t in state.items() if "popup" in n
    }
    return state | {n: t.reshape(1, -1, *[1] * (state[n].dim() - 2)) for n, t in cut.items()}


def quota(layer: str) -> float:
    return ALPHA * KEEP + (1 - ALPHA * KEEP) / (1 + math.exp(-QUOTAS[layer]))


def without_smallest(weight: Tensor, scores: Tensor, count: int) -> Tensor:
    """The weight with its ``count`` entries of smallest |score| at 0, found the slow way."""
    order = np.argsort(np.abs(scores.numpy().ravel()), kind="stable")
    flat = weight.numpy().copy().ravel()
    flat[order[:count]] = 0
    return torch.from_numpy(flat.reshape(weight.shape))


def expected_hydra(state: State, key: str = "popup_scores") -> State:
    return {
        n: without_smallest(state[n], state[n.replace("weight", key)], int((1 - KEEP) * state[n].numel()))
        for n in state
        if n.endswith("weight")
    }


def expected_harp(state: State) -> State:
    return {
        f"{layer}.weight": without_smallest(
            state[f"{layer}.weight"],
            state[f"{layer}.popup_scores"],
            int((1 - quota(layer)) * state[f"{layer}.weight"].numel()),
        )
        for layer in QUOTAS
    }


def expected_channels(state: State) -> State:
    found = {}
    for layer in QUOTAS:
        weight, scores = state[f"{layer}.weight"].clone(), state[f"{layer}.popup_scores"].flatten()
        kept = scores.abs().topk(round(quota(layer) * weight.shape[1])).indices.tolist()
        for channel in set(range(weight.shape[1])) - set(kept):
            weight[:, channel] = 0
        found[f"{layer}.weight"] = weight
    return found


def torch_pruned() -> tuple[State, State]:
    """What torch itself leaves after pruning, and the weights that it computes with."""
    network = digits()
    for name in QUOTAS:
        prune.l1_unstructured(network.get_submodule(name), "weight", amount=0.8)  # type: ignore[no-untyped-call]
    prune.random_unstructured(network.get_submodule("0"), "bias", amount=0.5)  # type: ignore[no-untyped-call]
    names = [f"{layer}.weight" for layer in QUOTAS] + ["0.bias"]
    return dict(network.state_dict()), {
        name: getattr(network.get_submodule(name[0]), name[2:]).detach().clone() for name in names
    }


def training_file(path: Path, state: State, prefix: str = "") -> Path:
    """HYDRA's and HARP's dictionary, with the numpy numbers that their schedules leave in the optimizer."""
    content = {
        "epoch": 20,
        "arch": "digits",
        "state_dict": {prefix + name: tensor for name, tensor in state.items()},
        "best_prec1": torch.tensor(51.5),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1) * 0.5, "params": [0]}]},
    }
    torch.save(content, path)
    return path


def layouts() -> dict[str, tuple[State, State, Options, str]]:
    """Per layout: the tensors of the file, the masked ones among what they mean, the options, the prefix."""
    hydra, rst = scored(digits(), "popup_scores"), scored(digits(), "scores")
    harp, channels = with_quotas(hydra), with_quotas(by_channels(hydra))
    quotas = {"keep": KEEP, "alpha": ALPHA}
    return {
        "HYDRA": (hydra, expected_hydra(hydra), {"keep": KEEP}, "module."),
        "HARP": (harp, expected_harp(harp), quotas, "module.basic_model."),
        "HARP, channels": (channels, expected_channels(channels), quotas, ""),
        "RST": (rst, expected_hydra(rst, "scores"), {"keep": KEEP}, ""),
        "torch.nn.utils.prune": (*torch_pruned(), {}, ""),
    }


LAYOUTS = ["HYDRA", "HARP", "HARP, channels", "RST", "torch.nn.utils.prune"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_import_computes_what_the_masked_network_computes_bit_for_bit(tmp_path, layout) -> None:
    """On random images; the masked network is run by torch with the masked weights swapped in."""
    state, expected, options, prefix = layouts()[layout]
    loaded, info, notes = load(training_file(tmp_path / "m.pth.tar", state, prefix), **options)
    assert set(loaded.network.state_dict()) == set(digits().state_dict())
    for name, tensor in expected.items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    images = torch.rand(16, 1, 8, 8)
    plain = {name: tensor for name, tensor in state.items() if name in digits().state_dict()}
    reference = torch.func.functional_call(digits(), plain | expected, images)
    assert torch.equal(loaded(images), reference)
    names = [name.removeprefix("network.") for name in prunable(loaded, (1, 8, 8))]
    zeros = sum(int((expected[name] == 0).sum()) for name in names)
    entries = sum(expected[name].numel() for name in names)
    assert info.sparsity == zeros / entries
    assert any(note.startswith(layout.split(",")[0]) for note in notes)
    assert any(f"{entries - zeros:,} of {entries:,} weights kept in 4 layers" in note for note in notes)


def test_harps_layers_keep_their_own_quotas_and_not_the_global_one(tmp_path) -> None:
    state = with_quotas(scored(digits(), "popup_scores"))
    loaded, _, notes = load(training_file(tmp_path / "m.pth.tar", state), keep=KEEP, alpha=ALPHA)
    for layer in QUOTAS:
        weight = loaded.get_parameter(f"network.{layer}.weight")
        kept = int(weight.count_nonzero())
        assert kept == weight.numel() - int((1 - quota(layer)) * weight.numel())
        assert abs(kept - KEEP * weight.numel()) > 0.01 * weight.numel()
    assert any("k_min = 0.2 * 0.1; k from 0.03763 to 0.8212" in note for note in notes)


def test_resnet18_at_a_tenth_keeps_the_published_number_of_weights(tmp_path) -> None:
    """int((1 - k) n) keeps up to one weight per layer more than k n: 1,116,445 and not 1,116,435."""
    network = registry.build("cifar-resnet18")
    path = training_file(tmp_path / "m.pth.tar", scored(network, "popup_scores"), "module.")
    loaded, info, notes = load(path, keep=0.1)
    kept = sum(int(loaded.get_parameter(n).count_nonzero()) for n in prunable(loaded, (3, 32, 32)))
    assert kept == 1_116_445
    assert info.sparsity == (11_164_352 - 1_116_445) / 11_164_352
    assert info.sparsity < 0.9
    assert (info.arch, info.stage) == ("cifar-resnet18", "foreign")
    assert any("1,116,445 of 11,164,352 weights kept in 21 layers" in note for note in notes)


def rst_resnet18(*, biased: bool = False) -> tuple[State, nn.Module]:
    """RST's ResNet-18, whose head is a 1x1 convolution and whose normalizations have no scale and shift."""
    torch.manual_seed(0)
    network = registry.build("cifar-resnet18").eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            bare = nn.BatchNorm2d(module.num_features, affine=False)
            bare.get_buffer("running_mean").uniform_(-0.1, 0.1)
            bare.get_buffer("running_var").uniform_(0.5, 1.5)
            network.set_submodule(name, bare.eval())
    network.linear = nn.Identity()
    network.fc = nn.Conv2d(512, 10, 1, bias=biased)
    return dict(network.state_dict()), network


def rst_answer(network: nn.Module, weights: State, images: Tensor) -> Tensor:
    """Features of the masked network, then its convolution as the head."""
    features = torch.func.functional_call(network, weights, images)
    logits = torch.nn.functional.conv2d(
        features[:, :, None, None], weights["fc.weight"], weights.get("fc.bias")
    )
    return logits.flatten(1)


@pytest.mark.parametrize("biased", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rst_resnet18_becomes_ours(tmp_path, biased) -> None:
    state, network = rst_resnet18(biased=biased)
    file = dict(state) | {
        name.replace("weight", "scores"): noise(i, *tensor.shape)
        for i, (name, tensor) in enumerate(state.items())
        if name.endswith("weight") and not (biased and name.startswith("fc"))  # the head may be left dense
    }
    path = tmp_path / "m.pth"
    torch.save({"state_dict": {f"module.{n}": t for n, t in file.items()}, "arch": "cResNet18"}, path)
    loaded, info, notes = load(path, keep=0.05)
    assert info.arch == "cifar-resnet18"
    masked = apply_masks(file, keep=0.05).tensors
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(loaded(images), rst_answer(network, masked, images), atol=1e-5, rtol=1e-4)
    assert any(
        "20 batch normalizations have no scale and shift: filled with 1 and 0" in note for note in notes
    )
    bias = "" if biased else ", bias 0"
    assert f"the 1x1 convolution fc became the linear layer linear{bias}" in notes
    assert info.sparsity == pytest.approx(0.95, abs=1e-3)


@pytest.mark.slow
def test_rst_networks_that_are_not_ours_are_refused_with_what_differs(tmp_path) -> None:
    """Its VGG has one linear layer where the VGG of adversarial pruning has three."""
    state = {n: t for n, t in registry.build("cifar-vgg16-bn").state_dict().items() if "features" in n}
    state = {n: t for n, t in state.items() if t.dim() == 4 or "running" in n}
    state["classifier.weight"] = torch.randn(10, 512, 1, 1)
    state |= {n.replace("weight", "scores"): torch.randn(t.shape) for n, t in state.items() if t.dim() == 4}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(
        ArchitectureError, check=lambda error: error.code == "architecture-unmatched"
    ) as caught:
        load(tmp_path / "m.pth", keep=0.1)
    assert "cifar-vgg16-bn: 6 missing" in caught.value.message
    assert "1 unexpected: classifier.weight" in caught.value.message


def test_code_of_the_users_decides_whether_rsts_habits_are_its_own(tmp_path) -> None:
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.bn = nn.BatchNorm2d(4, affine=False)\n"
        "        self.fc = nn.Conv2d(4, 3, 1, bias=False)\n"
        "    def forward(self, x):\n        return self.fc(self.bn(x).mean((2, 3), True)).flatten(1)\n"
        "Net.input_size = (4, 2, 2)\n"
    )
    weight = torch.randn(3, 4, 1, 1)
    state = {
        "fc.weight": weight,
        "fc.scores": torch.arange(12.0).reshape(3, 4, 1, 1),
        "bn.running_mean": torch.zeros(4),
        "bn.running_var": torch.ones(4),
        "bn.num_batches_tracked": torch.tensor(0),
    }
    torch.save(state, tmp_path / "m.pth")
    loaded, info, notes = load(tmp_path / "m.pth", arch=f"{code}:Net", keep=0.5)
    assert info.sparsity == 0.5
    assert torch.equal(loaded.get_parameter("network.fc.weight").flatten()[6:], weight.flatten()[6:])
    assert not any("became the linear layer" in note or "filled" in note for note in notes)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rst_scores_of_filters_kernels_and_rows(dims) -> None:
    weight = torch.ones(4, 4, 3, 3)
    scores = torch.arange(float(weight.shape[:dims].numel())).reshape(weight.shape[:dims])
    found = apply_masks({"conv.weight": weight, "conv.scores": scores}, keep=0.5)
    kept = found.tensors["conv.weight"]
    assert set(found.tensors) == {"conv.weight"}
    assert int(kept.count_nonzero()) == 72
    assert torch.equal(kept.flatten(dims).any(-1), scores >= scores.numel() / 2)


def test_unused_blocks_are_masked_away_and_not_counted(tmp_path) -> None:
    state = scored(registry.build("cifar-wrn-28-4"), "popup_scores")
    extra = {
        f"sub_block1.layer.0.conv1.{key}": torch.randn(64, 16, 3, 3) for key in ("weight", "popup_scores")
    }
    path = training_file(tmp_path / "m.pth.tar", state | extra, "module.")
    loaded, info, notes = load(path, keep=0.5, arch="cifar-wrn-28-4")
    entries = sum(loaded.get_parameter(n).numel() for n in prunable(loaded, (3, 32, 32)))
    assert info.arch == "cifar-wrn-28-4"
    assert any(f"of {entries:,} weights kept in 29 layers" in note for note in notes)
    assert any("tensors of sub_block1, which no forward pass uses" in note for note in notes)


# What is already masked


def exported(state: State, expected: State) -> State:
    return state | expected


@pytest.mark.parametrize("layout", ["HYDRA", "HARP", "HARP, channels", "RST"])
def test_a_dense_export_needs_no_fraction_and_says_so(tmp_path, layout) -> None:
    state, expected, options, prefix = layouts()[layout]
    path = training_file(tmp_path / "m.pth.tar", exported(state, expected), prefix)
    loaded, info, notes = load(path)
    for name, tensor in expected.items():
        assert torch.equal(loaded.network.state_dict()[name], tensor)
    assert any("no --keep was given; the zeros of every layer fit" in note for note in notes)
    again, same, _ = load(path, **options)
    assert same.sparsity == info.sparsity
    assert torch.equal(again(torch.ones(1, 1, 8, 8)), loaded(torch.ones(1, 1, 8, 8)))


@pytest.mark.parametrize("keep", [0.05, 0.3, 1.0])
def test_another_fraction_than_that_of_the_zeros_is_refused(tmp_path, keep) -> None:
    state, expected, _, _ = layouts()["HYDRA"]
    path = training_file(tmp_path / "m.pth.tar", exported(state, expected))
    with pytest.raises(CheckpointError, check=lambda error: error.code == "keep-contradicts-zeros") as caught:
        load(path, keep=keep)
    assert "leave --keep out" in str(caught.value.hint)


def test_scores_of_another_network_are_refused(tmp_path) -> None:
    state, expected, _, _ = layouts()["HYDRA"]
    foreign = {n: noise(7 + i, *t.shape) for i, (n, t) in enumerate(state.items()) if "popup" in n}
    path = training_file(tmp_path / "m.pth.tar", exported(state, expected) | foreign)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "scores-contradict-weights"):
        load(path, keep=KEEP)
    with pytest.raises(UsageError, check=lambda error: error.code == "keep-missing"):
        load(path)


def test_a_few_dead_weights_are_no_mask_and_are_told(tmp_path) -> None:
    state = scored(digits(), "popup_scores")
    state["5.weight"] = state["5.weight"].clone()
    state["5.weight"][state["5.popup_scores"].abs() > 3] = 0
    dead = int((state["5.popup_scores"].abs() > 3).sum())
    path = training_file(tmp_path / "m.pth.tar", state)
    with pytest.raises(UsageError, check=lambda error: error.code == "keep-missing"):
        load(path)
    _, _, notes = load(path, keep=KEEP)
    assert f"{dead:,} of the weights that the masks keep are zero in the file" in notes


def test_equal_scores_at_the_cut_are_told(tmp_path) -> None:
    state = scored(digits(), "popup_scores")
    state["7.popup_scores"] = torch.ones_like(state["7.popup_scores"])
    _, _, notes = load(training_file(tmp_path / "m.pth.tar", state), keep=KEEP)
    assert any("equal scores at the cut in 1 of 4 layers (7.weight)" in note for note in notes)


def test_keep_one_masks_nothing_whatever_the_quotas(tmp_path) -> None:
    """A pretraining of HYDRA's or HARP's layers has scores that nothing uses."""
    state = with_quotas(scored(digits(), "popup_scores"))
    loaded, info, notes = load(training_file(tmp_path / "m.pth.tar", state), keep=1)
    assert torch.equal(loaded.get_parameter("network.5.weight"), state["5.weight"])
    assert info.sparsity is None
    assert any("--keep 1 masks nothing" in note for note in notes)


def test_harps_own_dense_file_is_another_network_and_that_is_said(tmp_path) -> None:
    state = with_quotas(expected_hydra(scored(digits(), "popup_scores")))
    state |= {n: t for n, t in digits().state_dict().items() if n.endswith("bias")}
    _, info, notes = load(training_file(tmp_path / "m.pth.tar", state))
    assert info.sparsity == pytest.approx(0.9, abs=1e-3)
    assert any("global k in every layer, not with the quotas it learned" in note for note in notes)


def test_a_plain_dense_file_of_a_pruned_network_has_its_sparsity(tmp_path) -> None:
    state = digits().state_dict() | expected_hydra(scored(digits(), "popup_scores"))
    torch.save(state, tmp_path / "m.pth")
    assert load(tmp_path / "m.pth")[1].sparsity == pytest.approx(0.9, abs=1e-3)
    torch.save(digits().state_dict(), tmp_path / "m.pth")
    assert load(tmp_path / "m.pth")[1].sparsity is None


# What is refused


def changed(state: State, **changes: Tensor | None) -> State:
    renamed = {name.replace("__", "."): value for name, value in changes.items()}
    return {n: t for n, t in (state | renamed).items() if t is not None}


NAN = float("nan")


@pytest.mark.parametrize(
    ("layout", "changes", "code"),
    [
        ("HYDRA", {"5__popup_scores": torch.full((128, 1024), NAN)}, "weights-nonfinite"),
        ("HYDRA", {"5__weight": torch.full((128, 1024), math.inf)}, "weights-nonfinite"),
        ("HYDRA", {"5__popup_scores": torch.ones(128, 1024).long()}, "tensor-dtype-invalid"),
        ("HYDRA", {"5__popup_scores": torch.ones(1024, 128)}, "scores-shape-mismatch"),
        ("HYDRA", {"5__popup_scores": torch.ones(1, 1024)}, "scores-shape-mismatch"),
        ("HYDRA", {"5__popup_scores": torch.ones(())}, "scores-shape-mismatch"),
        ("HYDRA", {"5__popup_scores": torch.ones(0)}, "scores-shape-mismatch"),
        ("HYDRA", {"5__weight": None}, "scored-weight-missing"),
        ("HYDRA", {"5__scores": torch.ones(128, 1024)}, "mask-layouts-mixed"),
        ("HARP", {"5__k_score": None}, "quota-missing"),
        ("HARP", {"5__k_score": torch.tensor(NAN)}, "quota-invalid"),
        ("HARP", {"5__k_score": torch.ones(2)}, "quota-invalid"),
        ("HARP", {"5__k_score": torch.tensor(1)}, "quota-invalid"),
        ("HARP", {"9__k_score": torch.ones(())}, "scores-missing"),
        ("HARP", {"5__popup_scores": torch.ones(1, 1024)}, "scores-granularity-mixed"),
        ("HARP, channels", {"2__popup_scores": torch.ones(64, 1, 1, 1)}, "scores-shape-mismatch"),
        ("RST", {"2__scores": torch.ones(32)}, "scores-shape-mismatch"),
        ("torch.nn.utils.prune", {"5__weight_mask": torch.ones(128)}, "mask-shape-mismatch"),
        ("torch.nn.utils.prune", {"5__weight_mask": torch.full((128, 1024), 0.5)}, "mask-not-binary"),
        ("torch.nn.utils.prune", {"5__weight_mask": torch.full((128, 1024), NAN)}, "mask-not-binary"),
        ("torch.nn.utils.prune", {"5__weight_orig": torch.full((128, 1024), NAN)}, "weights-nonfinite"),
        ("torch.nn.utils.prune", {"5__weight_orig": None}, "masked-weight-missing"),
        ("torch.nn.utils.prune", {"5__weight": torch.ones(128, 1024)}, "masked-weight-ambiguous"),
        ("torch.nn.utils.prune", {"5__popup_scores": torch.ones(1)}, "mask-layouts-mixed"),
    ],
)
def test_scores_and_masks_that_contradict_their_weights_are_refused_and_described(
    tmp_path, layout, changes, code
) -> None:
    state, _, options, _ = layouts()[layout]
    path = training_file(tmp_path / "m.pth.tar", changed(state, **changes))
    with pytest.raises(CheckpointError, check=lambda error: error.code == code) as caught:
        load(path, **options)
    assert caught.value.message.startswith(f"{path}: ")
    found = describe(path)
    assert any("the weights below are not masked" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("layout", "options", "code", "hint"),
    [
        ("HYDRA", {}, "keep-missing", "add --keep"),
        ("RST", {}, "keep-missing", "RST's prune rate"),
        ("HARP", {}, "keep-missing", "0.1 is HARP's published value"),
        ("HARP", {"keep": 0.1}, "alpha-missing", "0.1 is HARP's published value"),
        ("HARP", {"alpha": 0.1}, "keep-missing", "add --keep"),
        ("HYDRA", {"keep": 0.1, "alpha": 0.1}, "alpha-unused", "leave --alpha out"),
        ("HYDRA", {"keep": 0.0}, "keep-out-of-range", "--keep 0.1"),
        ("HYDRA", {"keep": 1.5}, "keep-out-of-range", "--keep 0.1"),
        ("HYDRA", {"keep": NAN}, "keep-out-of-range", "--keep 0.1"),
        ("HARP", {"keep": 0.1, "alpha": -1.0}, "alpha-out-of-range", "0.1"),
        ("torch.nn.utils.prune", {"keep": 0.1}, "keep-unused", "leave them out"),
    ],
)
def test_options_that_are_missing_or_useless_are_named(tmp_path, layout, options, code, hint) -> None:
    path = training_file(tmp_path / "m.pth.tar", layouts()[layout][0])
    with pytest.raises(UsageError, check=lambda error: error.code == code) as caught:
        load(path, **options)
    assert hint in str(caught.value.hint)


def test_a_file_without_scores_takes_no_fraction(tmp_path, digits_model) -> None:
    torch.save(digits().state_dict(), tmp_path / "m.pth")
    for path in (tmp_path / "m.pth", digits_model):
        for call in (load, describe):
            with pytest.raises(UsageError, check=lambda error: error.code == "keep-unused"):
                call(path, keep=0.1)


@pytest.mark.parametrize(
    "names",
    [
        {"scores"},
        {"head.scores"},
        {"attn_mask"},
        {"a.weight", "b.scores"},
        {"a.weight_orig", "a.weight_u"},
        set(),
    ],
)
def test_other_peoples_parameters_are_not_taken_for_masks(names) -> None:
    tensors = {name: torch.ones(2) for name in names}
    assert layout_of(tensors) is None
    assert apply_masks(tensors).tensors == tensors


def test_scores_without_a_weight_are_not_dropped_silently(tmp_path) -> None:
    state = scored(digits(), "scores") | {"extra.scores": torch.ones(3)}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-unmatched"):
        load(tmp_path / "m.pth", keep=KEEP)


def test_describe_shows_the_architecture_before_the_fraction_is_known(tmp_path) -> None:
    path = training_file(tmp_path / "m.pth.tar", with_quotas(scored(digits(), "popup_scores")), "module.")
    found = describe(path)
    assert (found["architecture"], found["layout"], found["zeros"]) == ("digits-conv", "HARP", 0)
    (warning,) = found["warnings"]
    assert "--keep" in warning
    assert "--alpha" in warning
    masked = describe(path, keep=KEEP, alpha=ALPHA)
    assert masked["warnings"] == []
    assert masked["zeros"] > 0
    assert masked["parameters"] == found["parameters"] == 151_306


# Through the commands


def as_options(options: Options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    "layout",
    [name if name in ("HYDRA", "HARP") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_inspect_certify_and_export(tmp_path, s2ap, layout) -> None:
    state, expected, options, prefix = layouts()[layout]
    path, run = training_file(tmp_path / "m.pth.tar", state, prefix), tmp_path / "run"
    description = s2ap.json("inspect", path, *as_options(options))
    zeros = sum(int((tensor == 0).sum()) for name, tensor in expected.items() if name.endswith("weight"))
    assert (description["architecture"], description["zeros"]) == ("digits-conv", zeros)
    data = ["--data", "digits", "--eps", "0.5", "--threads", 1, "--workers", 1]
    s2ap.ok("certify", path, "--n", 10, *data, *as_options(options), "--run", run)
    sparsity = zeros / 151_072
    certificate = json.loads((run / "certify" / "dense.json").read_text())
    assert certificate["subject"]["sparsity"] == sparsity
    report = s2ap.json("export", "--onnx", "--no-compact", "--run", run)
    assert report["sparsity"] == pytest.approx(sparsity)
    assert report["weights"] - report["nonzeros"] == zeros
    assert any(row["encoding"] != "dense" for row in report["tensors"])
    assert report["bytes"] < 0.8 * report["dense_bytes"]
    again = s2ap("certify", path, "--n", 10, *data, *as_options(options), "--run", run)
    assert "pretrain: already done with the same inputs, skipped" in again.err


def test_another_fraction_is_another_network_for_the_run_folder(tmp_path, s2ap) -> None:
    path = training_file(tmp_path / "m.pth.tar", scored(digits(), "popup_scores"))
    data = ["--data", "digits", "--eps", "0.5", "--threads", 1, "--workers", 1, "--n", 2]
    missing = s2ap("certify", path, *data, "--run", tmp_path / "none")
    assert (missing.code, missing.out) == (2, "")
    assert "add --keep" in missing.err
    assert s2ap("certify", path, *data, "--keep", 0.1, "--run", tmp_path / "run").code == 0
    s2ap.refused("stage-inputs-changed", "certify", path, *data, "--keep", 0.2, "--run", tmp_path / "run")
    for command in (["inspect", path, "--keep", 2], ["certify", path, *data, "--keep", "nan"]):
        assert s2ap(*command, cwd=tmp_path).code == 2
    decided = s2ap("certify", "--keep", 0.1, "--run", tmp_path / "run")
    assert (decided.code, "--keep: the run folder has already decided this" in decided.err) == (2, True)


def with_measured_statistics(network: nn.Module, state: State, *, keep: float) -> State:
    """``state`` with the masked network's statistics: without, its answer hardly depends on the image."""
    network.load_state_dict(apply_masks(state, keep=keep).tensors)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        network.train()(torch.rand(16, 3, 32, 32))
    return state | {n: t for n, t in network.state_dict().items() if "running" in n}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["HYDRA", "RST"])
def test_a_resnet18_through_the_commands(tmp_path, s2ap, layout) -> None:
    images = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 5)):
        for label in range(10):
            folder = tmp_path / "images" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = images.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    if layout == "HYDRA":
        network = registry.build("cifar-resnet18")
        state = scored(network, "popup_scores")
    else:
        state, network = rst_resnet18()
        state |= {n.replace("weight", "scores"): noise(5, *t.shape) for n, t in state.items() if t.dim() == 4}
    state = with_measured_statistics(network, state, keep=0.05)
    path, run = training_file(tmp_path / "m.pth.tar", state, "module."), tmp_path / "run"
    data = ["--data", f"imagefolder:{tmp_path / 'images'}", "--eps", "0.5", "--keep", 0.05]
    s2ap.ok("certify", path, "--n", 10, *data, "--run", run, "--workers", 1)
    report = s2ap.json("export", "--onnx", "--run", run)
    assert report["sparsity"] >= 0.949
    assert report["bytes"] < 0.2 * report["dense_bytes"]
