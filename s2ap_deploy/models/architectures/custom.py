"""The user's own architectures: import paths (``package.module:factory``), and modules given from Python.

Importing runs the user's code, so only the command line passes an import path here; recipes and checkpoints
that name one are refused before.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from s2ap_deploy import files
from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures.architecture import Architecture, fold_parametrizations
from s2ap_deploy.plugins import reason

IN_MEMORY = "given/"
FALLBACK_CLASSES = 10
_SOURCE = "__s2ap_deploy_source__"

Network = TypeVar("Network", bound=nn.Module)

_IN_MEMORY: dict[str, Architecture] = {}


def is_import_path(reference: str) -> bool:
    """Return True for ``module:name`` and ``file.py:name``; no registered name has a colon."""
    return ":" in reference


def architecture(reference: str) -> Architecture:
    """Import ``reference`` and wrap it.

    It may be an :class:`Architecture`, or a callable that takes ``num_classes`` or nothing and returns a
    network; an attribute ``input_size`` of (C, H, W) on the callable is used when present.

    Raises:
        ArchitectureError: for anything that is missing, and for any exception of the user's code.
    """
    location, _, attribute = reference.rpartition(":")
    module = _module(location, reference)
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ArchitectureError(
                f"{location} has no {attribute!r}",
                code="architecture-factory-missing",
                hint=f"it defines: {public_names(module) or 'nothing public'}",
            )
        factory = getattr(factory, part)
    if isinstance(factory, Architecture):
        return checked(factory, reference)
    if not callable(factory):
        raise ArchitectureError(
            f"{reference} is {type(factory).__name__}, not a function that builds a network",
            code="architecture-factory-invalid",
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
    return checked(wrapped, reference)


def public_names(module: Any) -> str:
    """List the functions and classes that ``module`` defines; everything public where it defines none."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own = [
        name
        for name, value in public.items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(own or public)


def checked(architecture: Architecture, reference: str) -> Architecture:
    """Return ``architecture``, named ``reference``, with a ``build`` that raises only ArchitectureError.

    Networks are converted to float32, the precision of all computation here, and parametrizations are folded
    to plain weights, which alone can be pruned and exported.
    """

    def parametrized(num_classes: int) -> nn.Module:
        try:
            network: object = architecture.build(num_classes)
        except Exception as error:  # foreign code
            raise ArchitectureError(
                f"{reference} fails: {reason(error)}", code="architecture-build-failed"
            ) from error
        if not isinstance(network, nn.Module):
            raise ArchitectureError(
                f"{reference} returns {type(network).__name__}, not a torch.nn.Module",
                code="architecture-build-invalid",
            )
        return network.float()

    def build(num_classes: int) -> nn.Module:
        network = parametrized(num_classes)
        fold_parametrizations(network)
        return network

    return dataclasses.replace(architecture, name=reference, build=build, parametrized=parametrized)


def register(network: nn.Module, *, input_size: tuple[int, int, int], num_classes: int) -> str:
    """Keep a copy of ``network`` for this process and return its name, such as ``given/Net-1a2b3c4d``.

    The name depends on the class and on the names and shapes of all tensors, so that the same network finds
    its run folder again in another process. ``input_size`` is (C, H, W).

    Raises:
        ArchitectureError: for a network that cannot be copied.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    digest = hashlib.sha256(repr((type(network).__qualname__, sorted(shapes.items()))).encode()).hexdigest()
    kind = re.sub(r"[^\w]", "", type(network).__name__) or "network"
    name = f"{IN_MEMORY}{kind}-{digest[:8]}"
    try:
        kept = copy.deepcopy(network).to("cpu").float().eval()
    except Exception as error:  # foreign code
        raise ArchitectureError(
            f"the network {type(network).__name__} cannot be copied: {reason(error)}",
            code="network-not-copyable",
            hint="write a function that builds it, and give its import path: arch='package.module:factory'",
        ) from error
    _IN_MEMORY[name] = Architecture(
        name, lambda _: copy.deepcopy(kept), input_size=input_size, num_classes=num_classes
    )
    return name


def with_plain_weights(network: Network) -> Network:
    """Return ``network``, or a copy of it without parametrizations where it has any."""
    hooked = any(module._forward_pre_hooks for module in network.modules())
    if not hooked and not any(map(parametrize.is_parametrized, network.modules())):
        return network
    try:
        with torch.no_grad():
            for module in network.modules():
                for hook in module._forward_pre_hooks.values():
                    if isinstance(hook, WeightNorm | SpectralNorm):
                        # Recomputed in every pass; as the result of a graph it could not be copied.
                        setattr(module, hook.name, getattr(module, hook.name).detach())
        copied = copy.deepcopy(network)
    except Exception:  # foreign code; reported where the copy is needed
        return network
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            # The copy shares its class with the original, from which folding would take the weight away.
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    fold_parametrizations(copied)
    return copied


def registered() -> Mapping[str, Architecture]:
    """Return the networks given to :func:`register` so far, by name."""
    return _IN_MEMORY


def _module(location: str, reference: str) -> Any:
    if not location.endswith(".py"):
        try:
            return importlib.import_module(location)
        except Exception as error:  # any line of the user's module may fail
            raise ArchitectureError(
                f"cannot import {location!r} for {reference}: {reason(error)}",
                code="architecture-import-failed",
            ) from error
    path = Path(location)
    if not path.is_file():
        raise ArchitectureError(
            f"there is no file {location} for {reference}", code="architecture-file-missing"
        )
    name = f"s2ap_deploy_user_{path.stem}"
    source = str(path.resolve()), files.read_bytes(path)
    if name in sys.modules and getattr(sys.modules[name], _SOURCE, None) == source:
        # A second import would replace the classes by which networks of the first one are pickled.
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    if found is None or found.loader is None:
        raise ArchitectureError(f"{location} cannot be imported as Python", code="architecture-import-failed")
    module = importlib.util.module_from_spec(found)
    # Registered while it runs, because dataclasses and pickles look their own module up by name.
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ArchitectureError(
            f"{location} fails while it is imported: {reason(error)}", code="architecture-import-failed"
        ) from error
    setattr(module, _SOURCE, source)
    return module


class _Source(importlib.machinery.SourceFileLoader):
    """Compile the current content of the file, and write no bytecode.

    Python considers cached bytecode fresh while the file's size and modification second are unchanged.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _default_classes(factory: Callable[..., Any]) -> int | None:
    """Return the default of the factory's ``num_classes``; None when it takes no such argument."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return None
    if "num_classes" not in parameters:
        return None
    default = parameters["num_classes"].default
    return default if isinstance(default, int) and default > 0 else FALLBACK_CLASSES
