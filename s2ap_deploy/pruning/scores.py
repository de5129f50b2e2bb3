"""Learnable importance scores, and the network that wears the mask they imply.

The network is never wrapped: its own weight tensors hold w ⊙ M(s) while the scores are learned. Its
forward pass costs what a dense one costs, an attack needs no knowledge of masks, and the mask is
computed once per step however often the network runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import InputError
from s2ap_deploy.pruning.masks import Masks, top_k


def initial_scores(weight: Tensor) -> Tensor:
    """s = sqrt(6 / fan_in) * w / max|w|: the order of |s| is the order of |w|.

    Scaled initialisation of HYDRA (Sehwag et al., 2020, section 3): the search starts from the
    magnitude mask, at the scale of a Kaiming-uniform layer.
    """
    fan_in = weight[0].numel()
    return math.sqrt(6 / fan_in) * weight / weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)


class ScoredNetwork:
    """A network with frozen weights and one score per prunable weight.

    ``names`` are parameter names (see ``models.classifier.prunable``) and ``keep`` is the exact number
    of weights each keeps. Biases and normalisation stay as they are; BatchNorm statistics move with
    every pass in train mode. Scores are float32 whatever the network's precision.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        keep: Mapping[str, int],
        scores: Mapping[str, Tensor] | None = None,
    ) -> None:
        parameters = dict(network.named_parameters())
        self.network = network
        self.keep = dict(keep)
        self.worn = {name: parameters[name] for name in names}
        self.weights = {name: worn.detach().clone() for name, worn in self.worn.items()}
        self.scores = {
            name: (initial_scores(weight.float()) if scores is None else scores[name].float().clone())
            for name, weight in self.weights.items()
        }
        for name, score in self.scores.items():
            if score.shape != self.weights[name].shape:
                shapes = f"{tuple(score.shape)} for weights of shape {tuple(self.weights[name].shape)}"
                raise InputError(f"scores of {name} have shape {shapes}")
            if not torch.isfinite(score).all():
                raise InputError(f"scores of {name} are not finite")
        self.orient()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for worn in self.worn.values():
            worn.requires_grad_(True)

    @torch.no_grad()
    def orient(self) -> None:
        """Note the sign of every score, in whose direction importance grows; 0 counts as positive.

        Call it after each step. While a perturbation is on, the signs stay those of the scores at rest: a
        score that is pushed across 0 has lost its importance, and |s + z| would call it important
        again and turn its gradient around.
        """
        self.signs = {name: torch.where(score < 0, -1.0, 1.0) for name, score in self.scores.items()}

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """M(s): per layer the ``keep`` weights of largest importance, which is |s| at rest."""
        return {name: top_k(self.signs[name] * score, self.keep[name]) for name, score in self.scores.items()}

    @torch.no_grad()
    def wear(self, masks: Masks) -> None:
        """Set the network's weights to w ⊙ M."""
        for name, worn in self.worn.items():
            torch.mul(self.weights[name], masks[name], out=worn.data)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """dL/ds through the straight-through estimator: sgn(s) · w ⊙ dL/d(w ⊙ M).

        Pruned weights get a gradient too, or none could ever return. sgn(0) is +1: torch's derivative
        of |s| at 0 is 0, and a score that starts there would stay there.
        """
        torch.autograd.backward(loss)
        gradients = {}
        with torch.no_grad():
            for name, worn in self.worn.items():
                if worn.grad is None:
                    raise InputError(f"the loss does not depend on {name}: is the layer used?")
                gradients[name] = self.signs[name] * (self.weights[name] * worn.grad)
                worn.grad = None
        return gradients
