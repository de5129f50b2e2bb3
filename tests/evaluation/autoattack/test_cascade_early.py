"""An attack that stops when it is decided: the gate's verdict of the full run, at less work."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, Cascade, attack, run
from s2ap_deploy.evaluation.autoattack.scheduler import AttackOutcome
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import EarlyDecision, Progress
from s2ap_deploy.gating.early_stopping import answers, verdict_of
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.recorder import Silent
from s2ap_deploy.records import AttackRow
from s2ap_deploy.spec import ThreatModel

Make = Callable[..., Certificate]
CPU = torch.device("cpu")
PUBLISHED = dict(protocols.ITERATIONS)
CONFIG = AttackConfig(threat=ThreatModel(eps="0.03"), seed=0, device=CPU, block_size=5)
pytestmark = pytest.mark.usefixtures("short")


class Rows(Silent):
    """Which units ran, in their order."""

    def __init__(self) -> None:
        self.units: list[tuple[str, int]] = []

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        self.units.append((str(values["attack"]), int(values["block"])))


@pytest.fixture(scope="module")
def images(digits) -> Tensor:
    return digits[0][:18]


@pytest.fixture(scope="module")
def network(make_network) -> nn.Sequential:
    return make_network()


@pytest.fixture(scope="module")
def labels(network, images) -> Tensor:
    """What the network says, but for two images that it gets wrong."""
    found = network(images).argmax(1)
    found[:2] = (found[:2] + 1) % 10
    return found


@pytest.fixture(scope="module")
def full(network, images, labels) -> AttackOutcome:
    """The outcome of the attack that nothing stops."""
    with pytest.MonkeyPatch.context() as patch:
        few = {name: 60 if name == "square" else 5 for name in PUBLISHED}
        patch.setattr(protocols, "ITERATIONS", few)
        return attack(network, images, labels, CONFIG, workers=1)


def decide(policy: Thresholds, pruned: Progress, dense: Progress | None, labels: Sequence[int]) -> str | None:
    return verdict_of(answers(policy, pruned, dense, labels))


def policy_of(threshold: float, rule: Any) -> Thresholds:
    return Thresholds(min_robust=threshold, rule=rule)


def early(
    network: nn.Module, images: Tensor, labels: Tensor, policy: Thresholds, **options: Any
) -> AttackOutcome:
    def decided(progress: Progress) -> bool:
        return decide(policy, progress, None, labels.tolist()) is not None

    running = {name: options.pop(name) for name in {"workers", "recorder"} & options.keys()}
    config = replace(CONFIG, **options)
    return attack(network, images, labels, config, decided=decided, **{"workers": 1, **running})


def certified(
    make: Make, outcome: AttackOutcome, labels: Tensor, policy: Thresholds | None = None
) -> Certificate:
    decision = None
    if outcome.pending:
        assert policy is not None
        decision = EarlyDecision(
            decided="fail", policy=policy.asked, rule=policy.rule, undecided=outcome.pending
        )
    return make(
        outcome.broken_by,
        labels=labels.tolist(),
        class_names=tuple("0123456789"),
        clean_prediction=outcome.clean_prediction,
        adversarial_prediction=outcome.adversarial_prediction,
        attacks=[
            AttackRow(name=row.name, n_in=row.n_in, n_broken=row.n_broken, seconds=0.0)
            for row in outcome.counts
        ],
        decision=decision,
    )


def test_the_verdict_is_that_of_the_full_run_for_every_threshold(
    make_certificate, network, images, labels, full
) -> None:
    survivors = full.broken_by.count(None)
    assert 4 < survivors < 18, "the test needs breaks and survivors"
    kinds = set()
    n = len(images)
    for threshold, rule in [
        (0.2, "point"), (survivors / n, "point"), ((survivors + 1) / n, "point"), (0.85, "point"),
        (0.1, "lower"), (0.4, "lower"), (0.8, "lower"),
    ]:  # fmt: skip
        policy = policy_of(threshold, rule)
        found = early(network, images, labels, policy)
        gate = Thresholds(**policy.model_dump())
        expected = judge(gate, pruned=certified(make_certificate, full, labels)).status
        assert judge(gate, pruned=certified(make_certificate, found, labels, policy)).status == expected
        for index, by in enumerate(found.broken_by):
            assert index in found.pending or by == full.broken_by[index]
        assert sum(count.n_in for count in found.counts) <= sum(count.n_in for count in full.counts)
        kinds.add((expected, bool(found.pending)))
    assert {("pass", True), ("fail", True)} <= kinds


def test_what_the_clean_pass_decides_is_not_attacked(network, images, labels, tmp_path) -> None:
    rows = Rows()
    outcome = early(network, images, labels, policy_of(0.95, "point"), recorder=rows, record=tmp_path)
    assert rows.units == []
    assert len(outcome.pending) == 16
    assert (tmp_path / "attack.jsonl").read_text().count("\n") == 1


def test_the_cheap_attack_goes_first_then_one_block_after_the_other(network, images, labels, full) -> None:
    rows = Rows()
    outcome = attack(
        network, images, labels, CONFIG, workers=1, decided=lambda progress: False, recorder=rows
    )
    assert outcome.complete
    assert rows.units[:4] == [("apgd-ce", block) for block in range(4)]
    later = [block for _, block in rows.units[4:]]
    assert later == sorted(later)
    assert outcome.broken_by == full.broken_by
    assert torch.equal(outcome.adversarial, full.adversarial)


def test_a_run_that_stopped_early_goes_on_where_it_stopped(network, images, labels, full, tmp_path) -> None:
    stopped = early(network, images, labels, policy_of(0.8, "point"), record=tmp_path)
    assert stopped.pending
    lines = (tmp_path / "attack.jsonl").read_text().splitlines()
    further = early(network, images, labels, policy_of(0.1, "point"), record=tmp_path)
    resumed = attack(network, images, labels, replace(CONFIG, record=tmp_path), workers=1)
    assert (tmp_path / "attack.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert set(further.pending) < set(stopped.pending)
    assert resumed.broken_by == full.broken_by
    assert torch.equal(resumed.adversarial, full.adversarial)
    again = early(network, images, labels, policy_of(0.8, "point"), record=tmp_path)
    assert again.broken_by == full.broken_by, "what a record knows is known, whatever is asked"


def pair(network: nn.Sequential, images: Tensor, labels: Tensor, **changes: Any) -> tuple[Cascade, Cascade]:
    """A hopeless network beside one that stands."""
    torch.manual_seed(9)
    weak = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weak[1].weight.data *= 50
    weak[1].bias.data.copy_(torch.zeros(10))
    return tuple(
        Cascade(each, images, labels, replace(CONFIG, threat=ThreatModel(eps=eps), **changes))
        for each, eps in ((weak, "0.3"), (network, "0.001"))
    )  # type: ignore[return-value]


def question(policy: Thresholds, cascades: tuple[Cascade, ...], labels: Tensor) -> Callable[[], bool]:
    pruned, dense = cascades
    return lambda: decide(policy, pruned.progress, dense.progress, labels.tolist()) is not None


def test_a_hopeless_network_costs_no_run_of_the_other(network, images, labels) -> None:
    cascades, rows = pair(network, images, labels), Rows()
    policy = Thresholds(min_robust=0.5, max_drop=0.1, rule="point")
    run(cascades, workers=1, decided=question(policy, cascades, labels), recorder=rows)
    assert all(count.n_in == 0 for count in cascades[1].outcome.counts)
    assert len(cascades[1].outcome.pending) == 16
    assert {name for name, _ in rows.units} <= {"apgd-ce"}


def test_a_drop_needs_both_and_settles_no_more_than_it_must(network, images, labels) -> None:
    cascades = pair(network, images, labels)
    policy = Thresholds(max_drop=0.15, rule="point")
    run(cascades, workers=1, decided=question(policy, cascades, labels))
    pruned, dense = (cascade.progress for cascade in cascades)
    assert decide(policy, pruned, dense, labels.tolist()) == "fail"
    assert 0 < dense.settled < dense.possible
    config = replace(CONFIG, threat=ThreatModel(eps="0.001"))
    alone = attack(network, images, labels, config, workers=1)
    outcome = cascades[1].outcome
    known = [index for index in range(18) if index not in outcome.pending]
    assert [outcome.broken_by[index] for index in known] == [alone.broken_by[index] for index in known]


@pytest.mark.slow
def test_processes_that_share_two_networks_find_the_same(monkeypatch, network, images, labels) -> None:
    """With the published iterations, which no fixture changes in another process."""
    monkeypatch.setattr(protocols, "ITERATIONS", PUBLISHED)
    images, labels = images[:6], labels[:6]
    policy = Thresholds(max_drop=0.15, rule="point")
    here, there = pair(network, images, labels, block_size=2), pair(network, images, labels, block_size=2)
    run(here, workers=1, decided=question(policy, here, labels))
    run(there, workers=2, decided=question(policy, there, labels))
    verdicts = {decide(policy, *(each.progress for each in both), labels.tolist()) for both in (here, there)}
    assert verdicts == {"fail"}
    for one, other in zip(here, there, strict=True):
        known = set(range(6)) - {*one.outcome.pending, *other.outcome.pending}
        assert [one.outcome.broken_by[i] for i in known] == [other.outcome.broken_by[i] for i in known]


def test_no_workers_are_refused(network, images, labels) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "workers-invalid"):
        early(network, images, labels, policy_of(0.5, "point"), workers=0)
