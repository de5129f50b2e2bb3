"""The inner maximization of adversarial training: projected gradient ascent on the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.batching import rand
from s2ap_deploy.training.compilation import compiled
from s2ap_deploy.training.folding import folded
from s2ap_deploy.training.image_layer import ImageConv2d, reads_image

InputLoss = Callable[[Tensor], Tensor]


@contextmanager
def attacked(network: nn.Module, images: Tensor | None = None) -> Iterator[nn.Module]:
    """The network as an attacker sees it: eval mode, and no gradient for any parameter.

    Freezing the parameters keeps their gradients out of every backward pass of the attack, and eval
    mode keeps the attack's forward passes out of the BatchNorm statistics. On a CPU the layers that read
    the image compute their input's gradient in a cheaper way. With ``images`` [B, C, H, W], of which the
    network may see the first, BatchNorm is folded away: the same function up to rounding. All is put back.
    """
    modes = [(module, module.training) for module in network.modules()]
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    readers = [
        module for module in network.modules() if isinstance(module, nn.Conv2d) and reads_image(module)
    ]
    network.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    for layer in readers:
        layer.__class__ = ImageConv2d
    cheaper = folded(network, images) if images is not None and not compiled(network) else nullcontext()
    try:
        with cheaper:
            yield network
    finally:
        for layer in readers:
            layer.__class__ = nn.Conv2d
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


def project(moved: Tensor, center: Tensor, threat: ThreatModel) -> Tensor:
    """The point of the threat model's ball around ``center``, cut to [0, 1], that ``moved`` falls to.

    Both are [B, C, H, W]. For L2 the ball comes first and [0, 1] second: cutting a point towards the
    box that holds ``center`` never takes it further away.
    """
    radius = threat.radius
    if threat.norm == "Linf":
        return moved.clamp(center - radius, center + radius).clamp_(0.0, 1.0)
    return (center + confine(moved - center, threat)).clamp_(0.0, 1.0)


def confine(perturbation: Tensor, threat: ThreatModel) -> Tensor:
    """The point of the ball around 0 that ``perturbation`` [B, C, H, W] falls to, whatever the image."""
    if threat.norm == "Linf":
        return perturbation.clamp(-threat.radius, threat.radius)
    return perturbation * (threat.radius / lengths(perturbation)).clamp_max(1.0)


def ascend(point: Tensor, gradient: Tensor, step_size: float, threat: ThreatModel) -> Tensor:
    """``point`` after a step of steepest ascent: along the gradient's sign for L∞, its direction for L2.

    Both are [B, C, H, W]; ``step_size`` is a length in that norm, in units of the input (Madry et al., 2018,
    section 2.1). What is returned may lie outside of the ball: :func:`project` follows.
    """
    direction = gradient.sign() if threat.norm == "Linf" else gradient / lengths(gradient)
    return point + step_size * direction


def require_trainable(threat: ThreatModel) -> None:
    """Raise UsageError for a norm that the inner maximization has no step for."""
    if threat.norm == "L1":
        raise UsageError("training under an L1 threat model is not supported", hint="use Linf or L2")


def lengths(images: Tensor) -> Tensor:
    """L2 norm of each of [B, C, H, W], as [B, 1, 1, 1] and never 0, to divide by."""
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return norms.clamp_min(1e-12)


def random_start(images: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """A uniform point of the L∞ ball, or a uniform direction and radius for L2, cut to [0, 1].

    ``images`` and the point are [B, C, H, W] (Madry et al., 2018, section 2.1: the random start).
    """
    noise = rand(images.shape, generator, images.device) * 2 - 1
    if threat.norm == "Linf":
        return (images + noise * threat.radius).clamp_(0.0, 1.0)
    share = rand((len(images), 1, 1, 1), generator, images.device)
    return (images + noise / lengths(noise) * share * threat.radius).clamp_(0.0, 1.0)


def pgd(
    network: nn.Module,
    images: Tensor,
    loss: InputLoss,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    start: Tensor,
) -> Tensor:
    """Projected gradient ascent (Madry et al., 2018, section 2.1).

    ``images`` and ``start`` are [B, C, H, W] in [0, 1]; ``loss`` maps logits [B, K] to one number that is
    a *sum* over the batch, so that each image's gradient does not depend on its neighbors.
    ``step_size`` is in units of the input. Returns a detached [B, C, H, W].
    """
    require_trainable(threat)
    adversarial = start.detach().clone()
    with attacked(network, images):
        for _ in range(steps):
            adversarial.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(network(adversarial)), adversarial)
            with torch.no_grad():
                adversarial = project(ascend(adversarial, gradient, step_size, threat), images, threat)
    return adversarial.detach()
