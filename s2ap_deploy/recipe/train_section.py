"""Sections on training: the loss, the attack within it, and the schedule. No torch."""

from __future__ import annotations

from pydantic import model_validator

from s2ap_deploy.recipe.field_types import Count, Fraction01, LossName, Momentum, NotNegative, Positive, Whole
from s2ap_deploy.spec import Eps, Record


class ObjectiveSection(Record):
    """The robust loss and the attack that belongs to it.

    ``at``: PGD adversarial training (Madry et al. 2018). ``trades``: Zhang et al. 2019. ``mart``: Wang et al.
    2020. ``fast``: one step from a random start (Wong et al. 2020). ``free``: ``replays`` updates per batch,
    whose own input gradients move the perturbation (Shafahi et al. 2019): give it as many times fewer epochs.
    ``attack_steps`` None is 10; ``fast`` and ``free`` have no such number. ``step_size`` None is a quarter of
    eps, 1.25 eps for ``fast``, eps for ``free``. ``beta`` weighs the divergence of ``trades`` (None: 6) and
    ``mart`` (None: 5). ``beta`` and ``replays`` mean nothing to the other losses of ours. Any other name is
    that of a plug-in.
    """

    loss: LossName = "at"
    attack_steps: Count | None = None
    step_size: Eps | None = None
    beta: NotNegative | None = None
    replays: Count = 4

    @model_validator(mode="after")
    def _steps_fit_loss(self) -> ObjectiveSection:
        if self.loss in ("fast", "free") and self.attack_steps is not None:
            raise ValueError(f"loss {self.loss} has no attack_steps: leave them out, or choose loss at")
        return self


class Distillation(Record):
    """What the dense network's answers weigh in the loss (0: nothing), softened by ``temperature``."""

    weight: Fraction01 = 0.0
    temperature: Positive = 1.0


class TrainSection(Record):
    """Training of the weights: SGD with a cosine learning rate that ends at 0.

    ``awp_gamma`` is AWP's radius in weight space (Wu et al. 2020), relative to each layer's norm: 0 is off,
    0.01 the published code's value for ``at``. ``awp_warmup_epochs`` pass before it is switched on.
    """

    epochs: Count = 100
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    weight_decay: NotNegative = 1e-4
    batch_size: Count = 128
    objective: ObjectiveSection = ObjectiveSection()
    awp_gamma: NotNegative = 0.0
    awp_warmup_epochs: Whole = 0

    @model_validator(mode="after")
    def _awp_can_act(self) -> TrainSection:
        if self.awp_gamma > 0 and self.awp_warmup_epochs >= self.epochs:
            raise ValueError(
                f"awp_warmup_epochs {self.awp_warmup_epochs} leaves AWP none of the {self.epochs} epochs"
            )
        return self
