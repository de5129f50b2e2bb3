"""Choose samples stratified by class, and hold a validation set out of training."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from s2ap_deploy.errors import UsageError
from s2ap_deploy.runtime import derive_seed


def choose(labels: Tensor | Sequence[int] | int, n: int | None, *, seed: int | None) -> list[int]:
    """Return the positions of ``n`` samples, ascending.

    Without a seed these are the first ``n``. With one, each class gets its share of ``n`` rounded by largest
    remainder (equal remainders in random order), and the samples within a class are drawn at random. The
    choice depends on labels, n and seed alone, not on the machine or library versions.

    Args:
        labels: one class per sample; a plain number means that many samples of unknown class.
        n: None, or at least the number of samples, takes all of them.

    Raises:
        UsageError: when ``n`` is below 1.
    """
    classes = _classes(labels)
    if n is not None and n < 1:
        raise UsageError(
            f"cannot choose {n} samples",
            code="sample-count-out-of-range",
            hint="give a number of at least 1",
        )
    if n is None or n >= len(classes):
        return list(range(len(classes)))
    if seed is None:
        return list(range(n))

    # Only random() is documented to repeat across Python versions; shuffle() and sample() are not.
    lot = random.Random(derive_seed("choose", seed))
    drawn = [lot.random() for _ in classes]
    members: dict[int, list[int]] = defaultdict(list)
    for position in sorted(range(len(classes)), key=drawn.__getitem__):
        members[classes[position]].append(position)

    # Integers throughout: a share of n * size / total has the remainder (n * size) % total.
    total = len(classes)
    shares = {label: n * len(members[label]) // total for label in sorted(members)}
    ties = {label: lot.random() for label in shares}
    by_remainder = sorted(shares, key=lambda label: (-(n * len(members[label]) % total), ties[label]))
    for label in by_remainder[: n - sum(shares.values())]:
        shares[label] += 1
    return sorted(position for label, share in shares.items() for position in members[label][:share])


def hold_out(labels: Tensor | Sequence[int], fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Split positions into (kept, held out): disjoint, stratified by class, both ascending and not empty.

    Raises:
        UsageError: unless 0 < ``fraction`` < 1 and there are at least two samples.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"the validation fraction must be between 0 and 1, not {fraction}",
            code="validation-fraction-out-of-range",
            hint="0.1 is the default",
        )
    if len(labels) < 2:
        raise UsageError(
            f"cannot hold a validation set out of {len(labels)} sample(s)", code="training-set-too-small"
        )
    n = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    held = choose(labels, n, seed=derive_seed("validation", seed))
    taken = set(held)
    return [position for position in range(len(labels)) if position not in taken], held


def _classes(labels: Tensor | Sequence[int] | int) -> Sequence[int]:
    if isinstance(labels, int):
        return [0] * labels
    return labels.tolist() if isinstance(labels, Tensor) else labels
