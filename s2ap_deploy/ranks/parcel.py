"""What rank 0 sends to the others: a function and its arguments, with the code that a plain import misses.

Both ends belong to one process group, as with torch's own broadcast of objects: whoever can join the
group can run code in it. Our launcher opens it on this machine only.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def pack(content: Any, networks: Iterable[nn.Module] = ()) -> bytes:
    """``content`` as bytes, able to be opened where the classes of ``networks`` were never imported."""
    buffer = io.BytesIO()
    torch.save((sources(networks), _body(content)), buffer)
    return buffer.getvalue()


def unpack(parcel: bytes, device: torch.device | str = "cpu") -> Any:
    """The content, its tensors on ``device`` where they were on a GPU, else on the CPU."""
    where = torch.device(device)
    origin = "cpu" if where.type == "cpu" else {f"{where.type}:0": str(where), "cpu": "cpu"}
    files, body = torch.load(io.BytesIO(parcel), weights_only=False)
    for name, file in files.items():
        import_source(name, file)
    return torch.load(io.BytesIO(body), weights_only=False, map_location=origin)


def _body(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def sources(networks: Iterable[nn.Module]) -> Mapping[str, str]:
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
