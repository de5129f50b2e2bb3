"""The expected-cost line."""

import os
import time

import pytest
import torch

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.evaluation.autoattack.cascade import ExpectedCost, expected_cost
from s2ap_deploy.evaluation.autoattack.frozen_model import Attacker, FrozenModel, Unit, exact_arithmetic
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.spec import ThreatModel

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_estimate_is_near_what_a_survivor_costs(make_network) -> None:
    network, images = make_network(2), torch.rand(20, 1, 8, 8)
    before = weights_hash(network)
    expected = expected_cost(network, images, threat=ThreatModel(eps="0.1"), device=CPU, workers=1)
    assert expected.survivors == 20
    assert weights_hash(network) == before
    labels = network(images).argmax(1)
    attacker = Attacker(FrozenModel(network, CPU), images, labels, ThreatModel(eps="1e-5"), 2, CPU)
    started = time.monotonic()
    with exact_arithmetic(CPU):
        for name in ("apgd-ce", "apgd-margin", "fab-t", "square"):
            attacker.run(Unit(0, name, 0, tuple(range(20))))
    real = time.monotonic() - started
    # "At most": on so small an image Square skips most of its queries as refused before. A shared machine is
    # not a clock, so both bounds are wide.
    assert real / 4 < expected.seconds < real * 40


def test_workers_divide_the_time_and_blocks_limit_them(make_network, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    cost = expected_cost(
        make_network(), torch.rand(7, 1, 8, 8), threat=ThreatModel(eps="1"), device=CPU, block_size=2
    )
    assert cost.workers == 4
    assert cost.seconds == pytest.approx(7 * cost.per_survivor / 4)


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (
            ExpectedCost(200, 0.01, 0.2, 2),
            "AutoAttack on 200 images takes about 11 s (if half of the images survive; not measured yet), "
            "at most 21 s (0.21 s per image that survives, 2 at a time)",
        ),
        (
            ExpectedCost(200, 0.01, 0.2, 2, shares=((1.0, 0.9), (0.9, 0.8))),
            "AutoAttack on 200 images of both networks takes about 36 s (90.0% and 80.0% robust under "
            "PGD-10), at most 42 s (0.21 s per image that survives, 2 at a time)",
        ),
        (
            ExpectedCost(500, 20.0, 100.0, 2, "quick", ((0.5, 0.2),), "the stored points"),
            "the quick sweep on 500 images takes about 2.1 h (20.0% robust under the stored points), "
            "at most 8.3 h (2 min per image that survives, 2 at a time)",
        ),
    ],
)
def test_the_line_a_user_reads(cost, words) -> None:
    assert str(cost) == words


def test_a_broken_network_is_an_error_here_too(make_network) -> None:
    network = make_network()
    network[3].bias.data[0] = float("nan")
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        expected_cost(network, torch.rand(2, 1, 8, 8), threat=ThreatModel(eps="1"), device=CPU)
