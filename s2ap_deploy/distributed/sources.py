"""The code of a network that another process cannot import, as of one given as a file. No torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def sources(networks: Iterable[nn.Module]) -> dict[str, str]:
    """The files of the modules in which the classes of ``networks`` and of their parts live."""
    names = {type(part).__module__ for network in networks for part in network.modules()}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: file for name, file in files.items() if file}


def import_source(name: str, file: str) -> None:
    """Make ``import name`` work for a module that is on no path, as of an architecture given as a file."""
    try:
        found = name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    spec = None if found else importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        return
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
