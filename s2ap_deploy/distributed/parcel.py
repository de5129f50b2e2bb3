"""What rank 0 sends to the others: a function and its arguments, with the code that a plain import misses.

Both ends belong to one process group, as with torch's own broadcast of objects: whoever can join the
group can run code in it. Our launcher opens it on this machine only.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from s2ap_deploy.distributed.sources import import_source, sources


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
