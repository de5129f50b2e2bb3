"""Sections on training: the loss, the attack within it, and the schedule."""

from __future__ import annotations

from pydantic import Field, model_validator

from s2ap_deploy.recipe.field_types import Count, Fraction01, LossName, Momentum, NotNegative, Positive, Whole
from s2ap_deploy.spec import Eps, Record, invalid


class ObjectiveSection(Record):
    """The robust loss and the attack inside it.

    ``at``: PGD adversarial training (Madry et al. 2018). ``trades``: Zhang et al. 2019. ``mart``: Wang et al.
    2020. ``fast``: one step from a random start (Wong et al. 2020). ``free``: Shafahi et al. 2019, where
    input gradients also move the perturbation. Any other name is that of a plug-in.
    """

    loss: LossName = Field(default="at", description="Robust training loss.")
    attack_steps: Count | None = Field(
        default=None, description="PGD steps; not for fast and free, which have one.  [default: 10]"
    )
    step_size: Eps | None = Field(
        default=None, description="PGD step size.  [default: eps / 4; fast: 1.25 eps; free: eps]"
    )
    beta: NotNegative | None = Field(
        default=None, description="Weight of the divergence in trades and mart.  [default: trades 6, mart 5]"
    )
    replays: Count = Field(
        default=4, description="Updates per batch with free: train for as many times fewer epochs."
    )

    @model_validator(mode="after")
    def _steps_fit_loss(self) -> ObjectiveSection:
        if self.loss in ("fast", "free") and self.attack_steps is not None:
            raise invalid(
                "attack-steps-unused",
                f"loss {self.loss} has no attack_steps: leave them out, or choose loss at",
            )
        return self


class Distillation(Record):
    """Distillation from the dense network."""

    weight: Fraction01 = Field(
        default=0.0, description="Weight of the dense network's predictions in the loss; 0 is off."
    )
    temperature: Positive = Field(default=1.0, description="Softmax temperature of both networks.")


class TrainSection(Record):
    """Training of the weights: SGD with a cosine learning rate that ends at 0."""

    epochs: Count = Field(default=100, description="Training epochs.")
    learning_rate: Positive = Field(default=0.1, description="Initial learning rate.")
    momentum: Momentum = Field(default=0.9, description="Momentum of SGD.")
    weight_decay: NotNegative = Field(default=1e-4, description="L2 penalty on the weights.")
    batch_size: Count = Field(default=128, description="Images per step.")
    objective: ObjectiveSection = ObjectiveSection()
    awp_gamma: NotNegative = Field(
        default=0.0,
        description="Radius of AWP (Wu et al. 2020), relative to each layer's norm; 0 is off, 0.01 the "
        "published value.",
    )
    awp_warmup_epochs: Whole = Field(default=0, description="Epochs before AWP is switched on.")

    @model_validator(mode="after")
    def _awp_can_act(self) -> TrainSection:
        if self.awp_gamma > 0 and self.awp_warmup_epochs >= self.epochs:
            raise invalid(
                "awp-warmup-too-long",
                f"awp_warmup_epochs {self.awp_warmup_epochs} leaves AWP none of the {self.epochs} epochs",
            )
        return self
