"""Learnable importance scores, and the network under the mask that they imply.

The network is never wrapped: its own weight tensors hold w ⊙ M(s) while the scores are learned. Its
forward pass costs what a dense one costs, an attack needs no knowledge of masks, and the mask is
computed once per step however often the network runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from s2ap_deploy import plugins
from s2ap_deploy.errors import InputError, PluginError
from s2ap_deploy.pruning.allocation import Allocation
from s2ap_deploy.pruning.curvature import evaluating
from s2ap_deploy.pruning.granularity import Granularity
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.runtime import generator
from s2ap_deploy.training.objective import Objective

NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
GRADIENT_BATCHES = 10
AFFINE = "affine/"  # before the names of gradients that are not of scores

Batches = Iterable[tuple[Tensor, Tensor]]
Start = Callable[[Tensor, torch.Generator, Tensor | None], Tensor]
"""From one layer's units (weights, or norms of channels), a generator and dL/dM of the units to its scores.

The gradient is None unless the method's row says ``gradients``.
"""


def scaled(units: Tensor) -> Tensor:
    """Scale weights to s = sqrt(6 / fan_in) * w / max|w|: the order of |s| is the order of |w|.

    The start of HYDRA (Sehwag et al., 2020, section 3): the search begins with the magnitude mask, at the
    scale of a Kaiming-uniform layer. For scores of channels [C], fan_in is C.
    """
    fan_in = units[0].numel() if units.dim() > 1 else units.numel()
    tiny = torch.finfo(units.dtype).tiny
    return math.sqrt(6 / fan_in) * units / units.abs().max().clamp_min(tiny)


def random_scores(units: Tensor, stream: torch.Generator) -> Tensor:
    """Draw Kaiming-uniform scores with a = sqrt(5), the start of robust scratch tickets (Fu et al., 2021)."""
    fan_in = units[0].numel() if units.dim() > 1 else units.numel()
    noise = torch.rand(units.shape, generator=stream, device=stream.device) * 2 - 1
    return (noise / math.sqrt(fan_in)).to(units.device)


def snip(gradient: Tensor | None) -> Tensor:
    """Rank units by connection sensitivity |dL/dM| = |w · dL/dw| at M = 1 (Lee et al., 2019, eq. 4).

    The published method divides by the sum over all weights, which does not change the order.
    """
    assert gradient is not None
    return gradient.abs()


STARTS: Mapping[str, Start] = {
    "scaled": lambda units, stream, gradient: scaled(units),
    "weights": lambda units, stream, gradient: units,
    "random": lambda units, stream, gradient: random_scores(units, stream),
    "snip": lambda units, stream, gradient: snip(gradient),
}


def initial_scores(
    method: str, units: Mapping[str, Tensor], seed: int, gradients: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Compute the scores that ``method`` starts from.

    Args:
        units: signed magnitudes by layer (``Granularity.pool``).
        seed: for methods with random scores; every layer has its own stream.
        gradients: dL/dM by layer, for a method whose row says ``gradients``.

    Raises PluginError where a plug-in's function fails or returns something else than a score per unit.
    """
    begin = METHODS[method].scores
    scores = {}
    for name, unit in units.items():
        stream = generator(seed, "scores", name)
        gradient = None if gradients is None else gradients[name]
        if callable(begin):
            arguments = (unit.detach().clone(), stream, *(() if gradient is None else (gradient.clone(),)))
            scores[name] = _plugin_scores(begin, method, name, unit, arguments)
        else:
            scores[name] = STARTS[begin](unit, stream, gradient)
    return scores


def _plugin_scores(
    begin: Callable[..., Tensor], method: str, name: str, unit: Tensor, arguments: tuple[object, ...]
) -> Tensor:
    with plugins.blamed("methods", method) as plugin:
        found: object = begin(*arguments)
    if not isinstance(found, Tensor) or found.shape != unit.shape or not bool(found.isfinite().all()):
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise PluginError(
            f"{plugin} starts the scores of {name} from {what}, not from finite numbers {list(unit.shape)}",
            code="plugin-scores-invalid",
            hint="one score per weight (channels: per channel)",
        )
    return found.detach().to(unit)


def mask_gradients(
    network: nn.Module, granularity: Granularity, batches: Batches, objective: Objective, seed: int
) -> dict[str, Tensor]:
    """Average dL/dM = w · dL/dw of the robust loss, summed over each unit, at the weights as they are.

    ``batches`` of images [B, C, H, W] in [0, 1] and labels [B] are attacked in eval mode: BatchNorm keeps its
    statistics. Raises InputError where no image is given, or the loss does not depend on a layer.
    """
    weights = {name: network.get_parameter(name) for name in granularity.parameters}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    samples = 0
    with evaluating(network):
        for step, (images, labels) in enumerate(batches):
            # Attack the dense network, and add up the gradient of its robust loss over the samples.
            noise = generator(seed, "gradients", step, device=images.device)
            adversarial = objective.attack(network, images, labels, noise)
            with torch.enable_grad():
                loss, _ = objective.robust_loss(network, images, adversarial, labels)
            found = torch.autograd.grad(loss, tuple(weights.values()), allow_unused=True)
            for (name, summed), gradient in zip(total.items(), found, strict=True):
                if gradient is None:
                    raise InputError(
                        f"the loss does not depend on {name}: is the layer used?", code="layer-unused"
                    )
                summed += len(labels) * gradient.detach()
            samples += len(labels)
    if samples == 0:
        raise InputError("there is no sample to compute gradients on", code="samples-missing")
    products = {name: weights[name].detach() * summed / samples for name, summed in total.items()}
    return {name: value.float() for name, value in granularity.gather(products).items()}


@torch.no_grad()
def reinitialize(network: nn.Module, names: Sequence[str], stream: torch.Generator) -> None:
    """Reinitialize the weights ``names`` as ±gain / sqrt(fan_in), with signs drawn at random.

    Signed Kaiming constant with gain sqrt(2) (Ramanujan et al., 2020, as used by Fu et al., 2021). Biases
    become 0; normalization layers lose their scale, shift and statistics. ``stream`` is on the CPU, so that
    signs do not depend on the device.
    """
    for module in network.modules():
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            bias.zero_()
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        scale = getattr(module, "weight", None)
        if isinstance(module, NORMALIZATIONS) and scale is not None:
            scale.fill_(1.0)
    parameters = dict(network.named_parameters())
    for name in names:
        weight = parameters[name]
        size = math.sqrt(2 / weight[0].numel())
        signs = torch.randint(0, 2, weight.shape, generator=stream) * 2 - 1
        weight.copy_(signs.to(weight.device) * size)


Selection = Mapping[str, Tensor]


class ScoredNetwork:
    """Hold a network with frozen weights and one score per unit that can be pruned.

    ``granularity`` says what a unit is and ``allocation`` how many each layer keeps. Rows of the layers in
    ``covered`` (the classifier's classes) keep at least one weight each. The parameters ``affine`` learn with
    the scores, as BatchNorm's do in published code; other biases and normalization stay as they are, and
    BatchNorm statistics move with every pass in train mode. Scores are float32 whatever the network's
    precision; by default they are the scaled weights.
    """

    def __init__(
        self,
        network: nn.Module,
        granularity: Granularity,
        allocation: Allocation,
        scores: Mapping[str, Tensor] | None = None,
        covered: Sequence[str] = (),
        affine: Sequence[str] = (),
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
        self.affine = {name: parameters[name] for name in affine}
        for learning in (*self.masked.values(), *self.affine.values()):
            learning.requires_grad_(True)

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
            # Adding +0.0 turns -0.0, which a negative weight leaves, into +0.0: it compresses better.
            parameters[name].data.copy_(self.weights.get(name, parameters[name].data) * mask + 0.0)
        return masks

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer moves: the scores, what the allocation learns, and ``affine``."""
        return [*self.scores.values(), *self.allocation.parameters(), *self.affine.values()]

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Compute dL/ds by the straight-through estimator: sgn(s) · w ⊙ dL/d(w ⊙ M), summed over a unit.

        HYDRA (Sehwag et al., 2020, section 3).

        Pruned weights get a gradient too, or none could ever return. sgn(0) is +1: torch's derivative
        of |s| at 0 is 0, and a score that starts there would stay there. The gradients of ``affine`` come
        along, under names of their own.
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
            found = {name: self.signs[name] * gradient for name, gradient in gathered.items()}
            for name, parameter in self.affine.items():
                found[AFFINE + name] = (
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )
                parameter.grad = None
            return found

    def assign(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the gradients of the scores, and those that follow for the allocation."""
        for name, score in self.scores.items():
            score.grad = gradients[name]
        for name, parameter in self.affine.items():
            parameter.grad = gradients[AFFINE + name]
        self.allocation.assign({name: self.signs[name] * gradients[name] for name in self.scores})


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
