"""The orchestration: who is attacked with what, how it resumes, and what it refuses."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2ap_deploy.errors import CheckpointError, DataError, RunFolderError, UsageError
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, attack
from s2ap_deploy.evaluation.autoattack.frozen_model import distances
from s2ap_deploy.evaluation.autoattack.scheduler import AttackOutcome, default_block_size
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel

RUNNING = {"workers", "deadline", "decided", "recorder"}


def run(network: nn.Module, images: Tensor, labels: Tensor | None = None, **options: Any) -> AttackOutcome:
    """Few iterations are enough here; ``labels`` default to what the network says."""
    if labels is None:
        labels = network(images).argmax(1)
    settings: dict[str, Any] = {"threat": ThreatModel(eps="0.03"), "seed": 0, "block_size": 5, "workers": 1}
    settings |= {"device": torch.device("cpu"), **options}
    running = {name: settings.pop(name) for name in RUNNING & settings.keys()}
    return attack(network, images, labels, AttackConfig(**settings), **running)


def same(one: AttackOutcome, other: AttackOutcome) -> bool:
    return (
        one.broken_by == other.broken_by
        and one.adversarial_prediction == other.adversarial_prediction
        and torch.equal(one.adversarial, other.adversarial)
        and one.flags == other.flags
        and [(c.n_in, c.n_broken) for c in one.counts] == [(c.n_in, c.n_broken) for c in other.counts]
    )


pytestmark = pytest.mark.usefixtures("short")


@pytest.fixture
def images(digits) -> Tensor:
    return digits[0][:17]


def test_every_break_is_real_and_every_count_adds_up(make_network, images) -> None:
    network = make_network()
    before = weights_hash(network)
    labels = network(images).argmax(1)
    labels[3] = (labels[3] + 1) % 10
    outcome = run(network, images, labels)
    assert outcome.protocol == "standard"
    assert outcome.complete
    assert outcome.broken_by[3] == "clean"
    assert outcome.counts[0].n_in == 16
    for earlier, later in zip(outcome.counts, outcome.counts[1:], strict=False):
        assert later.n_in == earlier.n_in - earlier.n_broken
    assert 0 < outcome.broken_by.count(None) < 16, "the test needs breaks and survivors"
    prediction = network(outcome.adversarial).argmax(1)
    assert tuple(prediction.tolist()) == outcome.adversarial_prediction
    for index, by in enumerate(outcome.broken_by):
        assert (prediction[index] == labels[index]) == (by is None)
        if by in (None, "clean"):
            assert torch.equal(outcome.adversarial[index], images[index])
    assert (distances(images, outcome.adversarial, "Linf") <= 0.03 + 1e-6).all()
    assert weights_hash(network) == before


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 10, 100])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_any_number_of_classes_in_any_norm(make_network, images, num_classes, norm) -> None:
    threat = ThreatModel(norm=norm, eps={"Linf": "0.02", "L2": "0.2", "L1": "1"}[norm])
    outcome = run(make_network(num_classes), images[:4], threat=threat)
    assert outcome.complete
    assert ("adapted_protocol" in outcome.flags) == (num_classes < 4)
    assert outcome.protocol == ("aa-adapted" if num_classes < 4 else "standard")
    assert (distances(images[:4], outcome.adversarial, norm) <= threat.radius * (1 + 1e-5)).all()


def test_a_single_sample(make_network, images) -> None:
    outcome = run(make_network(), images[:1], threat=ThreatModel(eps="0.0001"))
    assert outcome.broken_by == (None,)
    assert [count.n_in for count in outcome.counts] == [1, 1, 1, 1]


def test_nothing_is_attacked_when_everything_is_misclassified(make_network, images) -> None:
    network = make_network()
    wrong = (network(images).argmax(1) + 1) % 10
    outcome = run(network, images, wrong)
    assert set(outcome.broken_by) == {"clean"}
    assert [count.n_in for count in outcome.counts] == [0, 0, 0, 0]
    assert outcome.complete


def test_memory_format_and_precision_of_the_caller_do_not_matter(make_network) -> None:
    network, images = make_network(channels=3), torch.rand(4, 3, 8, 8)
    expected = run(network, images)
    strange = make_network(channels=3).to(memory_format=torch.channels_last).double()
    labels = network(images).argmax(1)
    assert same(expected, run(strange, images.to(memory_format=torch.channels_last).double(), labels))


def test_a_model_in_train_mode_is_attacked_in_eval_mode(images) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    network(images)  # moves the statistics away from their initial values
    labels = network.eval()(images).argmax(1)
    expected = run(network, images, labels)
    before = weights_hash(network)
    assert same(expected, run(network.train(), images, labels))
    assert network.training
    assert weights_hash(network) == before


@pytest.mark.parametrize("entries", [slice(None), slice(0, 1)])
def test_nan_weights_are_an_error_and_no_accuracy(make_network, images, entries) -> None:
    network = make_network()
    labels = network(images).argmax(1)
    network[3].weight.data[entries] = float("nan")
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        run(network, images, labels)


def test_flags_for_probabilities_and_for_randomness(make_network, images) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = make_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x + 0.1 * torch.randn_like(x))

    assert "not_logits" in run(nn.Sequential(make_network(), nn.Softmax(dim=1)), images[:3]).flags
    assert "randomized" in run(Noisy(), images[:3]).flags


def test_a_constant_network_is_flagged_and_not_called_broken(make_network, images) -> None:
    network = make_network()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    outcome = run(network, images[:4], torch.zeros(4))
    assert outcome.broken_by == (None,) * 4
    assert "zero_gradient" in outcome.flags


def test_the_outcome_depends_on_the_seed_only(make_network, images) -> None:
    network = make_network()
    torch.manual_seed(1)
    torch.set_num_threads(2)
    expected = run(network, images)
    torch.manual_seed(2)
    torch.set_num_threads(1)
    assert same(expected, run(network, images))
    assert not torch.equal(expected.adversarial, run(network, images, seed=1).adversarial)


def test_a_deadline_stops_between_units_and_the_record_continues(make_network, images, tmp_path) -> None:
    network = make_network()
    expected = run(network, images)
    nothing = run(network, images, record=tmp_path, deadline=time.monotonic())
    assert not nothing.complete
    assert len(nothing.pending) == nothing.broken_by.count(None) == 17

    class StopsAfter(Silent):
        rows = 0

        def log(self, stage: str, values: dict[str, float | int | str]) -> None:
            self.rows += 1
            if self.rows == 3:
                raise KeyboardInterrupt

    interruptions = 0
    while True:
        try:
            resumed = run(network, images, record=tmp_path, recorder=StopsAfter())
        except KeyboardInterrupt:
            interruptions += 1
        else:
            break
    assert interruptions >= 2
    assert resumed.complete
    assert same(expected, resumed)
    before = (tmp_path / "attack.jsonl").read_bytes()
    assert same(expected, run(network, images, record=tmp_path, deadline=time.monotonic()))
    assert (tmp_path / "attack.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"threat": ThreatModel(eps="0.04")}, "eps"), ({"block_size": 4}, "block_size"),
     ({"threat": ThreatModel(norm="L2", eps="0.03")}, "norm"), ({"header": {"data": "mnist"}}, "data")],
)  # fmt: skip
def test_a_record_of_another_attack_is_refused(make_network, images, tmp_path, change, named) -> None:
    run(make_network(), images, record=tmp_path, header={"data": "digits"}, deadline=0.0)
    with pytest.raises(
        RunFolderError, match=named, check=lambda error: error.code == "attack-record-foreign"
    ):
        run(make_network(), images, record=tmp_path, **{"header": {"data": "digits"}, **change})


def test_a_record_of_other_weights_or_samples_is_refused(make_network, images, tmp_path) -> None:
    network = make_network()
    labels = network(images).argmax(1)
    run(network, images, labels, record=tmp_path, deadline=0.0)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-foreign"):
        run(network, images.flip(0), labels, record=tmp_path)
    network[3].bias.data[0] += 1e-3
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-foreign"):
        run(network, images, labels, record=tmp_path)


def test_progress_reaches_its_total(make_network, images) -> None:
    class Adds(Silent):
        total = done = 0
        rows: list[dict[str, float | int | str]]

        def begin(self, stage: str, total: int, unit: str) -> None:
            self.total, self.rows = total, []

        def advance(self, steps: int = 1) -> None:
            self.done += steps

        def log(self, stage: str, values: dict[str, float | int | str]) -> None:
            self.rows.append(values)

    recorder = Adds()
    outcome = run(make_network(), images, recorder=recorder)
    assert recorder.done == recorder.total > 0
    assert recorder.rows[-1]["unbroken"] == outcome.broken_by.count(None)


IMAGES, ZEROS = torch.rand(2, 1, 8, 8), torch.zeros(2)


@pytest.mark.parametrize(
    ("images", "labels", "change", "code"),
    [
        (IMAGES[:0], ZEROS[:0], {}, "samples-shape-invalid"),
        (IMAGES[:, 0], ZEROS, {}, "samples-shape-invalid"),
        (IMAGES, torch.zeros(3), {}, "samples-shape-invalid"),
        (IMAGES * 255, ZEROS, {}, "images-out-of-range"),
        (IMAGES * float("nan"), ZEROS, {}, "images-out-of-range"),
        (IMAGES, torch.tensor([0, 10]), {}, "label-invalid"),
        (IMAGES, torch.tensor([0, -1]), {}, "label-invalid"),
        (IMAGES, ZEROS, {"workers": 0}, "workers-invalid"),
        (IMAGES, ZEROS, {"block_size": 0}, "block-size-invalid"),
    ],
)
def test_samples_and_numbers_that_do_not_fit(make_network, images, labels, change, code) -> None:
    with pytest.raises((DataError, UsageError), check=lambda error: error.code == code):
        run(make_network(), images, labels, **change)


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [100, 50, 16]), ("cuda", [256, 256, 64])])
def test_the_block_size_follows_from_the_size_of_an_image_and_the_device(device, sizes) -> None:
    shapes = ((1, 28, 28), (3, 32, 32), (3, 224, 224))
    assert [default_block_size(torch.empty(1, *s), torch.device(device)) for s in shapes] == sizes


def test_what_is_proven_stands_without_being_attacked(make_network, images, tmp_path) -> None:
    network = make_network()
    everyone = run(network, images, threat=ThreatModel(eps="0.3"))
    assert everyone.broken_by[2] is not None, "or the test shows nothing"
    told = run(network, images, threat=ThreatModel(eps="0.3"), proven=[2, 5], record=tmp_path)
    assert (told.broken_by[2], told.broken_by[5]) == (None, None)
    assert told.complete
    assert told.counts[0].n_in == everyone.counts[0].n_in - 2
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-foreign"):
        run(network, images, threat=ThreatModel(eps="0.3"), record=tmp_path)
    with pytest.raises(UsageError, check=lambda error: error.code == "proven-sample-missing"):
        run(network, images, proven=[17])
