"""PGD: projected gradient ascent on the input, and accuracy under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy.data.splits import Split
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.batching import rand, row_stream
from s2ap_deploy.training.folding import ImageConv2d, folded, reads_image
from s2ap_deploy.training.precision import compiled

ATTACKED_AT_ONCE = 100  # images on a CPU: more leave its caches and take longer each

InputLoss = Callable[[Tensor], Tensor]


@contextmanager
def attacked(network: nn.Module, images: Tensor | None = None) -> Iterator[nn.Module]:
    """Switch the network to eval mode, without gradients for its parameters, as an attack sees it.

    Freezing the parameters keeps their gradients out of every backward pass of the attack, and eval
    mode keeps the attack's forward passes out of the BatchNorm statistics. On a CPU the layers that read
    the image compute their input's gradient in a cheaper way. With ``images`` [B, C, H, W], of which the
    network may see the first, BatchNorm is folded away: the same function up to rounding. All is restored.
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
    """Project ``moved`` on the threat model's ball around ``center``, cut to [0, 1].

    Both are [B, C, H, W]. For L2 the ball comes first and [0, 1] second: cutting a point towards the
    box that holds ``center`` never takes it further away.
    """
    radius = threat.radius
    if threat.norm == "Linf":
        return moved.clamp(center - radius, center + radius).clamp_(0.0, 1.0)
    return (center + confine(moved - center, threat)).clamp_(0.0, 1.0)


def confine(perturbation: Tensor, threat: ThreatModel) -> Tensor:
    """Project a perturbation [B, C, H, W] on the ball around 0, whatever the image."""
    if threat.norm == "Linf":
        return perturbation.clamp(-threat.radius, threat.radius)
    return perturbation * (threat.radius / lengths(perturbation)).clamp_max(1.0)


def ascend(point: Tensor, gradient: Tensor, step_size: float, threat: ThreatModel) -> Tensor:
    """Take a step of steepest ascent: along the gradient's sign for L∞, its direction for L2.

    Both are [B, C, H, W]; ``step_size`` is a length in that norm, in units of the input (Madry et al., 2018,
    section 2.1). The result may be outside the ball: :func:`project` follows.
    """
    direction = gradient.sign() if threat.norm == "Linf" else gradient / lengths(gradient)
    return point + step_size * direction


def require_trainable(threat: ThreatModel) -> None:
    """Raise UsageError for a norm that the inner maximization has no step for."""
    if threat.norm == "L1":
        raise UsageError(
            "training under an L1 threat model is not supported",
            code="norm-unsupported",
            hint="use Linf or L2",
        )


def lengths(images: Tensor) -> Tensor:
    """Return the L2 norm of each of [B, C, H, W], as [B, 1, 1, 1] and never 0, to divide by."""
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return norms.clamp_min(1e-12)


def random_start(images: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """Draw a uniform point of the L∞ ball, or a uniform direction and radius for L2, cut to [0, 1].

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
    """Maximize ``loss`` by projected gradient ascent (Madry et al., 2018, section 2.1).

    ``images`` and ``start`` are [B, C, H, W] in [0, 1]; ``loss`` maps logits [B, K] to one number that is
    a *sum* over the batch, so that each image's gradient does not depend on its neighbors.
    ``step_size`` is in units of the input. Returns a detached [B, C, H, W].
    """
    require_trainable(threat)
    adversarial = start.detach().clone()
    with attacked(network, images):
        # Ascend the loss from the start, and come back into the ball after every step.
        for _ in range(steps):
            adversarial.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(network(adversarial)), adversarial)
            with torch.no_grad():
                adversarial = project(ascend(adversarial, gradient, step_size, threat), images, threat)
    return adversarial.detach()


@dataclass(frozen=True)
class Accuracy:
    """Count, of ``n`` images, those classified correctly when clean, and also when attacked."""

    n: int
    clean: int
    robust: int

    @property
    def clean_accuracy(self) -> float:
        return self.clean / self.n

    @property
    def robust_accuracy(self) -> float:
        return self.robust / self.n


def pgd_accuracy(
    network: nn.Module,
    split: Split,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float | None = None,
    seed: int,
    device: torch.device,
    batch_size: int = 500,
    ranks: Ranks = SINGLE_PROCESS,
) -> Accuracy:
    """Measure accuracy on ``split``, clean and under PGD with ``steps`` steps from a random start.

    A quick upper bound that steers choices on validation images; robustness is reported by ``certify``.

    ``step_size`` is in units of the input and defaults to a quarter of eps. Each of ``ranks`` takes its rows
    of every batch, and all return the same counts.
    """
    step = threat.radius / 4 if step_size is None else step_size
    n = clean = robust = 0
    with attacked(network):
        shared = split.batches(batch_size, device, (ranks.rank, ranks.size))
        for batch, (images, labels) in enumerate(shared):
            whole = min(batch_size, len(split) - batch * batch_size)
            noise = generator(seed, "evaluate", batch, device=device)
            noise = row_stream(noise, n=whole, index=ranks.rank, of=ranks.size)
            with torch.no_grad():
                right = network(images).argmax(dim=1) == labels
            start = random_start(images, threat, noise)
            # Attack only what is classified correctly; starts do not depend on what that is.
            images, start, wanted = images[right], start[right], labels[right]
            n, clean = n + len(labels), clean + int(right.sum())
            at_once = ATTACKED_AT_ONCE if device.type == "cpu" else batch_size
            for part in torch.split(torch.arange(len(images), device=device), at_once):
                loss = partial(F.cross_entropy, target=wanted[part], reduction="sum")
                moved = pgd(
                    network, images[part], loss, threat=threat, steps=steps, step_size=step, start=start[part]
                )
                with torch.no_grad():
                    robust += int((network(moved).argmax(dim=1) == wanted[part]).sum())
    if ranks.size == 1:
        return Accuracy(n=n, clean=clean, robust=robust)
    counts = torch.tensor([n, clean, robust], device=device)
    ranks.sum_([counts])
    return Accuracy(*counts.tolist())
