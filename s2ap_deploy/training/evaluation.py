"""Clean accuracy and accuracy under PGD: the quick figures that training looks at.

They steer choices on the validation split. What a user is told about robustness comes from
``certify``, on the test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from s2ap_deploy.data.splits import Split
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.batching import part_stream
from s2ap_deploy.training.pgd import attacked, pgd, random_start

_AT_ONCE = 100  # images attacked together on a CPU: more leave its caches and take longer each


@dataclass(frozen=True)
class Accuracy:
    """Counts on ``n`` images: right on the clean image, right on it and on the attacked one."""

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
    """Accuracy of ``network`` on ``split``, clean and under PGD with ``steps`` steps from a random start.

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
            noise = part_stream(noise, n=whole, index=ranks.rank, of=ranks.size)
            with torch.no_grad():
                right = network(images).argmax(dim=1) == labels
            start = random_start(images, threat, noise)
            # What is wrong already needs no attack; what is right is attacked from the same start as ever.
            images, start, wanted = images[right], start[right], labels[right]
            n, clean = n + len(labels), clean + int(right.sum())
            at_once = _AT_ONCE if device.type == "cpu" else batch_size
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
