"""Each attack with its own inner loop against the reference's: same draws, same path, same verdicts."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from s2ap_deploy.evaluation.autoattack import attacks
from s2ap_deploy.evaluation.autoattack.apgd import deeply_wrong
from s2ap_deploy.evaluation.autoattack.fab import project
from s2ap_deploy.evaluation.autoattack.square import Proposals

N = 24
EPS = {"Linf": 0.12, "L2": 0.5, "L1": 3.0}


class Watched(nn.Module):
    """Counts images and remembers, for each clean image, the first adversarial point within eps."""

    def __init__(self, network: nn.Module, clean: Tensor, labels: Tensor, norm: str) -> None:
        super().__init__()
        self.network, self.clean, self.labels = network, clean, labels
        self.order = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}[norm]
        self.eps = EPS[norm]
        self.images = 0
        self.first: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        self.images += len(x)
        apart = torch.cdist(x.detach().flatten(1), self.clean.flatten(1), p=self.order)
        nearest, owner = apart.min(dim=1)
        deep = deeply_wrong(logits.detach(), self.labels[owner]) & (nearest <= self.eps * (1 + 1e-5))
        for row in deep.nonzero().flatten().tolist():
            self.first.setdefault(int(owner[row]), x[row].detach().clone())
        return logits


def reference(name: str, model: nn.Module, norm: str, eps: float, iterations: int) -> Any:
    shared: dict[str, Any] = {"norm": norm, "eps": eps, "seed": 5, "device": torch.device("cpu")}
    apgd = {"n_iter": iterations, "use_largereps": norm == "L1", "logger": attacks.WarningCount()}
    targets = 5 if norm == "L1" else 9
    makers = {
        "apgd-ce": lambda: APGDAttack(
            model, loss="ce", n_restarts=5 if norm == "L1" else 1, **apgd, **shared
        ),
        "apgd-t": lambda: APGDAttack_targeted(model, n_target_classes=targets, **apgd, **shared),
        "fab-t": lambda: FABAttack_PT(model, targeted=True, n_iter=iterations, **shared),
        "apgd-dlr": lambda: APGDAttack(model, loss="dlr", n_restarts=5, n_iter=iterations, **shared),
        "fab": lambda: FABAttack_PT(model, n_restarts=5, n_iter=iterations, **shared),
        "square": lambda: SquareAttack(model, n_queries=iterations, resc_schedule=False, **shared),
    }
    return makers[name]()


def both(
    name: str, network: nn.Module, images: Tensor, labels: Tensor, norm: str, iterations: int
) -> list[tuple[Tensor, Watched]]:
    """What the reference breaks, and what ours does, with their watched networks."""
    from s2ap_deploy.spec import ThreatModel

    found = []
    for ours in (False, True):
        model = Watched(network, images, labels, norm)
        attack = reference(name, model, norm, EPS[norm], iterations)
        if ours:
            attack = attacks.build(
                name, model, ThreatModel(norm=norm, eps=repr(EPS[norm])), num_classes=10, seed=5,
                device=torch.device("cpu"), warnings=attacks.WarningCount(), iterations=iterations,
                version="plus" if name in ("apgd-dlr", "fab") else "standard",
            )  # fmt: skip
        attacked = attack.perturb(images.clone(), labels.clone())
        with torch.no_grad():
            found.append((network(attacked).argmax(1) != labels, model))
    return found


@pytest.fixture(scope="module")
def victims(robust_network, digits) -> tuple[nn.Module, Tensor, Tensor]:
    """A robust network, and images that it classifies correctly."""
    network = robust_network.requires_grad_(False)
    images, labels = (values[1200 : 1200 + 2 * N] for values in digits)
    right = (network(images).argmax(1) == labels).nonzero().flatten()[:N]
    return network, images[right], labels[right]


@pytest.mark.parametrize(
    ("name", "norm", "iterations"),
    [("apgd-ce", "Linf", 100), ("apgd-ce", "L2", 100), ("apgd-ce", "L1", 30), ("apgd-t", "Linf", 25),
     ("apgd-t", "L2", 25), ("apgd-t", "L1", 20), ("fab-t", "Linf", 20), ("fab-t", "L2", 20),
     ("square", "Linf", 600), ("apgd-dlr", "Linf", 10), ("fab", "Linf", 4), ("fab", "L1", 4)],
)  # fmt: skip
def test_the_same_points_break_at_the_same_place(victims, name, norm, iterations) -> None:
    (theirs, reference_saw), (ours, we_saw) = both(name, *victims, norm, iterations)
    assert 0 < int(theirs.sum()) < N, "the test needs breaks and survivors"
    assert torch.equal(ours, theirs)
    assert we_saw.images < reference_saw.images
    for index in ours.nonzero().flatten().tolist():
        if index in reference_saw.first:
            apart = (we_saw.first[index] - reference_saw.first[index]).abs().max()
            assert apart < 1e-3, f"point {index} left the reference's path"


def test_square_in_l2_is_the_reference(victims) -> None:
    (theirs, reference_saw), (ours, we_saw) = both("square", *victims, "L2", 60)
    assert torch.equal(ours, theirs)
    assert we_saw.images == reference_saw.images


def test_square_asks_nothing_twice(victims) -> None:
    """On small images most proposals return: from query 1,000 on, a square is a single pixel."""
    network, images, labels = victims
    (_, reference_saw), (_, we_saw) = both("square", network, images[:3], labels[:3], "Linf", 2500)
    assert we_saw.images < 0.5 * reference_saw.images


def test_proposals_are_the_draws_of_the_reference() -> None:
    torch.manual_seed(7)
    attack = SquareAttack(nn.Flatten(), eps=0.1, resc_schedule=False)
    attack.device = "cpu"
    expected = []
    for index in range(300):
        side = max(round(math.sqrt(attack.p_selection(index) * 64)), 1)
        top, left = int(attack.random_int(0, 8 - side)), int(attack.random_int(0, 8 - side))
        square = torch.zeros(3, 8, 8)
        square[:, top : top + side, left : left + side] = 2 * 0.1 * attack.random_choice([3, 1, 1])
        expected.append(square)
    torch.manual_seed(7)
    found = Proposals.draw(300, torch.Size((3, 8, 8)), 0.1, attack.p_selection)
    squares = found.down[:, None, :, None] * found.across[:, :, None, :]
    assert torch.equal(squares, torch.stack(expected))
    same = (squares.unsqueeze(0) == squares.unsqueeze(1)).flatten(2).all(dim=2)
    assert torch.equal(same, found.kind.unsqueeze(0) == found.kind.unsqueeze(1))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["Linf", "L2"]),
    st.integers(1, 40),
    st.floats(-3, 3),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_the_projection_is_the_reference_without_sorting(norm, size, offset, seed, corners) -> None:
    noise = torch.Generator().manual_seed(seed)
    points = torch.rand(3, 2, size, generator=noise)
    if corners:  # values at the ends of the box have no room on one side
        points = torch.where(torch.rand(points.shape, generator=noise) < 0.5, points.round(), points)
    normal = torch.randn(3, size, generator=noise)
    normal[0, : size // 2] = 0
    distance = (points * normal.unsqueeze(1)).sum(2).mean(1) + offset
    theirs = {"Linf": projection_linf, "L2": projection_l2}[norm](
        points.flatten(0, 1), normal.repeat_interleave(2, 0), distance.repeat_interleave(2)
    )
    ours = project(points, normal, distance, norm)
    moved = points + ours
    assert moved.min() >= -1e-5
    assert moved.max() <= 1 + 1e-5
    length = {"Linf": math.inf, "L2": 2.0}[norm]
    sizes = [torch.linalg.vector_norm(m.flatten(0, -2), ord=length, dim=1) for m in (ours, theirs)]
    gaps = [(m.view(3, 2, -1) + points).mul(normal.unsqueeze(1)).sum(2) - distance.unsqueeze(1)
            for m in (ours, theirs)]  # fmt: skip
    assert torch.allclose(gaps[0], gaps[1], atol=2e-4)
    assert (sizes[0] <= sizes[1] * (1 + 1e-3) + 1e-4).all()


def test_a_hyperplane_out_of_reach_or_without_a_normal() -> None:
    points = torch.tensor([[[0.2, 0.7]]])
    for norm in ("Linf", "L2"):
        corner = project(points, torch.tensor([[1.0, -2.0]]), torch.tensor([9.0]), norm)
        assert torch.allclose(points + corner, torch.tensor([[[1.0, 0.0]]]))
        nowhere = project(points, torch.zeros(1, 2), torch.tensor([1.0]), norm)
        assert torch.equal(nowhere, torch.zeros_like(points))


def test_only_what_rounding_cannot_undo_is_deeply_wrong() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0 + 1e-6], [1e4, 1e4 + 0.5]])
    assert deeply_wrong(logits, torch.zeros(4, dtype=torch.long)).tolist() == [False, True, False, False]
