"""Adversarial training with label smoothing (Szegedy et al., 2016, section 7, on PGD examples)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from s2ap_deploy.training.objective import RobustLoss


def smoothed(clean: Tensor | None, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Return the mean cross-entropy on logits [B, K] with ``beta`` of each label spread over all classes."""
    return F.cross_entropy(adversarial, labels, label_smoothing=beta)


SMOOTHED = RobustLoss(value=smoothed, beta=0.1)
