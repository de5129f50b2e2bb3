"""List the imports that the pickles of a file request, from their opcodes; nothing is executed.

``torch.load(weights_only=True)`` already refuses everything that is not on its list. This module reports
all requests at once, in every format and protocol, so that a user can judge the file. It explains a refusal
but does not prove safety: a pickle can compute a name, which is then listed as computed.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

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
    """Return the harmless names that numpy values need, such as a learning rate that numpy computed.

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
    """The imports that a file requests: sorted ``module.name`` beyond those of tensors and numbers.

    ``protocol`` is the pickle's; ``torch_save`` distinguishes a file of torch.save from a plain pickle.
    """

    requested: tuple[str, ...]
    protocol: int
    torch_save: bool


def scan(data: bytes) -> Scan:
    """Return what the pickles in the bytes of a file request.

    Raises:
        CheckpointError: when the bytes are no pickle or break off.
    """
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
        raise CheckpointError(f"the pickle cannot be parsed: {error}", code="pickle-unreadable") from error
    requested = {name for opcodes in pickles for name in _globals(opcodes)}
    protocols = [int(str(argument)) for opcodes in pickles for name, argument in opcodes if name == "PROTO"]
    return Scan(tuple(sorted(_refused(requested))), max(protocols, default=0), zipped or legacy)


Opcodes = list[tuple[str, object]]


def _in_zip(data: bytes) -> list[Opcodes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [_opcodes(archive.open(name)) for name in archive.namelist() if name.endswith(".pkl")]


def _in_stream(data: bytes) -> tuple[list[Opcodes], bool]:
    """Return the pickles at the start of a file, and whether torch.save before 1.6 wrote them."""
    stream = io.BytesIO(data)
    pickles = [_opcodes(stream)]
    legacy = any(argument == LEGACY_MAGIC for _, argument in pickles[0])
    if legacy:
        pickles += [_opcodes(stream) for _ in range(LEGACY_PICKLES - 1)]
    return pickles, legacy


def _opcodes(stream: IO[bytes]) -> Opcodes:
    """Read one pickle, up to its STOP; the stream is then at the next one."""
    return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(stream)]


def _globals(opcodes: Opcodes) -> Iterator[str]:
    """Yield the names that one pickle imports."""
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


def _refused(names: Iterable[str]) -> set[str]:
    """Return those of ``names`` that weights-only loading does not import.

    torch's public check reads zip archives of pickle protocol 2 only. Our scan reads everything else too, so
    the names that it found are written into such an archive, one GLOBAL opcode each, for torch to judge.
    """
    # Names of another form cannot be a GLOBAL, and torch allows none of them.
    plain = {name for name in names if "." in name and name.isascii() and name.isprintable()}
    opcodes = "".join("c{}\n{}\n".format(*name.rsplit(".", 1)) for name in sorted(plain))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes.encode() + b".")
        archive.writestr("archive/version", b"3\n")
    stream.seek(0)
    with torch.serialization.safe_globals(numpy_globals()):
        judged = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    return (set(names) - plain) | set(judged)
