"""The robust losses against plain formulas in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.training.objective import boosted_cross_entropy, divergence, mart, trades


def logits(seed: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    clean, moved = (scale * torch.randn(5, classes, generator=noise) for _ in range(2))
    return clean, moved, torch.randint(0, classes, (5,), generator=noise)


def plain_mart(clean: torch.Tensor, moved: torch.Tensor, labels: torch.Tensor, beta: float) -> float:
    """One image and one class at a time."""
    total = 0.0
    for p, q, label in zip(
        clean.double().softmax(1).tolist(), moved.double().softmax(1).tolist(), labels.tolist(), strict=True
    ):
        rival = max(value for k, value in enumerate(q) if k != label)
        boosted = -math.log(q[label]) - math.log(1 - rival)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += boosted + beta * kl * (1 - p[label])
    return total / len(labels)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**16), st.integers(2, 6), st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 5.0])
)
def test_mart_is_its_formula(seed, classes, scale, beta) -> None:
    clean, moved, labels = logits(seed, classes, scale)
    expected = plain_mart(clean, moved, labels, beta)
    assert float(mart(clean, moved, labels, beta)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_mart_learns_from_both_sides_of_the_divergence() -> None:
    """Detaching p(x), in the divergence or in its weight, gives another gradient at the clean logits."""
    clean, moved, labels = logits(3, 4, 1.0)

    def gradient(form: str) -> torch.Tensor:
        x = clean.clone().requires_grad_()
        p = x.softmax(1)
        target = p.detach() if form == "target detached" else p
        doubt = 1 - (p.detach() if form == "weight detached" else p)[torch.arange(5), labels]
        kl = (target * (target.log() - moved.log_softmax(1))).sum(1)
        loss = mart(x, moved, labels, 5.0) if form == "ours" else 5.0 * (kl * doubt).mean()
        if form == "ours":
            loss = loss - boosted_cross_entropy(moved, labels)
        return torch.autograd.grad(loss, x)[0]

    torch.testing.assert_close(gradient("ours"), gradient("plain"), rtol=1e-4, atol=1e-6)
    for detached in ("target detached", "weight detached"):
        assert not torch.allclose(gradient("ours"), gradient(detached), rtol=1e-2)


@pytest.mark.parametrize("loss", [trades, mart])
@pytest.mark.parametrize("height", [50.0, 200.0, 1e4])
def test_probabilities_that_underflow_leave_loss_and_gradients_finite(loss, height) -> None:
    clean = torch.tensor([[height, 0.0, 0.0], [0.0, height, -height]], requires_grad=True)
    moved = torch.tensor([[0.0, height, 0.0], [0.0, 1.0, 2.0]], requires_grad=True)
    value = loss(clean, moved, torch.tensor([0, 1]), 5.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(clean.grad).all()
    assert torch.isfinite(moved.grad).all()
    assert float(moved.grad.abs().sum()) > 0


def test_the_floor_under_trades_changes_no_bit_where_nothing_underflows() -> None:
    clean, moved, labels = logits(1, 10, 5.0)
    clean.requires_grad_()
    without = F.cross_entropy(clean, labels) + 6.0 * divergence(clean.softmax(1), moved, "batchmean")
    ours = trades(clean, moved, labels, 6.0)
    assert torch.equal(ours, without)
    assert torch.equal(torch.autograd.grad(ours, clean)[0], torch.autograd.grad(without, clean)[0])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.sampled_from([0.1, 2.0]))
def test_identical_logits_pay_only_for_being_wrong(seed, scale) -> None:
    clean, _, labels = logits(seed, 4, scale)
    assert float(trades(clean, clean, labels, 6.0)) == pytest.approx(
        float(F.cross_entropy(clean, labels)), rel=1e-4, abs=1e-5
    )
    assert float(mart(clean, clean, labels, 5.0)) == pytest.approx(
        float(boosted_cross_entropy(clean, labels)), rel=1e-4, abs=1e-5
    )


def test_two_classes_make_the_margin_a_second_cross_entropy() -> None:
    _, moved, labels = logits(0, 2, 1.0)
    assert float(boosted_cross_entropy(moved, labels)) == pytest.approx(
        2 * float(F.cross_entropy(moved, labels)), rel=1e-5
    )
