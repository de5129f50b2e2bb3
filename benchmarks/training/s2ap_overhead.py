"""Measure the cost of a search step with S2AP over one without: paired, interleaved, in one process.

    python -m benchmarks s2ap-overhead --steps 15

Random images and weights: time does not depend on them. The breakdown is of the step with S2AP.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.lib import arguments, networks, results
from s2ap_deploy.pruning.curvature import ScorePerturbation
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training import pgd
from s2ap_deploy.training.batchnorm import frozen_statistics
from s2ap_deploy.training.objective import Objective


class Stepper:
    """One search step on fixed images, with the seconds of each part."""

    def __init__(self, arch: str, loss: str, batch: int) -> None:
        network, size = networks.network(arch)
        self.scored = networks.scored(network, networks.quotas(network, size))
        self.optimizer = torch.optim.SGD(self.scored.parameters(), lr=1e-6, momentum=0.9)
        self.objective = Objective(ThreatModel(eps="8/255"), loss=loss)  # type: ignore[arg-type]
        self.images, self.labels = torch.rand(batch, *size), torch.randint(0, 10, (batch,))
        self.parts: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.parts[name] += time.perf_counter() - started

    def gradients(self, adversarial: Tensor) -> dict[str, Tensor]:
        loss, _ = self.objective.robust_loss(self.scored.network, self.images, adversarial, self.labels)
        return self.scored.gradients(loss)

    def step(self, gamma: float) -> float:
        """The body of ``pruning.search.search``'s loop; returns its seconds."""
        started = time.perf_counter()
        scored, network = self.scored, self.scored.network
        network.train()
        with self.part("mask"):
            scored.apply_mask(scored.select())
        with self.part("attack"):
            noise = torch.Generator().manual_seed(0)
            adversarial = self.objective.attack(network, self.images, self.labels, noise)
        with self.part("gradient at s"):
            gradients = self.gradients(adversarial)
        if gamma:
            with self.part("perturb, mask at s + z, restore"):
                ball = ScorePerturbation(scored.scores, gamma)
                ball.perturb(gradients)
                scored.apply_mask(scored.select())
            with self.part("gradient at s + z"), frozen_statistics(network):
                gradients = self.gradients(adversarial)
            with self.part("perturb, mask at s + z, restore"):
                ball.restore()
        with self.part("optimizer"):
            scored.assign(gradients)
            self.optimizer.step()
            scored.update_signs()
        return time.perf_counter() - started


@contextmanager
def keeping_parameter_gradients() -> Iterator[None]:
    """An attack as common code writes it: backward through everything, parameter gradients included."""

    def gradient(loss: Tensor, adversarial: Tensor) -> tuple[Tensor]:
        loss.backward()
        assert adversarial.grad is not None
        return (adversarial.grad,)

    @contextmanager
    def unfrozen(network: torch.nn.Module, images: Tensor | None = None) -> Iterator[torch.nn.Module]:
        training = network.training
        network.eval()
        yield network
        network.train(training)
        network.zero_grad()

    with mock.patch.object(pgd, "attacked", unfrozen), mock.patch("torch.autograd.grad", gradient):
        yield


def ratios(steps: int, arch: str, batch: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for loss in ("at", "trades"):
        stepper = Stepper(arch, loss, batch)
        for _ in range(2):
            stepper.step(0.0005)
        stepper.parts.clear()
        base, s2ap, kept = [], [], []
        for _ in range(steps):
            base.append(stepper.step(0.0))
            s2ap.append(stepper.step(0.0005))
            if loss == "at":
                with keeping_parameter_gradients():
                    kept.append(stepper.step(0.0))
        rows[loss] = {
            "ratio": statistics.median(b / a for a, b in zip(base, s2ap, strict=True)),
            "base_ms": 1e3 * statistics.median(base),
            "s2ap_ms": 1e3 * statistics.median(s2ap),
        }
        if kept:
            ratio = statistics.median(b / a for a, b in zip(kept, s2ap, strict=True))
            rows[loss]["ratio_to_base_with_parameter_gradients"] = ratio
        else:
            total = sum(s2ap) + sum(base)
            rows[loss]["share_of_both"] = {name: part / total for name, part in stepper.parts.items()}
    return rows


def main() -> None:
    parser = arguments.parser(__doc__, "s2ap-overhead", "threads")
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = {
        "threads": args.threads,
        "mnist-conv, batch 128": ratios(args.steps, "mnist-conv", 128),
        "cifar-resnet20, batch 64": ratios(args.steps, "cifar-resnet20", 64),
    }
    results.write(args.name, figures)
