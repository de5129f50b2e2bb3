"""All encodings by name, and which of them may store a weight."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from s2ap_deploy.codecs import encodings
from s2ap_deploy.codecs.codec import MAX_DENSITY, Codec
from s2ap_deploy.codecs.encodings import dense, zeros

AUTO = "auto"
# The two forms that need no positions.
DENSE: Codec = dense.CODEC
ZEROS: Codec = zeros.CODEC


def _discover() -> dict[str, Codec]:
    modules = pkgutil.iter_modules(encodings.__path__, f"{encodings.__name__}.")
    found: list[Codec] = [importlib.import_module(module.name).CODEC for module in modules]
    return {codec.name: codec for codec in sorted(found, key=lambda codec: codec.order)}


CODECS: Mapping[str, Codec] = _discover()
ENCODINGS: tuple[str, ...] = (AUTO, *(name for name, codec in CODECS.items() if codec.selectable))
OPERATORS = frozenset[str]().union(*(codec.operators for codec in CODECS.values()))

if TYPE_CHECKING:
    EncodingName = str
    StoredEncoding = str
else:
    EncodingName = Literal[ENCODINGS]
    """An encoding that a user can ask for."""
    StoredEncoding = Literal[tuple(CODECS)]
    """An encoding that a tensor of a file can have."""


def candidates(encoding: EncodingName, nonzeros: int, entries: int) -> tuple[Codec, ...]:
    """List the codecs for a weight under ``encoding``: the smallest is taken, and of equals the first."""
    if encoding != DENSE.name and nonzeros == 0:
        return (ZEROS,)
    crowded = nonzeros > MAX_DENSITY * entries
    if encoding == AUTO:
        return tuple(each for each in CODECS.values() if each.automatic and (each.any_density or not crowded))
    return (DENSE,) if crowded else (CODECS[encoding],)


def describe() -> str:
    """Explain the choices in one sentence, for ``--help``."""
    automatic = [f"{codec.name} ({codec.summary})" for codec in CODECS.values() if codec.automatic]
    others = [f"{codec.name} is {codec.summary}" for codec in CODECS.values() if _by_request(codec)]
    return "; ".join([f"{AUTO} takes the smallest per tensor of {', '.join(automatic)}", *others])


def _by_request(codec: Codec) -> bool:
    return codec.selectable and not codec.automatic
