"""Sharpness of the loss around the scores of a search, measured between two epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ap_deploy.data.splits import Split, choose
from s2ap_deploy.errors import InputError
from s2ap_deploy.pruning.curvature import evaluating, largest_eigenvalue, mean_loss, sharpness_lower_bound
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runtime import derive_seed, generator
from s2ap_deploy.training.objective import Objective


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Measures a scored network on fixed training images [B, C, H, W], attacked again under the current mask.

    ``gamma`` is the radius of the ball, also if the search itself does not perturb. ``iterations`` is the
    number of Lanczos steps, ``directions`` that of random directions; ``every`` is a period in epochs.
    """

    images: Tensor
    labels: Tensor
    objective: Objective
    gamma: float
    iterations: int
    directions: int
    every: int
    seed: int
    recorder: Recorder

    def __call__(self, scored: ScoredNetwork, epoch: int) -> dict[str, float]:
        """Measure ``sharpness``, ``eigenvalue`` and its residual, named as in ``Epoch``; empty when not due.

        M(s) is applied to the network afterwards; BatchNorm statistics and modes are as before.
        """
        if self.every == 0 or epoch % self.every:
            return {}
        network = scored.network
        scored.apply_mask(scored.select())
        noise = generator(self.seed, "diagnose", device=self.images.device)
        with evaluating(network):
            adversarial = self.objective.attack(network, self.images, self.labels, noise)
            gradients = scored.gradients(self.loss(network, self.images, adversarial, self.labels))
        batch = (self.images, adversarial, self.labels)
        sharpness = sharpness_lower_bound(
            lambda scores: self.loss_at(scored, scores, batch),
            scored.scores,
            gradients,
            self.gamma,
            directions=self.directions,
            seed=self.seed,
        )
        scored.apply_mask(scored.select())
        try:
            eigenvalue = largest_eigenvalue(
                network,
                scored.masked,
                scored.weights,
                [batch],
                self.loss,
                iterations=self.iterations,
                seed=self.seed,
                gather=scored.granularity.gather,
            )
        except InputError as error:  # an operation without a second derivative must not end a search
            self.recorder.warn(f"no eigenvalue in epoch {epoch}: {error.message}")
            return {"sharpness": sharpness.bound}
        return {
            "sharpness": sharpness.bound,
            "eigenvalue": eigenvalue.value,
            "eigenvalue_residual": eigenvalue.residual,
        }

    def loss(self, network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        return self.objective.robust_loss(network, images, adversarial, labels)[0]

    def loss_at(
        self, scored: ScoredNetwork, scores: Mapping[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]
    ) -> float:
        """Compute the loss under M at other ``scores``, with the signs of the unperturbed ones."""
        resting = scored.scores
        scored.scores = dict(scores)
        try:
            scored.apply_mask(scored.select())
        finally:
            scored.scores = resting
        return mean_loss(scored.network, [batch], self.loss)


def diagnosis(
    train: Split,
    objective: Objective,
    *,
    images: int,
    gamma: float,
    iterations: int,
    directions: int,
    every: int,
    seed: int,
    device: torch.device,
    recorder: Recorder,
) -> Diagnosis:
    """Set up a diagnosis on ``images`` stratified images of the training split."""
    chosen = choose(train.labels, images, seed=derive_seed(seed, "diagnose") % 2**31)
    pixels, labels = train.subset(chosen).tensors()
    return Diagnosis(
        pixels.to(device), labels.to(device), objective, gamma, iterations, directions, every, seed, recorder
    )
