"""The minimum-norm attack: known distances on linear networks, and three answers that never share a value."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2ap_deploy.errors import CheckpointError, DataError, OutOfTimeError, RunFolderError, UsageError
from s2ap_deploy.evaluation import fmn
from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig
from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel, distances
from s2ap_deploy.evaluation.fmn import FMNConfig, margin
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel

CPU = torch.device("cpu")
RUNNING = {"tuning", "workers", "deadline", "recorder"}


def found(network: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> fmn.MinimumNorms:
    settings: dict[str, Any] = {"norm": "Linf", "seed": 0, "device": CPU, **options}
    running = {name: settings.pop(name) for name in RUNNING & settings.keys()}
    return fmn.attack(network, images, labels, FMNConfig(**settings), **running)


def linear(num_classes: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))


def exact(network: nn.Sequential, images: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Predicted labels, and |margin| / dual norm of the nearest other class, where no pixel leaves [0, 1]."""
    logits, weight = network(images).double(), network[1].weight.double()
    labels = logits.argmax(dim=1)
    margins = logits.gather(1, labels[:, None]) - logits
    slopes = torch.linalg.vector_norm(weight[labels][:, None] - weight, ord=1 if norm == "Linf" else 2, dim=2)
    ratios = (margins / slopes).scatter(1, labels[:, None], math.inf)
    return labels, ratios.min(dim=1).values.detach()


class Constant(nn.Module):
    """Answers class 0 whatever it sees; ``attached`` keeps the image in the graph."""

    def __init__(self, attached: bool = True) -> None:
        super().__init__()
        self.attached = attached

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.tensor([1.0, 0.0, -1.0]).repeat(len(x), 1)
        return logits + 0 * x.flatten(1).sum(dim=1, keepdim=True) if self.attached else logits


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(["Linf", "L2"]), st.sampled_from([2, 3, 4, 7]), st.integers(0, 999))
def test_linear_networks_have_the_distances_of_the_formula(norm, num_classes, seed) -> None:
    network = linear(num_classes, seed)
    images = 0.5 + 0.05 * torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    labels, expected = exact(network, images, norm)
    near = expected < (0.4 if norm == "Linf" else 0.8)  # farther ones meet the edge of [0, 1]
    if not near.any():
        return
    result = found(network, images[near], labels[near], norm=norm, steps=100)
    error = result.distances / expected[near] - 1
    assert error.max() < 0.01
    assert error.min() > -1e-3  # nothing lies nearer than the boundary
    assert result.flags == ()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_distance_belongs_to_a_point_that_the_judge_confirms(digits, robust_network, norm) -> None:
    images, labels = digits[0][1200:1230], digits[1][1200:1230]
    result = found(robust_network, images, labels, norm=norm, steps=30)
    hit = (result.distances > 0) & result.distances.isfinite()
    assert hit.sum() >= 25
    assert torch.equal(distances(images, result.points, norm)[hit], result.distances[hit])
    assert result.points.min() >= 0
    assert result.points.max() <= 1
    answers = FrozenModel(robust_network, CPU).logits(result.points, 7).argmax(dim=1)
    assert torch.equal(answers, result.predictions)
    assert (answers[hit] != labels[hit]).all()
    assert torch.equal(result.points[~hit], images[~hit])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_is_wrong_without_an_attack_is_at_distance_zero(norm) -> None:
    network = linear(4, seed=1)
    images = 0.4 + 0.2 * torch.rand(6, 3, 4, 4)
    labels = network(images).argmax(dim=1)
    labels[::2] = (labels[::2] + 1) % 4
    result = found(network, images, labels, norm=norm, steps=60)
    assert result.distances[::2].tolist() == [0.0, 0.0, 0.0]
    assert (result.distances[1::2] > 0).all()
    assert torch.equal(result.points[::2], images[::2])


def test_all_wrong_needs_no_attack() -> None:
    result = found(Constant(), torch.rand(3, 1, 2, 2), torch.tensor([1, 2, 1]))
    assert result.distances.tolist() == [0.0, 0.0, 0.0]
    assert result.flags == ()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_cannot_be_attacked_is_infinitely_far_and_flagged(norm, attached) -> None:
    labels = torch.tensor([0, 1, 0])
    result = found(Constant(attached), torch.rand(3, 1, 4, 4), labels, norm=norm, steps=9)
    assert result.distances.tolist() == [math.inf, 0.0, math.inf]
    assert result.flags == ("zero_gradient",)


def test_a_distance_that_the_box_forbids_is_infinite() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    network[1].weight.data = torch.tensor([[0.0] * 4, [1.0] * 4])
    network[1].bias.data = torch.tensor([4.5, 0.0])  # the sum of four pixels never reaches 4.5
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 0])
    assert found(network, images, labels, steps=40).distances.tolist() == [math.inf, math.inf]
    network[1].bias.data[0] = 3.9  # only near the corner
    assert found(network, images, labels, steps=40).distances.isfinite().all()


def test_where_the_box_cuts_the_ball_the_nearest_corner_is_still_found() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    network[1].weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    network[1].bias.data = torch.tensor([1.5, 0.0])
    image = torch.tensor([0.9, 0.1]).reshape(1, 1, 1, 2)  # straight ahead the first pixel ends at 1
    linf, euclidean = (
        float(found(network, image, torch.tensor([0]), norm=norm).distances) for norm in ("Linf", "L2")
    )
    assert linf == pytest.approx(0.4, rel=0.01)
    assert euclidean == pytest.approx(math.hypot(0.1, 0.4), rel=0.01)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_saturated_logits_still_give_a_direction(norm) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1).sum(1) - 1.0, 1.0 - x.flatten(1).sum(1)], dim=1) * 1e-25

    result = found(Scaled(), torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), norm=norm, steps=100)
    assert float(result.distances) == pytest.approx(0.25 if norm == "Linf" else 0.5, rel=0.01)
    assert result.flags == ()


def test_a_gradient_that_is_infinite_still_points_somewhere() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x.flatten(1).sqrt().sum(dim=1)  # its slope at a black pixel is infinite
            return torch.stack([1.0 - total, total - 1.0], dim=1)

    result = found(Root(), torch.zeros(1, 1, 2, 2), torch.tensor([0]), steps=60)
    assert result.flags == ()
    assert 0.062 < float(result.distances) < 0.3  # 1/16 for all four pixels at once


def test_a_network_that_rolls_dice_is_flagged() -> None:
    class Dice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] + torch.randn(len(x), 2)

    torch.manual_seed(0)
    assert "randomized" in found(Dice(), torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]), steps=3).flags


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_one_image_and_images_of_one_pixel_row(norm) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    image = torch.full((1, 1, 1, 3), 0.5)
    label = network(image).argmax(dim=1)
    assert found(network, image, label, norm=norm, steps=1).distances.shape == (1,)


def test_the_same_seed_gives_the_same_bits_and_blocks_are_fixed(digits, robust_network) -> None:
    images, labels = digits[0][1200:1212], digits[1][1200:1212]
    torch.manual_seed(1)
    first = found(robust_network, images, labels, steps=20, block_size=5)
    torch.manual_seed(2)
    torch.set_num_threads(2)
    again = found(robust_network, images, labels, steps=20, block_size=5)
    assert torch.equal(first.distances, again.distances)
    assert torch.equal(first.points, again.points)
    # A block's outcome does not depend on the blocks after it.
    alone = found(robust_network, images[:5], labels[:5], steps=20, block_size=5)
    assert torch.equal(alone.distances, first.distances[:5])


def test_targeted_runs_never_lose(digits, robust_network) -> None:
    images, labels = digits[0][1200:1220], digits[1][1200:1220]
    options: dict[str, Any] = {"norm": "L2", "seed": 3, "steps": 20}
    alone = found(robust_network, images, labels, targets=0, **options).distances
    joined = found(robust_network, images, labels, targets=50, **options).distances
    assert (joined <= alone).all()
    assert (joined < alone).any()
    assert alone.dtype == torch.float64


def test_the_curve_agrees_with_autoattack_at_its_radius(digits, robust_network, short) -> None:
    images, labels = digits[0][1200:1224], digits[1][1200:1224]
    norms = found(robust_network, images, labels, steps=60).distances
    threat = ThreatModel(eps="0.15")
    outcome = cascade.attack(
        robust_network, images, labels, AttackConfig(threat=threat, seed=0, device=CPU), workers=1
    )
    stands = (norms > threat.radius).tolist()
    differ = sum(mine != (by is None) for mine, by in zip(stands, outcome.broken_by, strict=True))
    assert 0 < sum(stands) < 24
    assert differ <= 2


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.1"), ("Linf", "0.15"), ("L2", "0.5")])
def test_full_autoattack_leaves_no_more_standing_than_the_curve(digits, robust_network, norm, eps) -> None:
    images, labels = digits[0][1200:1300], digits[1][1200:1300]
    threat = ThreatModel(norm=norm, eps=eps)
    norms = found(robust_network, images, labels, norm=threat.norm).distances
    outcome = cascade.attack(
        robust_network, images, labels, AttackConfig(threat=threat, seed=0, device=CPU), workers=1
    )
    autoattack, curve = outcome.broken_by.count(None), int((norms > threat.radius).sum())
    assert autoattack - 1 <= curve <= autoattack + 4


def test_a_killed_attack_continues_from_its_record_to_the_same_bits(digits, robust_network, tmp_path) -> None:
    class StopsAfter(Silent):
        done = 0

        def advance(self, steps: int = 1) -> None:
            self.done += 1
            if self.done == 2:
                raise KeyboardInterrupt

    images, labels = digits[0][1200:1209], digits[1][1200:1209]
    options: dict[str, Any] = {"steps": 8, "block_size": 5, "targets": 1}
    expected = found(robust_network, images, labels, **options)
    interruptions = 0
    while True:
        try:
            resumed = found(robust_network, images, labels, record=tmp_path, recorder=StopsAfter(), **options)
        except KeyboardInterrupt:
            interruptions += 1
        else:
            break
    assert interruptions == 2
    assert torch.equal(resumed.distances, expected.distances)
    assert torch.equal(resumed.points, expected.points)
    assert torch.equal(resumed.predictions, expected.predictions)
    again = found(robust_network, images, labels, record=tmp_path, deadline=0.0, **options)
    assert torch.equal(again.distances, expected.distances), "nothing is left to do after the deadline"
    for change, named in (({"steps": 9}, "steps"), ({"seed": 1}, "seed"), ({"norm": "L2"}, "norm")):
        with pytest.raises(
            RunFolderError, match=named, check=lambda error: error.code == "attack-record-foreign"
        ):
            found(robust_network, images, labels, record=tmp_path, **{**options, **change})


def test_out_of_time_is_told_and_what_was_found_is_kept(make_network, tmp_path) -> None:
    images = torch.rand(4, 1, 8, 8)
    labels = make_network()(images).argmax(1)
    with pytest.raises(OutOfTimeError, check=lambda error: error.code == "time-budget-exceeded"):
        found(make_network(), images, labels, record=tmp_path, deadline=0.0, steps=2)
    assert found(make_network(), images, labels, record=tmp_path, steps=2).distances.shape == (4,)


def test_workers_find_the_same_bits(make_network) -> None:
    images = torch.rand(6, 1, 8, 8)
    labels = make_network()(images).argmax(1)
    one, two = (
        found(make_network(), images, labels, steps=4, targets=1, block_size=3, workers=workers)
        for workers in (1, 2)
    )
    assert torch.equal(one.distances, two.distances)
    assert torch.equal(one.points, two.points)


def test_the_network_is_left_as_it_was(make_network) -> None:
    network = nn.Sequential(make_network(), nn.BatchNorm1d(10)).train()
    before = weights_hash(network)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    found(network, images, labels, steps=3)
    assert weights_hash(network) == before
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_logits_that_are_not_finite_are_an_error(make_network) -> None:
    network = make_network()
    network[3].bias.data[4] = math.nan
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        found(network, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))


def test_logits_that_become_nan_under_the_attack_are_an_error() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, 0].sub(0.5).log()  # wins wherever it is defined
            return torch.stack([first, first - 1], dim=1)

    image = torch.full((1, 1, 2, 2), 0.9)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        found(Log(), image, torch.tensor([0]), steps=100)


@pytest.mark.parametrize(
    ("images", "labels", "code"),
    [
        (torch.rand(2, 8, 8), torch.tensor([0, 1]), "samples-shape-invalid"),
        (torch.rand(2, 1, 8, 8), torch.tensor([0]), "samples-shape-invalid"),
        (torch.rand(0, 1, 8, 8), torch.tensor([]), "samples-shape-invalid"),
        (torch.rand(1, 1, 8, 8) + 1.5, torch.tensor([0]), "images-out-of-range"),
        (torch.full((1, 1, 8, 8), math.nan), torch.tensor([0]), "images-out-of-range"),
        (torch.rand(1, 1, 8, 8), torch.tensor([-1]), "label-invalid"),
        (torch.rand(1, 1, 8, 8), torch.tensor([10]), "label-invalid"),
    ],
)
def test_images_and_labels_that_do_not_fit(make_network, images, labels, code) -> None:
    with pytest.raises(DataError, check=lambda error: error.code == code):
        found(make_network(), images, labels)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"targets": -1},
        {"block_size": 0},
        {"step": 0.0},
        {"step": math.nan},
        {"loss": "hinge"},
        {"norm": "L1"},
        {"workers": 0},
    ],
)
def test_impossible_numbers(make_network, options) -> None:
    with pytest.raises(UsageError):
        found(make_network(), torch.rand(1, 1, 8, 8), torch.tensor([0]), **options)


def test_dlr_falls_back_to_the_difference_for_few_classes() -> None:
    logits, labels = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
    assert margin(logits, labels, None, "dlr").tolist() == [2.0]
    three = torch.tensor([[3.0, 1.0, -1.0]])
    assert margin(three, labels, None, "dlr").tolist() == pytest.approx([0.5])
    assert margin(three, labels, torch.tensor([2]), "dlr").tolist() == [4.0]
    four = torch.tensor([[3.0, 1.0, 0.0, -2.0]])
    assert margin(four, labels, torch.tensor([3]), "dlr").tolist() == pytest.approx([5 / 4])


def test_tuning_takes_the_best_candidate_and_bars_its_images_from_the_report(
    digits, robust_network, monkeypatch
) -> None:
    monkeypatch.setattr(fmn, "GRID", (1e-4, 1.0))
    images, labels = digits[0][1200:1216], digits[1][1200:1216]
    tuning = fmn.tune(robust_network, images, labels, FMNConfig(norm="L2", seed=0, device=CPU, steps=15))
    assert len(tuning.trials) == 4
    best = min(median for _, _, median in tuning.trials)
    assert (tuning.loss, tuning.step, best) in tuning.trials
    assert tuning.step == 1.0
    with pytest.raises(UsageError, check=lambda error: error.code == "tuning-images-reused"):
        found(robust_network, *(v[1215:1220] for v in digits), norm="L2", tuning=tuning)
    with pytest.raises(UsageError, check=lambda error: error.code == "tuning-norm-differs"):
        found(robust_network, *(v[1216:1220] for v in digits), tuning=tuning)
    other = [v[1216:1224] for v in digits]
    tuned = found(robust_network, *other, norm="L2", steps=15, tuning=tuning)
    by_hand = found(robust_network, *other, norm="L2", steps=15, loss=tuning.loss, step=tuning.step)
    assert torch.equal(tuned.distances, by_hand.distances)
