"""Learnable importance scores, and the network under the mask that they imply.

The network is never wrapped: its own weight tensors hold w ⊙ M(s) while the scores are learned. Its
forward pass costs what a dense one costs, an attack needs no knowledge of masks, and the mask is
computed once per step however often the network runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import InputError
from s2ap_deploy.pruning.allocation import Allocation
from s2ap_deploy.pruning.granularity import Granularity
from s2ap_deploy.pruning.initial_scores import scaled

Selection = Mapping[str, Tensor]


class ScoredNetwork:
    """Hold a network with frozen weights and one score per unit that can be pruned.

    ``granularity`` says what a unit is and ``allocation`` how many each layer keeps. Rows of the layers in
    ``covered`` (the classifier's classes) keep at least one weight each. Biases and normalization stay as
    they are; BatchNorm statistics move with every pass in train mode. Scores are float32 whatever the
    network's precision; by default they are the scaled weights.
    """

    def __init__(
        self,
        network: nn.Module,
        granularity: Granularity,
        allocation: Allocation,
        scores: Mapping[str, Tensor] | None = None,
        covered: Sequence[str] = (),
    ) -> None:
        parameters = dict(network.named_parameters())
        self.network = network
        self.granularity = granularity
        self.allocation = allocation
        self.covered = frozenset(covered)
        self.masked = {name: parameters[name] for name in granularity.parameters}
        self.weights = {name: masked.detach().clone() for name, masked in self.masked.items()}
        units = granularity.pool(self.weights)
        self.start_from({name: scaled(unit) for name, unit in units.items()} if scores is None else scores)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for masked in self.masked.values():
            masked.requires_grad_(True)

    def start_from(self, scores: Mapping[str, Tensor]) -> None:
        """Take a copy of ``scores`` as those to learn. Raises InputError where they do not fit the units."""
        self.scores = own(scores, self.granularity.pool(self.weights))
        self.update_signs()

    @torch.no_grad()
    def update_signs(self) -> None:
        """Record the sign of every score, in whose direction importance grows; 0 counts as positive.

        Call it after each step. While a perturbation is on, the signs stay those of the scores at rest: a
        score that is pushed across 0 has lost its importance, and |s + z| would call it important
        again and turn its gradient around.
        """
        self.signs = {name: torch.where(score < 0, -1.0, 1.0) for name, score in self.scores.items()}

    @torch.no_grad()
    def select(self) -> dict[str, Tensor]:
        """Select the units of largest importance, |s| at rest: bool tensors of the scores' shapes."""
        importance = {name: self.signs[name] * score for name, score in self.scores.items()}
        for name in self.covered:
            importance[name] = keep_one_per_row(importance[name])
        return self.granularity.select(importance, self.allocation.counts(importance))

    @torch.no_grad()
    def apply_mask(self, selection: Selection) -> None:
        """Set the network's weights to w ⊙ M."""
        for name, mask in self.granularity.spread(selection).items():
            torch.mul(self.weights[name], mask, out=self.masked[name].data)

    def masks(self) -> dict[str, Tensor]:
        """Return the finished network's bool masks, by parameter name."""
        return self.granularity.final(self.select())

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Meet the budget exactly, apply the final masks to the weights, and return them."""
        self.allocation = self.allocation.final()
        masks = self.masks()
        parameters = dict(self.network.named_parameters())
        for name, mask in masks.items():
            parameters[name].data.copy_(self.weights.get(name, parameters[name].data) * mask)
        return masks

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer moves: the scores, and what the allocation learns."""
        return [*self.scores.values(), *self.allocation.parameters()]

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Compute dL/ds by the straight-through estimator: sgn(s) · w ⊙ dL/d(w ⊙ M), summed over a unit.

        HYDRA (Sehwag et al., 2020, section 3).

        Pruned weights get a gradient too, or none could ever return. sgn(0) is +1: torch's derivative
        of |s| at 0 is 0, and a score that starts there would stay there.
        """
        torch.autograd.backward(loss)
        products = {}
        with torch.no_grad():
            for name, masked in self.masked.items():
                if masked.grad is None:
                    raise InputError(
                        f"the loss does not depend on {name}: is the layer used?", code="layer-unused"
                    )
                products[name] = self.weights[name] * masked.grad
                masked.grad = None
            gathered = self.granularity.gather(products)
            return {name: self.signs[name] * gradient for name, gradient in gathered.items()}

    def assign(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the gradients of the scores, and those that follow for the allocation."""
        for name, score in self.scores.items():
            score.grad = gradients[name]
        self.allocation.assign({name: self.signs[name] * value for name, value in gradients.items()})


def keep_one_per_row(importance: Tensor) -> Tensor:
    """Raise the largest entry of every row of ``importance`` [rows, ...] above all others."""
    flat = importance.flatten(1)
    best = flat.argmax(dim=1, keepdim=True)
    return flat.scatter(1, best, torch.inf).view_as(importance)


def own(scores: Mapping[str, Tensor], units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy ``scores`` as float32. Raises InputError where they do not fit ``units``."""
    for name, unit in units.items():
        if name not in scores:
            raise InputError(f"there are no scores of {name}", code="scores-missing")
        if scores[name].shape != unit.shape:
            shapes = f"{tuple(scores[name].shape)} for weights of shape {tuple(unit.shape)}"
            raise InputError(f"scores of {name} have shape {shapes}", code="scores-shape-differs")
        if not torch.isfinite(scores[name]).all():
            raise InputError(f"scores of {name} are not finite", code="scores-not-finite")
    return {name: scores[name].to(unit.device).float().clone() for name, unit in units.items()}
