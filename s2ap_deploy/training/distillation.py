"""Distillation: the pruned network also learns the logits of the dense robust one."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.errors import InputError, UsageError
from s2ap_deploy.training.objective import Objective


class Teacher:
    """Hold a frozen copy of ``network`` in eval mode, and the weight of its logits in the loss.

    The student minimizes (1 - ``weight``) L + ``weight`` T² (KL(t(x) ‖ s(x)) + KL(t(x') ‖ s(x'))) / 2 for
    the robust loss L, t and s the softmax of the logits / T of teacher and student, x' the student's own
    adversarial example. T² keeps the gradient's size independent of T (Hinton et al., 2015, section 2).
    Raises UsageError for a ``weight`` outside [0, 1] or a ``temperature`` that is not positive.
    """

    def __init__(self, network: nn.Module, *, weight: float, temperature: float = 1.0) -> None:
        if not 0 <= weight <= 1:
            raise UsageError(
                f"the weight of distillation must be in [0, 1], not {weight}",
                code="distillation-weight-invalid",
            )
        if not 0 < temperature < math.inf:
            raise UsageError(
                f"the temperature of distillation must be positive, not {temperature}",
                code="distillation-temperature-invalid",
            )
        # A copy, so that freezing it leaves the caller's network as it is, were it the student itself.
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature

    def loss(
        self, objective: Objective, student: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> Tensor:
        """Compute the student's loss on images and adversarial images [B, C, H, W]; a batch mean.

        The student sees the clean images in a forward pass of their own, which TRADES and MART share and
        which moves BatchNorm statistics as theirs does: the loss is made on both kinds of image.
        """
        clean = student(images)
        moved = student(adversarial)
        robust = objective.value(clean, moved, labels)
        distance = (self.distance(images, clean) + self.distance(adversarial, moved)) / 2
        return (1 - self.weight) * robust + self.weight * self.temperature**2 * distance

    def distance(self, images: Tensor, logits: Tensor) -> Tensor:
        """Compute KL(teacher ‖ student) at the temperature, for the student's logits [B, K]; a batch mean.

        Raises InputError when the teacher has another number of classes.
        """
        with torch.no_grad():
            target = self.network(images)
        if target.shape != logits.shape:
            raise InputError(
                f"the teacher has {target.shape[1]} classes, the student {logits.shape[1]}",
                code="teacher-classes-differ",
                hint="distil from the dense network that was pruned",
            )
        return F.kl_div(
            F.log_softmax(logits / self.temperature, dim=1),
            F.log_softmax(target / self.temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
