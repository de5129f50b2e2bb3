"""The attacks carry the parameters of AutoAttack's own standard version."""

from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from s2ap_deploy.errors import DataError
from s2ap_deploy.evaluation.autoattack import attacks, protocols
from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel, distances
from s2ap_deploy.spec import ThreatModel

CPU = torch.device("cpu")
OURS_ONLY = {"seed", "logger", "loss", "n_restarts", "device", "model", "predict", "targeted"}


def build(name: str, model: nn.Module, norm: str = "Linf", num_classes: int = 10) -> Any:
    threat = ThreatModel(norm=norm, eps="8/255")
    return attacks.build(
        name, model, threat, num_classes=num_classes, seed=3, device=CPU, warnings=attacks.WarningCount()
    )


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_parameters_equal_those_of_the_reference(norm) -> None:
    model = nn.Flatten()
    reference = AutoAttack(model, norm=norm, eps=8 / 255, seed=3, version="standard")
    pairs = {
        "apgd-ce": reference.apgd,
        "apgd-t": reference.apgd_targeted,
        "fab-t": reference.fab,
        "square": reference.square,
    }
    assert protocols.names("standard", 10) == tuple(reference.attacks_to_run)
    for name, theirs in pairs.items():
        ours = build(name, model, norm)
        differing = {
            key
            for key in vars(theirs).keys() | vars(ours).keys()
            if vars(ours).get(key) != vars(theirs).get(key)
        }
        assert differing <= OURS_ONLY, name
        assert ours.seed == 3
        assert ours.n_restarts == theirs.n_restarts
    assert build("fab-t", model, norm).targeted
    assert build("apgd-ce", model, norm).loss == "ce"


@pytest.mark.parametrize(
    ("num_classes", "second", "count"),
    [(2, "apgd-margin", 1), (3, "apgd-margin", 2), (4, "apgd-t", 3), (10, "apgd-t", 9), (100, "apgd-t", 9)],
)
def test_few_classes(num_classes, second, count) -> None:
    assert build(second, nn.Flatten(), num_classes=num_classes).n_target_classes == count
    assert build("fab-t", nn.Flatten(), num_classes=num_classes).n_target_classes == count


def test_l1_tries_five_targets_with_apgd_and_nine_with_fab() -> None:
    found = {
        classes: {step.name: step.targets for step in protocols.steps("standard", "L1", classes)}
        for classes in (4, 10)
    }
    assert (found[10]["apgd-t"], found[10]["fab-t"], found[4]["apgd-t"]) == (5, 9, 3)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_margin_attack_breaks_a_linear_model_that_can_be_broken(norm, num_classes) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, num_classes))
    images = torch.rand(12, 1, 6, 6) * 0.4 + 0.3  # far enough from 0 and 1 for the ball to lie inside
    labels = linear(images).argmax(1)
    logits = linear(images).detach()
    weight = linear[1].weight.detach()
    dual = {"Linf": 1, "L2": 2, "L1": float("inf")}[norm]
    margins = torch.full((12, num_classes), float("inf"))
    for target in range(num_classes):
        away = torch.linalg.vector_norm(weight[labels] - weight[target], ord=dual, dim=1)
        gap = logits.gather(1, labels[:, None])[:, 0] - logits[:, target]
        margins[:, target] = torch.where(labels == target, torch.inf, gap / away)
    exact = margins.min(dim=1).values  # distance to the boundary, by duality of the norms
    eps = exact.median().item()
    judge = FrozenModel(linear, CPU)
    attack = attacks.build(
        "apgd-margin", judge, ThreatModel(norm=norm, eps=repr(eps)), num_classes=num_classes, seed=0,
        device=CPU, warnings=attacks.WarningCount(),
    )  # fmt: skip
    attacked = attack.perturb(images.clone(), labels.clone())
    broken = judge(attacked).argmax(1) != labels
    assert (distances(images, attacked, norm) <= eps * (1 + 1e-5)).all()
    assert not broken[exact > eps * 1.0001].any()
    assert broken[exact < eps * (0.9 if norm == "L1" else 0.99)].all()


def test_zero_gradients_are_counted() -> None:
    dead = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    nn.init.zeros_(dead[1].weight)
    count = attacks.WarningCount()
    attack = attacks.build(
        "apgd-t",
        dead,
        ThreatModel(eps="0.1"),
        num_classes=10,
        seed=0,
        device=CPU,
        warnings=count,
        iterations=2,
    )
    images = torch.rand(2, 1, 2, 2)
    attack.perturb(images, dead(images).argmax(1))
    assert count.count > 0


def test_square_outside_linf_refuses_tiny_images() -> None:
    attacks.check_size((1, 4, 4), "Linf")
    attacks.check_size((1, 5, 5), "L2")
    for norm in ("L1", "L2"):
        with pytest.raises(DataError, check=lambda error: error.code == "images-too-small"):
            attacks.check_size((3, 8, 4), norm)
