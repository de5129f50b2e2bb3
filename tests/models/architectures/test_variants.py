"""Variants: another function under the same names and shapes, as the text of each says."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import registry, variants
from s2ap_deploy.models.architectures.variants import VARIANTS

SMALL = "cifar-resnet20"


def pair(variant: str, base: str = SMALL) -> tuple[nn.Module, nn.Module]:
    """Return a registered network and its variant with the same weights."""
    torch.manual_seed(0)
    plain, varied = registry.build(base), registry.build(f"{base}+{variant}")
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(1e-3, 1)
    varied.load_state_dict(plain.state_dict(), strict=True)
    return plain.eval(), varied.eval()


def resnet20(
    state: dict[str, Tensor], x: Tensor, *, activation=F.relu, eps=1e-5, stem=1, pool="mean"
) -> Tensor:
    """Compute the narrow residual network by its equations."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / torch.sqrt(var + eps)
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]

    x = activation(norm("bn1", F.conv2d(x, state["conv1.weight"], stride=stem, padding=1)))
    for layer, block in ((layer, block) for layer in (1, 2, 3) for block in range(3)):
        name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
        out = activation(
            norm(f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1))
        )
        out = norm(f"{name}.bn2", F.conv2d(out, state[f"{name}.conv2.weight"], padding=1))
        extra = out.shape[1] - x.shape[1]
        x = activation(out + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2)))
    pooled = x.mean((2, 3)) if pool == "mean" else x.amax((2, 3))
    return pooled @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("bn-eps=1e-3", {"eps": 1e-3}),
        ("stem-stride=2", {"stem": 2}),
        ("pool=max", {"pool": "max"}),
        ("activation=silu", {"activation": F.silu}),
        ("activation=softplus", {"activation": F.softplus}),
        ("activation=leaky", {"activation": lambda x: torch.where(x > 0, x, 0.1 * x)}),
        ("activation=softplus+bn-eps=1e-3", {"activation": F.softplus, "eps": 1e-3}),
    ],
)
def test_a_variant_computes_what_it_says(variant, change) -> None:
    plain, varied = pair(variant)
    images, state = torch.rand(2, 3, 32, 32), plain.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(plain(images), resnet20(state, images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(varied(images), resnet20(state, images, **change), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(varied(images), plain(images), rtol=1e-3, atol=1e-3)


def test_a_variant_of_the_input_computes_what_it_says() -> None:
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain, varied = pair("input=2x-1")
        assert torch.equal(varied(images), plain(2 * images - 1))
        plain, varied = pair("input=standardized")
        mean = images.mean((1, 2, 3), keepdim=True)
        deviation = images.var((1, 2, 3), keepdim=True, correction=0).sqrt()
        torch.testing.assert_close(varied(images), plain((images - mean) / deviation), rtol=1e-4, atol=1e-4)
        flat = torch.full((1, 3, 32, 32), 0.3)
        assert torch.isfinite(varied(flat)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_fits_a_family_and_can_be_copied_and_sent_to_a_worker(variant) -> None:
    _, varied = pair(variant, "cifar-torchvision-resnet18" if variant.startswith("pool") else SMALL)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = varied(images)
        assert torch.equal(copy.deepcopy(varied)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(varied))(images), expected)


@pytest.mark.parametrize("base", ["cifar-wrn-40-2", "cifar-preact-resnet18", "deepmind-preact-resnet18-relu"])
@pytest.mark.parametrize("variant", ["activation=softplus", "pool=max", "bn-eps=1e-3"])
def test_families_have_the_variants_that_published_files_have(base, variant) -> None:
    plain, varied = pair(variant, base)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(plain(images), varied(images))


@pytest.mark.parametrize(
    ("name", "code"),
    [("digits-conv+pool=max", "variant-unfit"), ("digits-conv+nothing", "variant-unknown")],
)
def test_a_variant_that_changes_nothing_is_refused(name, code) -> None:
    with pytest.raises(ArchitectureError, check=lambda error: error.code == code):
        registry.build(name)


def test_the_text_lists_every_variant() -> None:
    assert variants.listed().count("\n") == len(VARIANTS) - 1
