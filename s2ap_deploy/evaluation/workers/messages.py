"""What a process and its workers say to each other: length-prefixed pickles over two pipes.

Both ends of the pipes are ours, so unpickling runs nobody else's code. Importing this module is
cheap: a worker must arrange its own end before it spends seconds on importing torch.
"""

from __future__ import annotations

import io
import pickle
import struct
import traceback
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, NoReturn

from s2ap_deploy.distributed.sources import import_source, sources
from s2ap_deploy.errors import DeployError

if TYPE_CHECKING:
    from s2ap_deploy.evaluation.workers.executors import UnitRunner

_LENGTH = struct.Struct(">Q")


class NotPicklable(Exception):
    """The classifier cannot be rebuilt in another process (its class lives in ``__main__``, say)."""


class PickledAttacker:
    """An attacker as bytes, with the files of the modules that a plain import may not find."""

    def __init__(self, content: bytes, sources: Mapping[str, str]) -> None:
        self.content = content
        self.sources = sources

    @classmethod
    def pack(cls, attacker: UnitRunner) -> PickledAttacker:
        """Raises NotPicklable when the classifier cannot be pickled."""
        import torch

        buffer = io.BytesIO()
        try:
            torch.save(attacker, buffer)
        except Exception as error:  # whatever a stranger's module raises while it is being pickled
            raise NotPicklable(f"the classifier cannot be sent to another process: {error}") from error
        return cls(buffer.getvalue(), sources([attacker.judge]))

    def unpack(self) -> UnitRunner:
        """Raises NotPicklable when a class cannot be imported here."""
        import torch

        try:
            for name, file in self.sources.items():
                import_source(name, file)
            attacker: UnitRunner = torch.load(io.BytesIO(self.content), weights_only=False)
        except Exception as error:  # whatever a stranger's module raises while it is being rebuilt
            raise NotPicklable(
                f"the classifier cannot be rebuilt in another process: {type(error).__name__}: {error}"
            ) from error
        return attacker


class Failure:
    """An exception on its way to the parent."""

    def __init__(self, error: Exception) -> None:
        self.error = error if isinstance(error, DeployError | NotPicklable) else None
        self.summary = f"{type(error).__name__}: {error}"
        self.trace = traceback.format_exc()

    def raise_again(self) -> NoReturn:
        """Raise our own errors as they were, any other as DeployError with the traceback as its note."""
        error = self.error or DeployError(f"an attack worker failed with {self.summary}")
        error.add_note(self.trace)
        raise error


def write(stream: IO[bytes], message: object) -> None:
    """One message. Raises BrokenPipeError when the other side is gone."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def read(stream: IO[bytes]) -> Any:
    """One message. Raises EOFError when the other side is gone, also in the middle of a message."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return pickle.loads(content)
