"""Robust objectives, each a loss with the attack that belongs to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ap_deploy import plugins
from s2ap_deploy.errors import InputError, PluginError, UsageError
from s2ap_deploy.recipe.methods import OWN_LOSSES
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.batching import randn
from s2ap_deploy.training.pgd import attacked, pgd, random_start

Value = Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
Ascent = Callable[[Tensor, Tensor], Tensor]


def divergence(target: Tensor, logits: Tensor, reduction: str) -> Tensor:
    """Compute KL(target ‖ softmax(logits)) in nats, for probabilities and logits [B, K]."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction=reduction)


def trades(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Compute the TRADES loss CE(x, y) + ``beta`` KL(p(x) ‖ p(x')), neither side detached; the batch mean.

    Zhang et al. (2019), eq. 5.
    """
    # A probability that underflows to 0 would send NaN back through its logarithm.
    target = clean.softmax(dim=1).clamp_min(torch.finfo(clean.dtype).tiny)
    robust = divergence(target, adversarial, reduction="batchmean")
    return F.cross_entropy(clean, labels) + beta * robust


def mart(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Compute the MART loss BCE(x', y) + ``beta`` KL(p(x) ‖ p(x')) (1 - p_y(x)); the batch mean.

    Neither side is detached. Misclassification-aware adversarial training (Wang et al., ICLR 2020): images
    that are already wrong, or nearly so, weigh more in the second term.
    """
    log_clean = F.log_softmax(clean, dim=1)
    log_moved = F.log_softmax(adversarial, dim=1)
    # Not F.kl_div on probabilities: its gradient is NaN where one of them underflows to 0.
    per_image = (log_clean.exp() * (log_clean - log_moved)).sum(dim=1)
    doubt = 1 - log_clean.gather(1, labels[:, None]).squeeze(1).exp()
    return boosted_cross_entropy(adversarial, labels) + beta * (per_image * doubt).mean()


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log p_y - log(1 - max_{k≠y} p_k), the batch mean (Wang et al., ICLR 2020: BCE).

    The second term is a margin: it also pushes the likeliest wrong class down. Needs K >= 2.
    """
    log_p = F.log_softmax(logits, dim=1)
    label = F.one_hot(labels, logits.shape[1]).bool()
    rival = log_p.masked_fill(label, -torch.inf).argmax(dim=1)
    # log(1 - p_rival) as the sum over all other classes: 1 - p itself rounds to 0 for a sure mistake.
    others = log_p.masked_fill(F.one_hot(rival, logits.shape[1]).bool(), -torch.inf)
    return F.nll_loss(log_p, labels) - others.logsumexp(dim=1).mean()


@dataclass(frozen=True)
class RobustLoss:
    """Define a loss of a plug-in, on the adversarial images of PGD from a random start.

    ``value(clean, adversarial, labels, beta)`` is the batch mean of the loss (a scalar) for logits [B, K]
    and labels int64 [B]; ``clean`` is None unless ``needs_clean_logits``. ``beta`` is the weight where a
    recipe gives none. ``ascent(logits, labels)`` is what the attack maximizes, a sum over the batch; None is
    cross-entropy.
    """

    value: Value
    needs_clean_logits: bool = False
    beta: float = 0.0
    ascent: Ascent | None = None


@dataclass(frozen=True)
class PluginLoss:
    """Call a plug-in's loss under the name of the recipe; its errors name its distribution."""

    name: str
    loss: RobustLoss

    def value(self, clean: Tensor | None, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
        """Return the batch mean. Raises PluginError when the plug-in fails or returns something else."""
        with plugins.blamed("losses", self.name):
            found: object = self.loss.value(clean, adversarial, labels, beta)
        return self._scalar(found)

    def ascent(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what the attack maximizes, as a function of logits. Raises as :meth:`value`."""
        ascent = self.loss.ascent
        if ascent is None:
            return partial(F.cross_entropy, target=labels, reduction="sum")

        def total(logits: Tensor) -> Tensor:
            with plugins.blamed("losses", self.name):
                found: object = ascent(logits, labels)
            return self._scalar(found)

        return total

    def _scalar(self, found: object) -> Tensor:
        if not isinstance(found, Tensor) or found.dim() != 0 or not found.is_floating_point():
            what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            plugin = plugins.find("losses", self.name) or self.name
            raise PluginError(
                f"{plugin} gives {what}, not one number with a gradient",
                code="plugin-loss-not-scalar",
                hint="value is a mean over the batch, ascent a sum",
            )
        return found


def find_plugin_loss(name: str) -> PluginLoss:
    """Load a plug-in's loss. Raises UsageError for an unknown name, PluginError when it cannot be used."""
    if plugins.find("losses", name) is None:
        known = ", ".join((*OWN_LOSSES, *plugins.names("losses")))
        raise UsageError(f"there is no robust loss {name!r}", code="loss-unknown", hint=f"there are {known}")
    return PluginLoss(name, plugins.load("losses", name, RobustLoss))


PGD_STEPS = 10
BETA = {"trades": 6.0, "mart": 5.0}


@dataclass(frozen=True)
class Objective:
    """Define a robust loss under one threat model, with its attack.

    ``at``: PGD adversarial training (Madry et al., 2018). ``trades``: Zhang et al. (2019). ``mart``:
    Wang et al. (2020), on the examples of ``at``. ``fast``: one step from a uniform start (Wong et al.,
    2020). ``free``: the perturbation follows the gradient of training itself (Shafahi et al., 2019), which
    takes an ``Adversary`` and ``replays`` updates per batch; other losses ignore ``replays``. ``natural``:
    cross-entropy on clean images, without an attack. Any other name is that of a plug-in (see
    ``training.losses``), on the examples of ``at``.

    ``attack_steps`` is None for 10; ``fast``, ``free`` and ``natural`` have no such number and refuse one.
    ``step_size`` is the exact text of the attack's step in units of the input, or None for the loss's own:
    a quarter of eps (2/255 at 8/255, the setting of HYDRA and HARP), 1.25 eps for ``fast``, eps for ``free``.
    ``beta`` weighs the divergence of ``trades`` (None: 6) and ``mart`` (None: 5); the others ignore it.
    ``start`` of the attack is a uniform point of the ball, or the image plus Gaussian noise of deviation
    0.001, cut to [0, 1] or not; None is uniform, for ``trades`` gaussian.
    """

    threat: ThreatModel
    loss: str = "at"
    attack_steps: int | None = None
    step_size: str | None = None
    beta: float | None = None
    replays: int = 4
    start: Literal["uniform", "gaussian", "gaussian-unclamped"] | None = None

    def __post_init__(self) -> None:
        if self.loss in ("fast", "free", "natural") and self.attack_steps is not None:
            raise UsageError(
                f"loss {self.loss} has no attack_steps, but they are set to {self.attack_steps}",
                code="attack-steps-unused",
                hint="leave attack_steps out, or choose loss at",
            )
        if self.replays < 1:
            raise UsageError(f"replays must be at least 1, not {self.replays}", code="replays-too-few")
        _ = self.plugin  # an unknown name is an error now, not in the first step

    @cached_property
    def plugin(self) -> PluginLoss | None:
        """The loss of a plug-in, or None for one of our own. Raises UsageError for an unknown name."""
        return None if self.loss in OWN_LOSSES else find_plugin_loss(self.loss)

    @property
    def step(self) -> float:
        """Length of one step of the attack, in units of the input."""
        if self.step_size is not None:
            return float(Fraction(self.step_size))
        if self.loss == "fast":
            return 1.25 * self.threat.radius
        return self.threat.radius if self.loss == "free" else self.threat.radius / 4

    @property
    def steps(self) -> int:
        """Gradient steps of :meth:`attack`."""
        if self.loss == "fast":
            return 1
        if self.loss == "free":
            return self.replays
        if self.loss == "natural":
            return 0
        return PGD_STEPS if self.attack_steps is None else self.attack_steps

    @property
    def needs_clean_logits(self) -> bool:
        """Whether the loss needs the logits on clean images in addition to those on adversarial ones."""
        if self.plugin is not None:
            return self.plugin.loss.needs_clean_logits
        return self.loss in ("trades", "mart")

    @property
    def trade_off(self) -> float:
        """The weight of the divergence: ``beta``, or the published one of this loss."""
        if self.beta is not None:
            return self.beta
        return BETA.get(self.loss, 0.0) if self.plugin is None else self.plugin.loss.beta

    def attack(
        self, network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Make adversarial images for one batch [B, C, H, W], with ``network`` in eval mode.

        For TRADES the clean prediction does not move during the attack, so it is computed once. ``free``
        has no attack of its own: outside a loop (when BatchNorm is recalibrated) this returns the effect of
        its perturbation on one batch with frozen weights, without a random start.
        """
        if self.loss == "natural":
            return images
        loss: Callable[[Tensor], Tensor] = partial(F.cross_entropy, target=labels, reduction="sum")
        if self.plugin is not None:
            loss = self.plugin.ascent(labels)
        start = images if self.loss == "free" else self._start(images, generator)
        if self.loss == "trades":
            with torch.no_grad(), attacked(network, images):
                clean = network(images).softmax(dim=1)
            loss = partial(divergence, clean, reduction="sum")
        return pgd(
            network,
            images,
            loss,
            threat=self.threat,
            steps=self.steps,
            step_size=self.step,
            start=start,
        )

    def _start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the point at which the attack starts, for images [B, C, H, W]."""
        if (self.start or ("gaussian" if self.loss == "trades" else "uniform")) == "uniform":
            return random_start(images, self.threat, generator)
        # TRADES starts a hair away from the image: at the image itself its loss has gradient 0.
        start = images + 0.001 * randn(images.shape, generator, images.device)
        return start if self.start == "gaussian-unclamped" else start.clamp_(0.0, 1.0)

    def robust_loss(
        self, network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the batch mean of the loss, and the logits [B, K] on the adversarial images.

        Clean and adversarial images are two forward passes, as in the published code of TRADES, because
        BatchNorm would mix their statistics in one.
        """
        clean = network(images) if self.needs_clean_logits else None
        logits = network(adversarial)
        return self.value(clean, logits, labels), logits

    def value(self, clean: Tensor | None, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Compute the batch mean of the loss for logits [B, K]; ``clean`` may be None where it is not needed.

        ``at``, ``fast``, ``free``: cross-entropy on the adversarial images (Madry et al., 2018, eq. 2.1).
        ``natural`` has clean images in their place.
        Raises PluginError where a plug-in's loss fails.
        """
        if self.plugin is not None:
            return self.plugin.value(clean, adversarial, labels, self.trade_off)
        if not self.needs_clean_logits:
            return F.cross_entropy(adversarial, labels)
        assert clean is not None
        loss = trades if self.loss == "trades" else mart
        return loss(clean, adversarial, labels, self.trade_off)


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


DISTILLATION, TEMPERATURE = 10.0, 30.0
LAMBDA_INPUT, LAMBDA_LABEL = 2e-4, 5e-5
SIGMA = 5.0
_RIDGE = 1e-5


class SelfDistillation(Teacher):
    """Train without adversarial images: distill a robust network, and regularize hidden layers by HSIC.

    PwoA (Jian et al., 2022, arXiv 2210.04311): α T² KL(t(x) ‖ s(x)) + Σ_l (λ_x HSIC(x, z_l) −
    λ_y HSIC(y, z_l)) over the outputs z_l of ``layers`` (names of their weights), with the published code's
    settings for MNIST: α 10, T 30, λ_x 2e-4, λ_y 5e-5, σ 5, a linear kernel for labels.
    ``penalty`` is added where set.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(network, weight=1.0, temperature=TEMPERATURE)
        self.layers = {name.rpartition(".")[0] for name in layers}
        self.penalty: Callable[[], Tensor] | None = None

    def loss(
        self, objective: Objective, student: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> Tensor:
        """Compute the loss on clean images [B, C, H, W]; a batch mean."""
        with self.outputs(student) as hidden:
            logits = student(images)
        total = DISTILLATION * self.temperature**2 * self.distance(images, logits)
        inputs = kernel(images)
        classes = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        targets = classes @ classes.T
        for output in hidden:
            layer = kernel(output)
            total = total + LAMBDA_INPUT * hsic(inputs, layer) - LAMBDA_LABEL * hsic(targets, layer)
        return total if self.penalty is None else total + self.penalty()

    @contextmanager
    def outputs(self, network: nn.Module) -> Iterator[list[Tensor]]:
        """Collect the outputs of the layers in forward passes inside."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                found.append(output)

        hooks = [m.register_forward_hook(keep) for name, m in network.named_modules() if name in self.layers]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def kernel(samples: Tensor) -> Tensor:
    """Return the Gaussian kernel [B, B] of samples [B, ...], exp(−‖a − b‖² / (2 σ² d)) in d dimensions."""
    flat = samples.flatten(1).float()
    squares = flat.square().sum(dim=1)
    distances = (squares[:, None] + squares - 2 * flat @ flat.T).clamp_min(0.0)
    return torch.exp(-distances / (2 * SIGMA**2 * flat.shape[1]))


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """Compute the normalized Hilbert-Schmidt independence criterion of two kernels [B, B].

    tr(R_a R_b) with R = K (K + ε B I)⁻¹ of the centered kernel K (Ma et al., 2020, arXiv 1908.01580): near 0
    for independent samples, larger the more they depend on each other.
    """
    return (_normalized(first) * _normalized(second).T).sum()


def _normalized(matrix: Tensor) -> Tensor:
    n = len(matrix)
    centered = matrix - matrix.mean(dim=0, keepdim=True)
    centered = centered - centered.mean(dim=1, keepdim=True)
    ridge = _RIDGE * n * torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    solved: Tensor = torch.linalg.solve(centered + ridge, centered)
    return solved
