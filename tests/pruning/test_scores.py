"""Scored networks: straight-through gradients, exact masks, weights that do not move."""

import pytest
import torch
from torch import nn

from s2ap_deploy.errors import InputError
from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.scores import ScoredNetwork, random_scores, scaled


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


NAMES = ("0.weight", "4.weight")
KEEP = {"0.weight": 9, "4.weight": 40}


def test_initial_scores_order_weights_by_magnitude() -> None:
    weight = torch.tensor([[0.5, -2.0, 1.0]])
    scores = scaled(weight)
    assert scores.abs().max() == pytest.approx((6 / 3) ** 0.5)
    assert torch.equal(scores.abs().argsort(), weight.abs().argsort())
    assert torch.equal(scores.sign(), weight.sign())


def test_initial_scores_of_an_all_zero_layer_are_finite() -> None:
    assert torch.equal(scaled(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_worn_weights_are_the_masked_originals() -> None:
    network = tiny()
    original = network[4].weight.detach().clone()
    scored = ScoredNetwork(network, Weights(NAMES), Fixed(KEEP))
    masks = scored.masks()
    scored.apply_mask(masks)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == KEEP
    assert torch.equal(network[4].weight, original * masks["4.weight"])
    assert torch.equal(scored.weights["4.weight"], original)


def test_gradients_match_autograd_through_an_explicit_mask() -> None:
    """d L(w ⊙ m) / d|s| with dm/d|s| = 1 is the gradient with respect to a free multiplier m."""
    network = tiny()
    scored = ScoredNetwork(network, Weights(NAMES), Fixed(KEEP))
    scored.scores["4.weight"][0, 0] = 0.0
    scored.update_signs()
    masks = scored.masks()
    scored.apply_mask(masks)
    images, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    network.train()
    gradients = scored.gradients(nn.functional.cross_entropy(network(images), labels))

    multipliers = {name: masks[name].float().requires_grad_() for name in NAMES}
    masked = {name: scored.weights[name] * multipliers[name] for name in NAMES}
    reference = torch.func.functional_call(
        tiny().train(), {**dict(network.named_parameters()), **masked}, images
    )
    nn.functional.cross_entropy(reference, labels).backward()
    for name in NAMES:
        sign = torch.where(scored.scores[name] < 0, -1.0, 1.0)
        torch.testing.assert_close(gradients[name], multipliers[name].grad * sign, rtol=1e-5, atol=1e-7)
    assert gradients["4.weight"][~masks["4.weight"]].abs().max() > 0, "pruned weights must be able to return"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_score_that_is_pushed_across_zero_loses_its_importance(sign) -> None:
    """With |s + z| it would stay in the mask, and its gradient would point the wrong way."""
    network = tiny()
    scored = ScoredNetwork(network, Weights(NAMES), Fixed(KEEP))
    scores = scored.scores["4.weight"]
    top = int(scores.abs().argmax())
    scores.view(-1)[top] = sign * 100.0
    scored.update_signs()
    assert bool(scored.masks()["4.weight"].view(-1)[top])
    scores.view(-1)[top] = -sign * 100.0  # as a perturbation would leave it
    masks = scored.masks()
    assert not bool(masks["4.weight"].view(-1)[top])
    scored.apply_mask(masks)
    images, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    gradient = scored.gradients(nn.functional.cross_entropy(network(images), labels))["4.weight"].view(-1)[
        top
    ]
    masked = dict(network.named_parameters())["4.weight"]
    loss = nn.functional.cross_entropy(network(images), labels)
    (slope,) = torch.autograd.grad(loss, masked)
    expected = sign * scored.weights["4.weight"].view(-1)[top] * slope.view(-1)[top]
    torch.testing.assert_close(gradient, expected)


def test_only_scored_weights_learn() -> None:
    network = tiny()
    ScoredNetwork(network, Weights(NAMES), Fixed(KEEP))
    assert [n for n, p in network.named_parameters() if p.requires_grad] == list(NAMES)


@pytest.mark.parametrize(
    ("code", "scores"),
    [
        ("scores-missing", {"0.weight": torch.ones(4, 1, 3, 3)}),
        ("scores-shape-differs", {"0.weight": torch.ones(2), "4.weight": torch.ones(3, 144)}),
        ("scores-not-finite", {"0.weight": torch.ones(4, 1, 3, 3), "4.weight": torch.ones(3, 144) / 0}),
    ],
)
def test_scores_that_cannot_be_taken_over(code, scores) -> None:
    with pytest.raises(InputError, check=lambda error: error.code == code):
        ScoredNetwork(tiny(), Weights(NAMES), Fixed(KEEP), scores)


def test_an_unused_layer_is_named() -> None:
    network = tiny()
    network.add_module("spare", nn.Linear(2, 2))
    network.forward = lambda x: network[4](network[3](network[2](network[1](network[0](x)))))  # type: ignore
    scored = ScoredNetwork(network, Weights((*NAMES, "spare.weight")), Fixed({**KEEP, "spare.weight": 1}))
    scored.apply_mask(scored.select())
    with pytest.raises(InputError, check=lambda error: error.code == "layer-unused"):
        scored.gradients(network(torch.rand(2, 1, 8, 8)).sum())


def test_every_class_keeps_a_weight() -> None:
    """Rows of the classifier that lose all their weights could never be predicted."""
    network = tiny()
    with torch.no_grad():
        network[4].weight[2] *= 1e-3
    plain = ScoredNetwork(network, Weights(NAMES), Fixed(KEEP)).select()["4.weight"]
    assert plain[2].sum() == 0, "or the test shows nothing"
    covered = ScoredNetwork(network, Weights(NAMES), Fixed(KEEP), covered=["4.weight"]).select()["4.weight"]
    assert covered.sum() == KEEP["4.weight"]
    assert covered.any(dim=1).all()


def test_random_scores_are_kaiming_uniform() -> None:
    scores = random_scores(torch.empty(200, 50), torch.Generator().manual_seed(0))
    assert float(scores.abs().max()) <= 50**-0.5
    assert float(scores.std()) == pytest.approx((1 / 150) ** 0.5, rel=0.02)
