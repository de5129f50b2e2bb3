"""The scores that a base method starts from, one function per row of ``recipe.methods``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from s2ap_deploy import plugins
from s2ap_deploy.errors import InputError, PluginError
from s2ap_deploy.pruning.curvature import evaluating
from s2ap_deploy.pruning.granularity import Granularity
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.runtime import generator
from s2ap_deploy.training.objective import Objective

NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
GRADIENT_BATCHES = 10

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
        seed: of the methods that draw; every layer has a stream of its own.
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
