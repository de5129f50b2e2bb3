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


def test_the_line_a_user_reads() -> None:
    assert str(ExpectedCost(200, 0.21, 2)) == (
        "AutoAttack on 200 images takes at most about 21 s (0.21 s per image that survives, 2 at a time)"
    )
    assert "about 8.3 h" in str(ExpectedCost(500, 120.0, 2))
    assert "about 50 min" in str(ExpectedCost(50, 120.0, 2))


def test_a_broken_network_is_an_error_here_too(make_network) -> None:
    network = make_network()
    network[3].bias.data[0] = float("nan")
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        expected_cost(network, torch.rand(2, 1, 8, 8), threat=ThreatModel(eps="1"), device=CPU)
