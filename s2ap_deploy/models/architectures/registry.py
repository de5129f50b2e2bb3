"""The networks that a name stands for, and the search for the one that a checkpoint fits.

Names are our own families (``cifar-resnet18``), items that installed packages offer under the entry-point
group ``s2ap_deploy.architectures``, and torchvision's classifiers (``torchvision/resnet50``).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import (
    imagenet,
    imported,
    in_memory,
    preact_resnet,
    resnet,
    small,
    vgg,
    wide_resnet,
)
from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.models.checkpoints.state_dict_spec import (
    Difference,
    StateDictSpec,
    compare,
    could_fit,
    learnable_values,
    registered_skeleton,
    skeleton_of,
)

ENTRY_POINTS = "s2ap_deploy.architectures"
ADVICE = "give it as --arch NAME, --arch package.module:factory or --arch file.py:factory"
Match = Difference
"""A difference that is ``exact``: ``.architecture``, ``.num_classes`` and what was left aside."""

_OWN: dict[str, Architecture] = {
    entry.name: entry
    for family in (small, resnet, preact_resnet, vgg, wide_resnet)
    for entry in family.ARCHITECTURES
}


class _Registry(Mapping[str, Architecture]):
    """Looks torchvision up only for a name that asks for it, or when everything is listed."""

    def __getitem__(self, name: str) -> Architecture:
        if name in _OWN:
            return _OWN[name]
        if name.startswith(imagenet.PREFIX):
            return imagenet.architectures()[name]
        if name.startswith(in_memory.PREFIX):
            return in_memory.architectures()[name]
        return _installed()[name]

    def __iter__(self) -> Iterator[str]:
        yield from _OWN
        yield from _installed()
        yield from imagenet.architectures()

    def __len__(self) -> int:
        return sum(1 for _ in self)


ARCHITECTURES: Mapping[str, Architecture] = _Registry()


def names() -> tuple[str, ...]:
    """Every name; imports torchvision."""
    return tuple(ARCHITECTURES)


def is_import_path(reference: str) -> bool:
    """True for ``package.module:factory`` and ``path/file.py:factory``, which run the user's code."""
    return imported.is_import_path(reference)


def resolve(reference: str) -> Architecture:
    """The architecture of a registered name or, for the command line, of an import path.

    Raises ArchitectureError with the nearest names when there is none.
    """
    if is_import_path(reference):
        return imported.architecture(reference)
    try:
        return ARCHITECTURES[reference]
    except KeyError:
        pass
    if reference.startswith(in_memory.PREFIX):
        raise ArchitectureError(
            f"{reference} was a network of the Python program that made this, and is not known here",
            hint="give the network again from Python (model=network), or --arch package.module:factory",
        )
    known = names()
    # "resnet50" is nearer to "torchvision/resnet50" than spelling alone tells.
    near = [name for name in known if name.endswith(("/" + reference, "-" + reference))]
    near += [
        name for name in difflib.get_close_matches(reference, known, n=3, cutoff=0.5) if name not in near
    ]
    hint = (
        f"did you mean {' or '.join(near[:3])}?"
        if near
        else f"known: {', '.join(_OWN)}, {imagenet.PREFIX}..."
    )
    raise ArchitectureError(f"no architecture is called {reference!r}", hint=hint)


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """The network of a registered name, freshly initialized, without normalization.

    Import paths are refused: a recipe may call this.  Raises ArchitectureError.
    """
    if is_import_path(name):
        raise ArchitectureError(
            f"{name!r} is an import path, and those run code",
            hint="pass it on the command line with --arch; a recipe names registered architectures",
        )
    architecture = resolve(name)
    if num_classes is not None and num_classes < 2:
        raise ArchitectureError(
            f"{name} cannot be built for {num_classes} classes; a classifier has at least 2"
        )
    return architecture.build(architecture.num_classes if num_classes is None else num_classes)


def skeleton(architecture: Architecture) -> StateDictSpec:
    """Names and shapes of ``architecture``: cheap for ours and torchvision's, built for foreign code."""
    if architecture.name in _OWN or architecture.name.startswith(imagenet.PREFIX):
        return registered_skeleton(architecture)
    return skeleton_of(architecture.build, architecture.num_classes)


def match(tensors: Mapping[str, Tensor]) -> Match:
    """The one architecture whose names and shapes are exactly those of ``tensors``, at any number of classes.

    Raises ArchitectureError when none fits, with the closest and what differs, and when several do.
    """
    fitting = exact_fits(tensors)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listed = ", ".join(found.architecture.name for found in fitting)
        raise ArchitectureError(
            f"{len(fitting)} architectures have exactly these names and shapes: {listed}",
            hint=f"choose one, for example --arch {fitting[0].architecture.name}",
        )
    nearest = closest(tensors)
    listed = "".join(f"\n  {found.architecture.name}: {found}" for found in nearest)
    raise ArchitectureError(
        f"no registered architecture fits the {len(tensors)} tensors of this checkpoint"
        + (f"; closest:{listed}" if nearest else ""),
        hint=ADVICE,
    )


def exact_fits(tensors: Mapping[str, Tensor]) -> list[Match]:
    """Every architecture with exactly these names and shapes; none, one or several."""

    def among(entries: Iterable[Architecture]) -> list[Match]:
        compared = (
            compare(entry, tensors, skeleton(entry)) for entry in entries if could_fit(entry, tensors)
        )
        return [found for found in compared if found.exact]

    # No network of ours has the names of one of torchvision's, so those are looked at by need only.
    return among([*_OWN.values(), *_installed().values()]) or among(imagenet.architectures().values())


def closest(tensors: Mapping[str, Tensor], n: int = 3) -> tuple[Difference, ...]:
    """The ``n`` architectures that share most names and shapes with ``tensors``, best first.

    Of torchvision's many, only the six nearest in size are compared.
    """
    total = learnable_values(tensors)
    distant = sorted(
        (entry for entry in imagenet.architectures().values() if entry.parameters is not None),
        key=lambda entry: abs((entry.parameters or 0) - total),
    )
    candidates = [*_OWN.values(), *_installed().values(), *distant[:6]]
    compared = [compare(entry, tensors, skeleton(entry)) for entry in candidates]
    ranked = sorted(compared, key=lambda found: -found.likeness)
    return tuple(found for found in ranked[:n] if found.agreeing)


@functools.cache
def _installed() -> dict[str, Architecture]:
    """What installed packages offer; our own names win over theirs."""
    found = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in _OWN or entry.name.startswith(imagenet.PREFIX):
            continue
        what = f"the installed architecture {entry.name!r} ({entry.value})"
        try:
            offered = entry.load()
        except Exception as error:  # a plug-in is foreign code
            raise ArchitectureError(f"{what} fails while it is imported: {imported.reason(error)}") from error
        if not isinstance(offered, Architecture):
            raise ArchitectureError(
                f"{what} is {type(offered).__name__}, not an "
                "s2ap_deploy.models.architectures.architecture.Architecture"
            )
        found[entry.name] = imported.run_cli(offered, entry.name)
    return found
