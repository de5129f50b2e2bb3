"""What a pickle asks Python to import, read from its opcodes. Nothing is executed.

``torch.load(weights_only=True)`` already refuses whatever is not on its list; this says *what* was asked
for, all of it at once and also in files from before PyTorch 1.6, so that a user can judge it.  It explains
a refusal and is no proof of safety: a pickle can be written so that a name is computed, and then it appears
here as such.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from s2ap_deploy import files
from s2ap_deploy.errors import CheckpointError

COMPUTED = "(a name computed while loading)"
# torch.save before 1.6: magic number, protocol version, system information, object, storage keys.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PICKLES = 5

_STRINGS = {
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "UNICODE",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
}
_STORE = {"PUT", "BINPUT", "LONG_BINPUT"}
_FETCH = {"GET", "BINGET", "LONG_BINGET"}


def numpy_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Names that numpy numbers and arrays need, harmless and common: a learning rate that numpy computed.

    In the form that ``torch.serialization.safe_globals`` takes: (object, the name that a pickle uses).
    """
    from numpy._core import multiarray

    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (np.dtype, "numpy.dtype"),
        (np.ndarray, "numpy.ndarray"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed.append((multiarray.scalar, f"{module}.scalar"))
        allowed.append((multiarray._reconstruct, f"{module}._reconstruct"))
    # The dtype's own class is what the pickle sets the state of; objects (code "O") are not among them.
    for code in "?bhilqBHILQefd":
        kind = type(np.dtype(code))
        allowed.append((kind, f"{kind.__module__}.{kind.__name__}"))
    return allowed


@dataclass(frozen=True)
class Scan:
    """What a file asks for: sorted ``module.name`` beyond what tensors and numbers need.

    ``protocol`` is the pickle's; ``torch_save`` tells a file of torch.save from a plain pickle.
    """

    requested: tuple[str, ...]
    protocol: int
    torch_save: bool


def requested_globals(path: Path | str) -> tuple[str, ...]:
    """Sorted ``module.name`` of everything that unpickling ``path`` would import beyond tensors and numbers.

    Reads both formats of ``torch.save`` and plain pickles.  Raises CheckpointError when the file is no pickle
    or breaks off, StorageError when it cannot be read.
    """
    return scan(files.read_bytes(path)).requested


def scan(data: bytes) -> Scan:
    """What the pickles in the bytes of a file ask for. Raises CheckpointError when that cannot be told."""
    zipped = data.startswith(b"PK")
    try:
        pickles, legacy = (_in_zip(data), False) if zipped else _in_stream(data)
    except (
        ValueError,
        EOFError,
        IndexError,
        KeyError,
        OverflowError,
        zipfile.BadZipFile,
        NotImplementedError,
    ) as error:
        raise CheckpointError(f"the pickle cannot be followed: {error}") from error
    requested = {name for opcodes in pickles for name in _globals(opcodes)}
    protocols = [int(str(argument)) for opcodes in pickles for name, argument in opcodes if name == "PROTO"]
    return Scan(tuple(sorted(requested - _allowed())), max(protocols, default=0), zipped or legacy)


Opcodes = list[tuple[str, object]]


def _in_zip(data: bytes) -> list[Opcodes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [_opcodes(archive.open(name)) for name in archive.namelist() if name.endswith(".pkl")]


def _in_stream(data: bytes) -> tuple[list[Opcodes], bool]:
    """The pickles at the start of a file, and whether they are those of torch.save before 1.6."""
    stream = io.BytesIO(data)
    pickles = [_opcodes(stream)]
    legacy = any(argument == LEGACY_MAGIC for _, argument in pickles[0])
    if legacy:
        pickles += [_opcodes(stream) for _ in range(LEGACY_PICKLES - 1)]
    return pickles, legacy


def _opcodes(stream: IO[bytes]) -> Opcodes:
    """One pickle, up to its STOP; the stream is left behind it."""
    return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(stream)]


def _globals(opcodes: Opcodes) -> Iterator[str]:
    """The names that one pickle imports."""
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = []  # what the opcodes so far left on the stack, as far as they are strings
    for name, argument in opcodes:
        if name in {"GLOBAL", "INST"}:
            yield str(argument).replace(" ", ".", 1)
            pushed.append(None)
        elif name == "STACK_GLOBAL":
            module, attribute = [None, None, *pushed][-2:]
            yield f"{module}.{attribute}" if module and attribute else COMPUTED
            pushed.append(None)
        elif name in {"EXT1", "EXT2", "EXT4"}:
            yield f"(extension {argument} of copyreg)"
            pushed.append(None)
        elif name in _STRINGS:
            pushed.append(str(argument))
        elif name in _STORE:
            memo[int(str(argument))] = pushed[-1] if pushed else None
        elif name == "MEMOIZE":
            memo[len(memo)] = pushed[-1] if pushed else None
        elif name in _FETCH:
            pushed.append(memo.get(int(str(argument))))
        elif name not in {"PROTO", "FRAME"}:
            pushed.append(None)


def _allowed() -> set[str]:
    # Private, but the only full list of what weights_only accepts; torch's public check reads only zip files.
    from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals

    with torch.serialization.safe_globals(numpy_globals()):
        return {*_get_allowed_globals(), *_get_user_allowed_globals()}  # type: ignore[no-untyped-call]
