"""Robust losses as functions of logits: no network runs here. All logits are [B, K], labels int64 [B]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(target: Tensor, logits: Tensor, reduction: str) -> Tensor:
    """KL(target ‖ softmax(logits)) in nats for probabilities and logits [B, K]; ``reduction`` as in torch."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction=reduction)


def trades(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """CE(x, y) + ``beta`` KL(p(x) ‖ p(x')), neither side detached; the batch mean.

    Zhang et al. (2019), eq. 5.
    """
    # A probability that underflows to 0 would send NaN back through its logarithm.
    target = clean.softmax(dim=1).clamp_min(torch.finfo(clean.dtype).tiny)
    robust = divergence(target, adversarial, reduction="batchmean")
    return F.cross_entropy(clean, labels) + beta * robust


def mart(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """BCE(x', y) + ``beta`` KL(p(x) ‖ p(x')) (1 - p_y(x)), neither side detached; the batch mean.

    Misclassification-aware adversarial training (Wang et al., ICLR 2020): images that are already wrong,
    or nearly so, weigh more in the second term.
    """
    log_clean = F.log_softmax(clean, dim=1)
    log_moved = F.log_softmax(adversarial, dim=1)
    # Not F.kl_div on probabilities: its gradient is NaN where one of them underflows to 0.
    per_image = (log_clean.exp() * (log_clean - log_moved)).sum(dim=1)
    doubt = 1 - log_clean.gather(1, labels[:, None]).squeeze(1).exp()
    return boosted_cross_entropy(adversarial, labels) + beta * (per_image * doubt).mean()


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y - log(1 - max_{k≠y} p_k), the batch mean (Wang et al., ICLR 2020: BCE).

    The second term is a margin: it also pushes the likeliest wrong class down. Needs K >= 2.
    """
    log_p = F.log_softmax(logits, dim=1)
    label = F.one_hot(labels, logits.shape[1]).bool()
    rival = log_p.masked_fill(label, -torch.inf).argmax(dim=1)
    # log(1 - p_rival) as the sum over all other classes: 1 - p itself rounds to 0 for a sure mistake.
    others = log_p.masked_fill(F.one_hot(rival, logits.shape[1]).bool(), -torch.inf)
    return F.nll_loss(log_p, labels) - others.logsumexp(dim=1).mean()
