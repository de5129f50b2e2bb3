"""Architectures that are the user's own code: ``package.module:factory`` or ``path/file.py:factory``.

Importing runs that code, so only the command line passes such a reference here; a recipe or a checkpoint that
names one is refused before.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures.architecture import Architecture

FALLBACK_CLASSES = 10
_SOURCE = "__s2ap_deploy_source__"


def is_import_path(reference: str) -> bool:
    """True for ``module:name`` and ``file.py:name``; no name of the registry has a colon."""
    return ":" in reference


def architecture(reference: str) -> Architecture:
    """Import ``reference`` and wrap it.

    It may be an :class:`Architecture`, or a callable that takes ``num_classes`` or nothing and returns a
    network; an attribute ``input_size`` of (C, H, W) on the callable is used when present.  Raises
    ArchitectureError for anything that is missing, and for any exception of the code itself.
    """
    location, _, attribute = reference.rpartition(":")
    module = _module(location, reference)
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ArchitectureError(
                f"{location} has no {attribute!r}", hint=f"it has: {offered(module) or 'nothing public'}"
            )
        factory = getattr(factory, part)
    if isinstance(factory, Architecture):
        return run_cli(factory, reference)
    if not callable(factory):
        raise ArchitectureError(
            f"{reference} is {type(factory).__name__}, not a function that builds a network"
        )
    default = _default_classes(factory)
    size = getattr(factory, "input_size", None)
    wrapped = Architecture(
        reference,
        (lambda num_classes: factory(num_classes=num_classes))
        if default is not None
        else (lambda _: factory()),
        input_size=tuple(size) if size is not None else None,
        num_classes=default or FALLBACK_CLASSES,
    )
    return run_cli(wrapped, reference)


def offered(module: Any) -> str:
    """Functions and classes that ``module`` defines itself; everything public where it defines none."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own = [
        name
        for name, value in public.items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(own or public)


def run_cli(architecture: Architecture, reference: str) -> Architecture:
    """``architecture``, known as ``reference``, whose ``build`` raises nothing but ArchitectureError.

    Networks come out in float32, in which everything here is computed, whatever the user's code makes.
    """

    def build(num_classes: int) -> nn.Module:
        try:
            network: object = architecture.build(num_classes)
        except Exception as error:  # foreign code
            raise ArchitectureError(f"{reference} fails: {reason(error)}") from error
        if not isinstance(network, nn.Module):
            raise ArchitectureError(f"{reference} returns {type(network).__name__}, not a torch.nn.Module")
        return network.float()

    return dataclasses.replace(architecture, name=reference, build=build)


def reason(error: Exception) -> str:
    """The kind of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _module(location: str, reference: str) -> Any:
    if not location.endswith(".py"):
        try:
            return importlib.import_module(location)
        except Exception as error:  # any line of the user's module may fail
            raise ArchitectureError(f"cannot import {location!r} for {reference}: {reason(error)}") from error
    path = Path(location)
    if not path.is_file():
        raise ArchitectureError(f"there is no file {location} for {reference}")
    name = f"s2ap_deploy_user_{path.stem}"
    source = str(path.resolve()), path.read_bytes()
    if name in sys.modules and getattr(sys.modules[name], _SOURCE, None) == source:
        # Not anew for a second network: its classes would replace those that the first one is pickled by.
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    if found is None or found.loader is None:
        raise ArchitectureError(f"{location} cannot be imported as Python")
    module = importlib.util.module_from_spec(found)
    # Registered while it runs, because dataclasses and pickles look their own module up by name.
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ArchitectureError(f"{location} fails while it is imported: {reason(error)}") from error
    setattr(module, _SOURCE, source)
    return module


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles what the file holds now.

    Bytecode that Python kept counts as fresh while size and whole second are the same, and it would lie in
    the user's folder.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _default_classes(factory: Callable[..., Any]) -> int | None:
    """The default of the factory's ``num_classes``; None when it takes no such argument."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return None
    if "num_classes" not in parameters:
        return None
    default = parameters["num_classes"].default
    return default if isinstance(default, int) and default > 0 else FALLBACK_CLASSES
