"""The measurement of a device: verdicts by their bounds, repeated work by its median, all lines on a CPU."""

import pytest
import torch

from s2ap_deploy.planning import device_bench
from s2ap_deploy.planning.device_bench import Load, Rate, bounded, compared, measure, seconds_each
from s2ap_deploy.recorder import Silent

CPU = torch.device("cpu")
NAMES = ["agreement", "arithmetic", "training step", "search step", "attack", "data in memory"]


@pytest.mark.parametrize(
    ("measured", "outcome", "odd"),
    [
        (1.0, "as predicted", False),
        (1.24, "as predicted", False),
        (1.26, "slower", True),
        (0.81, "as predicted", False),
        (0.79, "faster", False),
    ],
)
def test_a_time_is_compared_with_the_estimate(measured, outcome, odd) -> None:
    rate = compared("step", measured, 1.0, "note")
    assert (rate.outcome, rate.odd) == (outcome, odd)


@pytest.mark.parametrize(
    ("measured", "least", "odd"),
    [(2.0, True, False), (1.9, True, True), (2.0, False, False), (2.1, False, True)],
)
def test_a_figure_is_held_to_its_bound(measured, least, odd) -> None:
    assert bounded("bf16", measured, 2.0, "times", "note", least=least).odd == odd


def test_repetitions_end_with_their_time_and_give_the_median(monkeypatch) -> None:
    clock, lengths = [0.0], [9.0, 1.0, 5.0, 2.0, 100.0]

    def work() -> None:
        clock[0] += lengths.pop(0)

    monkeypatch.setattr(device_bench.time, "monotonic", lambda: clock[0])
    assert seconds_each(work, 8.0, CPU) == 2.0  # of 1, 5 and 2; the first warms up, the last is not begun
    assert lengths == [100.0]


def test_every_line_is_measured_and_a_cpu_agrees_with_itself(monkeypatch) -> None:
    monkeypatch.setattr(device_bench, "attack", lambda *_, **__: None)
    rates = measure(CPU, Silent(), Load("cifar-conv", 4, 0.0))
    assert [rate.name for rate in rates] == [*NAMES, "JPEG decoding"]
    assert all(rate.measured > 0 for rate in rates if rate.name != "attack")
    assert rates[0].outcome == "ok"


def test_logits_that_differ_from_float64_are_suspicious(monkeypatch) -> None:
    monkeypatch.setattr(device_bench, "_AGREEMENT", 0.0)
    bench = device_bench._Bench(CPU, Load("cifar-conv", 4, 0.0))
    assert [rate.outcome for rate in bench.agreement()] == ["suspicious"]


def test_the_doctor_prints_what_was_measured(s2ap, monkeypatch) -> None:
    rate = Rate(name="attack", measured=2.0, predicted=1.0, unit="s", outcome="slower", note="one block")
    monkeypatch.setattr(device_bench, "measure", lambda *_: (rate,))
    assert "! attack          2 s, expected 1: slower (one block)" in s2ap.ok("doctor", "--bench").out
    assert s2ap.json("doctor", "--bench")["bench"] == [rate.model_dump()]
    assert "bench" not in s2ap.json("doctor")
    s2ap.refused("device-unusable", "doctor", "--bench", "--device", "cuda:77")
