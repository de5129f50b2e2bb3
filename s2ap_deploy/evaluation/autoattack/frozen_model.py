"""The network that is attacked and whose answers count: a frozen float32 copy, or an exported file."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s2ap_deploy.errors import CheckpointError, DataError
from s2ap_deploy.evaluation.autoattack import attacks
from s2ap_deploy.evaluation.autoattack.protocols import Version
from s2ap_deploy.spec import ThreatModel

TOLERANCE = 1e-6
"""Distance that rounding may move a point beyond eps, relative to max(1, eps)."""


class LogitsFn(Protocol):
    """An exported file as a function: float32 images [n, C, H, W] in [0, 1] to logits [n, K]."""

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]: ...


class FrozenModel(nn.Module):
    """A private copy of a classifier: eval mode, no parameter gradients, float32, contiguous, on ``device``.

    The caller's classifier is never touched. Raises CheckpointError as soon as a logit is not finite,
    on whatever input: NaN compares as "not adversarial" and would pass for robustness.
    """

    def __init__(self, classifier: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = copy.deepcopy(classifier).eval().requires_grad_(False).float().to(device)
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            tensor.data = tensor.data.contiguous()

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 [B, C, H, W] in [0, 1] to logits [B, K]."""
        return _usable(self.network(images), images)

    def decisive_logits(self, images: Tensor) -> Tensor:
        """Return the logits [B, K] by which a point is judged: here those that attacks follow."""
        logits: Tensor = self(images)
        return logits

    @property
    def black_box(self) -> nn.Module:
        """The network that an attack without gradients queries."""
        return self

    @property
    def precision_probe(self) -> nn.Module:
        """The network whose arithmetic shows whether gradients can be trusted."""
        return self.network

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int) -> Tensor:
        """Compute logits [n, K], returned on the CPU."""
        device = next(self.network.parameters(), images).device
        return torch.cat(
            [self.decisive_logits(batch.to(device)).cpu() for batch in torch.split(images, batch_size)]
        )

    @torch.no_grad()
    def confirm(
        self, clean: Tensor, attacked: Tensor, labels: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Judge the points that an attack returned.

        A point outside the threat model is moved back into it (into the box, then along the line to
        its clean image) before it is judged. Returns (broken [B] bool, points [B, C, H, W],
        predictions [B]); a broken point is finite, in [0, 1], within eps and misclassified.
        """
        points = attacked.detach().clamp(0.0, 1.0)
        usable = points.flatten(1).isfinite().all(dim=1)
        points = torch.where(_per_image(usable, points), points, clean)
        limit = threat.radius + TOLERANCE * max(1.0, threat.radius)
        distance = distances(clean, points, threat.norm)
        outside = distance > limit
        shrink = torch.where(outside, threat.radius / distance, torch.ones_like(distance)).to(points.dtype)
        inside = clean + (points - clean) * _per_image(shrink, points)
        points = torch.where(_per_image(outside, points), inside, points)
        predictions = self.decisive_logits(points).argmax(dim=1)
        valid = usable & (distances(clean, points, threat.norm) <= limit)
        return valid & (predictions != labels), points, predictions


class OnnxModel(FrozenModel):
    """An exported file under attack: gradients are those of ``twin``, answers are those of the file.

    ``twin`` computes the same function in torch; an attack without gradients queries the file.
    """

    def __init__(self, twin: nn.Module, answers: LogitsFn, device: torch.device) -> None:
        super().__init__(twin, device)
        self._answers = answers

    @torch.no_grad()
    def decisive_logits(self, images: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        return _usable(torch.from_numpy(self._answers(pixels)).to(images.device), images)

    @property
    def black_box(self) -> nn.Module:
        return BlackBox(self)

    @property
    def precision_probe(self) -> nn.Module:
        """The twin without rounding, which would change its answers with every change of arithmetic."""
        unrounded = getattr(self.network, "unrounded", None)
        network: nn.Module = self.network if unrounded is None else unrounded()
        return network


class BlackBox(nn.Module):
    """The file in the form of a network."""

    def __init__(self, judge: OnnxModel) -> None:
        super().__init__()
        self._judge = judge

    def forward(self, images: Tensor) -> Tensor:
        return self._judge.decisive_logits(images)


def _usable(logits: Tensor, images: Tensor) -> Tensor:
    """Return ``logits`` unchanged. Raises CheckpointError where an attack cannot work with them."""
    if logits.dim() != 2 or logits.shape[0] != images.shape[0] or logits.shape[1] < 2:
        raise CheckpointError(
            f"the classifier maps {list(images.shape)} to {list(logits.shape)}; "
            "an attack needs logits of shape [images, classes] with at least 2 classes",
            code="logits-shape-invalid",
        )
    # A sum is non-finite when any of its terms is, and costs far less than a mask of all of them.
    if not math.isfinite(logits.detach().sum(dtype=torch.float64).item()):
        raise CheckpointError(
            "the classifier returns logits that are not finite",
            code="logits-not-finite",
            hint="look for NaN or infinite weights with: s2ap-deploy inspect CHECKPOINT",
        )
    return logits


def distances(clean: Tensor, points: Tensor, norm: str) -> Tensor:
    """Compute the distance of each point from its clean image in ``norm``, float64 [B]."""
    difference = (points.double() - clean.double()).flatten(1)
    order = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}[norm]
    distance: Tensor = torch.linalg.vector_norm(difference, ord=order, dim=1)
    return distance


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Fix the order of summation and compute in full float32, whatever the process has set.

    On the CPU one thread (a sum then does not depend on how many workers share the machine), on CUDA no
    TF32 and deterministic convolutions. No autocast. Random streams are restored on exit.
    """
    threads = torch.get_num_threads()
    cuda = [device] if device.type == "cuda" else []
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with (
        torch.random.fork_rng(devices=cuda),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        if device.type == "cpu":
            torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.backends.cuda.matmul.allow_tf32 = tf32


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """[B] to a shape that broadcasts over [B, C, H, W]."""
    return values.reshape(-1, *[1] * (images.dim() - 1))


def checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Convert to contiguous float32 images and int64 labels on the CPU. Raises DataError."""
    images = images.detach().to("cpu", torch.float32).contiguous()
    labels = labels.detach().to("cpu", torch.int64)
    if images.dim() != 4 or labels.shape != images.shape[:1] or images.numel() == 0:
        raise DataError(
            f"an attack needs images [n, C, H, W] and labels [n] with n >= 1, "
            f"not {list(images.shape)} and {list(labels.shape)}",
            code="samples-shape-invalid",
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # false for NaN as well
        raise DataError(
            f"images must be within [0, 1], these reach from {low:g} to {high:g}",
            code="images-out-of-range",
            hint="normalization belongs in the classifier, not in the data",
        )
    if int(labels.min()) < 0:
        raise DataError(f"label {int(labels.min())} is negative", code="label-invalid")
    return images, labels


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise DataError for a label that a classifier of ``num_classes`` classes does not have."""
    if int(labels.max()) >= num_classes:
        raise DataError(
            f"label {int(labels.max())} does not exist for a classifier of {num_classes} classes",
            code="label-invalid",
        )


@dataclass(frozen=True)
class Unit:
    """One ``attack`` on the samples ``indices`` of block ``block``, with its own random stream.

    ``network`` is the position of the network among those that are attacked together.
    """

    block: int
    attack: str
    seed: int
    indices: tuple[int, ...]
    network: int = 0


@dataclass(frozen=True, eq=False)
class UnitResult:
    """The samples that a unit broke, with ``points`` [len(broken), C, H, W] float32 and ``predictions``.

    NumPy and plain values only, because results are sent between processes.
    """

    unit: Unit
    broken: tuple[int, ...]
    predictions: tuple[int, ...]
    points: npt.NDArray[np.float32]
    seconds: float
    zero_gradient: bool


@dataclass(frozen=True, eq=False)
class Attacker:
    """Runs units on one network. ``images`` [n, C, H, W] and ``labels`` [n] are on the CPU.

    ``fused`` computes the same function in less time (see ``robust.folding``): where it is given, attacks
    follow its gradients, and the judge alone decides which points are broken.
    """

    judge: FrozenModel
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    num_classes: int
    device: torch.device
    version: Version = "standard"
    fused: FrozenModel | None = None

    def _attacked(self, attack: str) -> nn.Module:
        network = self.judge.black_box if attack == "square" else self.judge
        return self.fused if network is self.judge and self.fused is not None else network

    def run(self, unit: Unit) -> UnitResult:
        """Attack the unit's samples from their clean images. Raises CheckpointError for non-finite logits."""
        started = time.monotonic()
        chosen = torch.tensor(unit.indices)
        clean = self.images[chosen].to(self.device)
        labels = self.labels[chosen].to(self.device)
        warnings = attacks.WarningCount()
        attack = attacks.build(
            unit.attack,
            self._attacked(unit.attack),
            self.threat,
            num_classes=self.num_classes,
            seed=unit.seed,
            device=self.device,
            warnings=warnings,
            version=self.version,
        )
        # A randomized network draws from the same stream, and is then the same for any number of workers.
        torch.manual_seed(unit.seed)
        attacked = attack.perturb(clean.clone(), labels.clone())
        broken, points, predictions = self.judge.confirm(clean, attacked, labels, self.threat)
        return UnitResult(
            unit=unit,
            broken=tuple(chosen[broken.cpu()].tolist()),
            predictions=tuple(predictions[broken].tolist()),
            points=points[broken].cpu().numpy(),
            seconds=time.monotonic() - started,
            zero_gradient=warnings.count > 0,
        )
