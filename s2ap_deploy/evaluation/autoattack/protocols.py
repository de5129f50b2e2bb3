"""The protocols of AutoAttack: which attacks run, in which order, with which parameters.

``standard``, ``plus`` and ``rand`` are AutoAttack's versions: Croce and Hein, ICML 2020 (arXiv 2003.01690),
for L1 Croce and Hein, ICML 2021 (2103.01208). With 2 and 3 classes AutoAttack is not defined; what runs
there instead is labeled as adapted. ``quick`` is a short sweep of this package and not AutoAttack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Version = Literal["standard", "plus", "rand", "quick"]
VERSIONS: tuple[Version, ...] = get_args(Version)

ITERATIONS = {
    "apgd-ce": 100,
    "apgd-dlr": 100,
    "apgd-t": 100,
    "apgd-margin": 100,
    "fab": 100,
    "fab-t": 100,
    "square": 5000,
}
QUICK_ITERATIONS = 20

_MAX_TARGETS = 9
_MAX_TARGETS_L1 = 5  # APGD-T of the standard version against L1; FAB-T keeps nine
_QUICK_TARGETS = 3
_RESTARTS_L1 = 5  # APGD-CE of the standard version against L1
_RESTARTS_PLUS = 5  # untargeted attacks of the plus version
_EOT = 20  # passes over which rand averages a gradient
_TARGETED_DLR_LOGITS, _DLR_LOGITS = 4, 3  # how many of the largest logits each DLR loss reads

_ORDER: dict[Version, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "quick": ("apgd-ce", "apgd-t"),
}
_SQUARE_SHARE = 0.002  # AutoAttack's own alarm: Square lowers robust accuracy by more than 0.2 points
_LABELS: dict[Version, tuple[str, str]] = {
    "standard": ("standard", "aa-adapted"),
    "plus": ("plus", "plus-adapted"),
    "rand": ("rand", "rand-adapted"),
    "quick": ("quick", "quick-adapted"),
}


@dataclass(frozen=True)
class Step:
    """One attack of a protocol.

    ``targets`` is how many other classes it tries for each image (1: untargeted), ``restarts`` how often it
    starts from another random point, ``eot`` how many passes make a gradient, ``wide_start`` whether APGD
    comes from larger radii (its schedule for L1).
    """

    name: str
    iterations: int
    targets: int = 1
    restarts: int = 1
    eot: int = 1
    wide_start: bool = False

    def forward_equivalents(self, num_classes: int) -> int:
        """Return the cost for one unbroken image in forward passes (a backward pass counts as 2)."""
        per_iteration = {"square": 1, "fab": 2 + 2 * num_classes, "fab-t": 4}.get(self.name, 3 * self.eot)
        return self.iterations * per_iteration * self.targets * self.restarts


def steps(version: Version, norm: str, num_classes: int) -> tuple[Step, ...]:
    """List the attacks of ``version`` in order; each sees only samples that the ones before did not break."""
    return tuple(_step(name, version, norm, num_classes) for name in names(version, num_classes))


def step(name: str, version: Version, norm: str, num_classes: int) -> Step:
    """Return the attack ``name`` with its parameters in ``version``. Raises KeyError for another attack."""
    return {each.name: each for each in steps(version, norm, num_classes)}[name]


def names(version: Version, num_classes: int) -> tuple[str, ...]:
    """List the names of the attacks in order.

    With 2 and 3 classes the plain margin takes the place of a DLR loss that does not exist.
    """
    adapted = [_replacement(name, num_classes) for name in _ORDER[version]]
    return tuple(dict.fromkeys(adapted))


def label(version: Version, num_classes: int) -> str:
    """Return the name of the protocol in a certificate: the version, marked where it was adapted."""
    plain, adapted = _LABELS[version]
    return plain if names(version, num_classes) == _ORDER[version] else adapted


def version(label: str) -> Version:
    """Return the version for a protocol's name in a certificate. Raises KeyError for any other text."""
    return {name: version for version, names in _LABELS.items() for name in names}[label]


def is_adapted(label: str) -> bool:
    """Return whether the protocol's name in a certificate is that of an adapted one."""
    return label in {adapted for _, adapted in _LABELS.values()}


def square_improves(broken: int, n: int) -> bool:
    """Return whether Square broke so many of ``n`` samples that gradients may be masked."""
    # One sample is no evidence about gradients, even where it is more than 0.2 points.
    return broken > max(1.0, _SQUARE_SHARE * n)


def _replacement(name: str, num_classes: int) -> str:
    needed = {"apgd-t": _TARGETED_DLR_LOGITS, "apgd-dlr": _DLR_LOGITS}.get(name, 0)
    return name if num_classes >= needed else "apgd-margin"


def _step(name: str, version: Version, norm: str, num_classes: int) -> Step:
    targeted = name in ("apgd-t", "apgd-margin", "fab-t")
    most = _MAX_TARGETS
    if version == "quick":
        most = _QUICK_TARGETS
    elif version == "standard" and norm == "L1" and name != "fab-t":
        most = _MAX_TARGETS_L1
    restarts = 1
    if version == "plus" and name in ("apgd-ce", "apgd-dlr", "fab"):
        restarts = _RESTARTS_PLUS
    elif version == "standard" and norm == "L1" and name == "apgd-ce":
        restarts = _RESTARTS_L1
    return Step(
        name=name,
        iterations=min(QUICK_ITERATIONS, ITERATIONS[name]) if version == "quick" else ITERATIONS[name],
        targets=min(most, num_classes - 1) if targeted else 1,
        restarts=restarts,
        eot=_EOT if version == "rand" else 1,
        # The package widens the start for L1 in its standard version only; quick follows that one.
        wide_start=norm == "L1" and version in ("standard", "quick") and name.startswith("apgd"),
    )
