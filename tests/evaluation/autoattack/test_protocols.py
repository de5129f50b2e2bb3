"""Which attacks run with which parameters, for every version and number of classes."""

from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.autoattack import attacks, protocols
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, attack
from s2ap_deploy.evaluation.certificate import STATEMENTS
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.spec import ThreatModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_parameters_are_those_of_the_package(version, norm) -> None:
    reference = AutoAttack(nn.Flatten(), norm=norm, eps=0.1, seed=3, version=version)
    steps = protocols.steps(version, norm, 10)
    assert [step.name for step in steps] == reference.attacks_to_run
    for step in steps:
        if step.name.startswith("apgd"):
            theirs = reference.apgd_targeted if step.name == "apgd-t" else reference.apgd
            assert (step.iterations, step.restarts, step.eot) == (
                theirs.n_iter, theirs.n_restarts, theirs.eot_iter,
            )  # fmt: skip
            assert step.wide_start == theirs.use_largereps
        elif step.name == "square":
            assert (step.iterations, step.restarts) == (
                reference.square.n_queries, reference.square.n_restarts,
            )  # fmt: skip
        else:
            # The package's driver itself sets one restart before FAB-T, in every version.
            assert step.restarts == (reference.fab.n_restarts if step.name == "fab" else 1)
            assert step.iterations == reference.fab.n_iter
        if step.name == "apgd-t":
            assert step.targets == reference.apgd_targeted.n_target_classes
        if step.name == "fab-t":
            assert step.targets == reference.fab.n_target_classes


@pytest.mark.parametrize(
    ("version", "classes", "label", "names"),
    [
        ("standard", 2, "aa-adapted", "apgd-ce apgd-margin fab-t square"),
        ("standard", 3, "aa-adapted", "apgd-ce apgd-margin fab-t square"),
        ("standard", 4, "standard", "apgd-ce apgd-t fab-t square"),
        ("plus", 2, "plus-adapted", "apgd-ce apgd-margin fab square fab-t"),
        ("plus", 3, "plus-adapted", "apgd-ce apgd-dlr fab square apgd-margin fab-t"),
        ("plus", 4, "plus", "apgd-ce apgd-dlr fab square apgd-t fab-t"),
        ("rand", 2, "rand-adapted", "apgd-ce apgd-margin"),
        ("rand", 3, "rand", "apgd-ce apgd-dlr"),
        ("quick", 3, "quick-adapted", "apgd-ce apgd-margin"),
        ("quick", 100, "quick", "apgd-ce apgd-t"),
    ],
)
def test_few_classes_are_adapted_and_say_so(version, classes, label, names) -> None:
    assert protocols.names(version, classes) == tuple(names.split())
    assert protocols.label(version, classes) == label
    assert protocols.version(label) == version
    assert protocols.is_adapted(label) == label.endswith("-adapted")
    assert all(1 <= step.targets <= classes - 1 for step in protocols.steps(version, "Linf", classes))


def test_every_protocol_has_its_words_and_quick_does_not_borrow_a_name() -> None:
    labels = {protocols.label(version, k) for version in protocols.VERSIONS for k in (2, 3, 4, 10)}
    assert labels == STATEMENTS.keys()
    assert all("AutoAttack" not in words for label, words in STATEMENTS.items() if label.startswith("quick"))
    assert all(("(upper bound)" in words) != label.startswith("rand") for label, words in STATEMENTS.items())


def test_costs_in_forward_passes() -> None:
    costs = {
        version: [step.forward_equivalents(10) for step in protocols.steps(version, "Linf", 10)]
        for version in protocols.VERSIONS
    }
    assert costs == {
        "standard": [300, 2700, 3600, 5000],
        "plus": [1500, 1500, 11000, 5000, 2700, 3600],
        "rand": [6000, 6000],
        "quick": [60, 180],
    }


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("version", "classes"),
    [("plus", 2), ("plus", 3), ("plus", 4), ("plus", 10), *(("quick", k) for k in (2, 3, 4, 5, 10, 100))],
)
def test_any_number_of_classes(make_network, version, classes) -> None:
    network = make_network(classes)
    for images in (torch.rand(1, 1, 8, 8), torch.rand(3, 1, 8, 8)):
        labels = network(images).argmax(1)
        outcome = attack(
            network, images, labels,
            AttackConfig(threat=ThreatModel(eps="0.02"), seed=0, device=CPU, version=version), workers=1,
        )  # fmt: skip
        assert outcome.complete
        assert outcome.protocol == protocols.label(version, classes)
        assert tuple(count.name for count in outcome.counts) == protocols.names(version, classes)
        assert ("adapted_protocol" in outcome.flags) == (classes < 4)
        assert ("quick" in outcome.flags) == (version == "quick")


class Noisy(nn.Module):
    """Adds noise to its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x + 0.05 * torch.randn_like(x))
        return found


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_rand_is_for_randomized_networks_and_repeats_itself(make_network, classes) -> None:
    network, images = make_network(classes), torch.rand(6, 1, 8, 8)
    labels = network(images).argmax(1)
    config = AttackConfig(threat=ThreatModel(eps="0.02"), seed=0, device=CPU, version="rand")
    with pytest.raises(UsageError, check=lambda error: error.code == "protocol-unfit"):
        attack(network, images, labels, config, workers=1)
    first = attack(Noisy(network), images, labels, config, workers=1)
    torch.manual_seed(99)
    second = attack(Noisy(network), images, labels, config, workers=1)
    assert first.protocol == protocols.label("rand", classes)
    assert "randomized" in first.flags
    assert first.broken_by == second.broken_by
    assert torch.equal(first.adversarial, second.adversarial)


def test_rand_keeps_the_loop_of_the_reference() -> None:
    """There a point is wrong by chance at one step, and must not leave before its loss is high."""
    for name, classes in (("apgd-ce", 10), ("apgd-dlr", 10), ("apgd-margin", 2)):
        built: Any = attacks.build(
            name, nn.Flatten(), ThreatModel(eps="0.1"), num_classes=classes, seed=0, device=CPU,
            warnings=attacks.WarningCount(), version="rand",
        )  # fmt: skip
        assert type(built).attack_single_run.__module__.startswith("pyautoattack")
        assert built.eot_iter == 20


def test_a_quick_sweep_may_fail_a_gate_and_never_passes_one(make_certificate) -> None:
    lost = ["apgd-ce"] * 60 + [None] * 40
    for broken_by, status in ((lost, "fail"), ([None] * 100, "inconclusive")):
        certificate = make_certificate(broken_by, protocol="quick")
        verdict = judge(Thresholds(min_robust=0.6, rule="point"), pruned=certificate)
        assert verdict.status == status


def test_randomized_counts_against_standard_and_not_against_rand(make_certificate) -> None:
    for protocol, status in (("standard", "inconclusive"), ("rand", "pass")):
        certificate = make_certificate([None] * 100, protocol=protocol, flags=("randomized",))
        verdict = judge(Thresholds(min_robust=0.6, rule="point"), pruned=certificate)
        assert verdict.status == status


@pytest.mark.parametrize("other", ["aa-adapted", "plus", "rand", "quick"])
def test_pairs_of_different_protocols_are_not_compared(make_certificate, other) -> None:
    pruned = make_certificate([None] * 100)
    dense = make_certificate([None] * 100, protocol=other)
    verdict = judge(Thresholds(max_drop=0.1, rule="point"), pruned=pruned, dense=dense)
    assert verdict.status == "inconclusive"
    assert any("protocol" in check.message for check in verdict.checks)
