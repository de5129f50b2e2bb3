"""The registry of networks by name.

Names are the tool's own families (``cifar-resnet18``), items that installed packages offer under the
entry-point group ``s2ap_deploy.architectures``, torchvision's classifiers (``torchvision/resnet50``) and
timm's (``timm/resnet50``). ``+VARIANT`` after a name changes the function under the same names and shapes.
"""

from __future__ import annotations

import difflib
import functools
from importlib import metadata

from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import (
    custom,
    deepmind,
    imagenet,
    libraries,
    preact_resnet,
    resnet,
    small,
    variants,
    vgg,
    wide_resnet,
)
from s2ap_deploy.models.architectures.architecture import (
    Architecture,
    StateDictSpec,
    registered_spec,
    state_dict_spec,
)
from s2ap_deploy.plugins import reason

ENTRY_POINTS = "s2ap_deploy.architectures"

_OWN: dict[str, Architecture] = {
    entry.name: entry
    for family in (
        small.ARCHITECTURES,
        resnet.ARCHITECTURES,
        imagenet.SMALL_IMAGES,
        preact_resnet.ARCHITECTURES,
        vgg.ARCHITECTURES,
        wide_resnet.ARCHITECTURES,
        deepmind.ARCHITECTURES,
    )
    for entry in family
}


def names() -> tuple[str, ...]:
    """Return every name; imports torchvision."""
    return (*_OWN, *_installed(), *imagenet.architectures())


def own_and_installed() -> tuple[Architecture, ...]:
    """Return the tool's own architectures and those of installed plug-ins."""
    return (*_OWN.values(), *_installed().values())


def is_import_path(reference: str) -> bool:
    """Return True for ``package.module:factory`` and ``path/file.py:factory``, which run the user's code."""
    return custom.is_import_path(reference)


def resolve(reference: str) -> Architecture:
    """Return the architecture of a registered name or, for the command line, of an import path.

    Raises:
        ArchitectureError: with the nearest names when there is none.
    """
    if is_import_path(reference):
        if reference.startswith(libraries.FOLDER):
            return custom.checked(libraries.from_folder(reference), reference)
        return custom.architecture(reference)
    reference, *changes = reference.split(variants.SIGN)
    if reference.startswith(libraries.TIMM):
        return _of_timm(reference, changes)
    return variants.varied(_registered(reference), changes)


def _of_timm(reference: str, changes: list[str]) -> Architecture:
    """Return a network of timm; numbers of its own options come before other variants."""
    options = {name: value for name, _, value in (each.partition("=") for each in changes)}
    options = {name: value for name, value in options.items() if name in libraries.OPTIONS}
    if unfit := [f"{name}={value}" for name, value in options.items() if not value.isdecimal()]:
        raise ArchitectureError(f"{unfit[0]} is not a whole number", code="variant-unknown")
    numbers = {name: int(value) for name, value in options.items()}
    found = libraries.from_timm(reference.removeprefix(libraries.TIMM), numbers)
    whole = variants.SIGN.join((reference, *(f"{name}={value}" for name, value in options.items())))
    rest = [each for each in changes if each.partition("=")[0] not in options]
    return variants.varied(custom.checked(found, whole), rest)


def _registered(reference: str) -> Architecture:
    # torchvision is imported only for a name that asks for it, or when everything is listed.
    found = _OWN.get(reference)
    if found is None and reference.startswith(imagenet.PREFIX):
        found = imagenet.architectures().get(reference)
    elif found is None:
        found = custom.registered().get(reference) or _installed().get(reference)
    if found is not None:
        return found
    if reference.startswith(custom.IN_MEMORY):
        raise ArchitectureError(
            f"{reference} was passed in memory by another Python process and is unknown here",
            code="architecture-in-memory-missing",
            hint="give the network again from Python (model=network), or --arch package.module:factory",
        )
    known = names()
    # "resnet50" is nearer to "torchvision/resnet50" than spelling alone shows.
    near = [name for name in known if name.endswith(("/" + reference, "-" + reference))]
    near += [
        name for name in difflib.get_close_matches(reference, known, n=3, cutoff=0.5) if name not in near
    ]
    hint = (
        f"did you mean {' or '.join(near[:3])}?"
        if near
        else f"known: {', '.join((*_OWN, *_installed()))}, {imagenet.PREFIX}..."
    )
    raise ArchitectureError(f"there is no architecture {reference!r}", code="architecture-unknown", hint=hint)


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """Build the network of a registered name, freshly initialized, without input normalization.

    Import paths are refused, because a recipe may call this.

    Raises:
        ArchitectureError: for an import path, an unknown name, or fewer than two classes.
    """
    if is_import_path(name):
        raise ArchitectureError(
            f"{name!r} is an import path, which would run code",
            code="architecture-import-path",
            hint="pass it on the command line with --arch; a recipe names registered architectures",
        )
    architecture = resolve(name)
    if num_classes is not None and num_classes < 2:
        raise ArchitectureError(
            f"{name} cannot be built for {num_classes} classes; a classifier has at least 2",
            code="class-count-too-small",
        )
    return architecture.build(architecture.num_classes if num_classes is None else num_classes)


def spec(architecture: Architecture) -> StateDictSpec:
    """Return names and shapes of ``architecture``; built for custom code, cheap for all others."""
    base = architecture.name.partition(variants.SIGN)[0]
    if base in _OWN or base.startswith(imagenet.PREFIX):
        return registered_spec(architecture)
    return state_dict_spec(architecture)


@functools.cache
def _installed() -> dict[str, Architecture]:
    """Return what installed packages offer; the tool's own names win over theirs."""
    found = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in _OWN or entry.name.startswith(imagenet.PREFIX):
            continue
        what = f"the installed architecture {entry.name!r} ({entry.value})"
        try:
            loaded = entry.load()
        except Exception as error:  # a plug-in is foreign code
            raise ArchitectureError(
                f"{what} fails while it is imported: {reason(error)}",
                code="architecture-import-failed",
            ) from error
        if not isinstance(loaded, Architecture):
            raise ArchitectureError(
                f"{what} is {type(loaded).__name__}, not an {Architecture.__module__}.Architecture",
                code="architecture-factory-invalid",
            )
        found[entry.name] = custom.checked(loaded, entry.name)
    return found
