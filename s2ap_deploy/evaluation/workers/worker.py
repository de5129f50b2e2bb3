"""A worker process, and the pickled messages between it and its parent.

Both ends of the pipe belong to one command, so unpickling runs no foreign code. Importing this module is
fast: a worker must tie its lifetime to the parent's before it spends seconds on importing torch.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

from s2ap_deploy.distributed.environment import exit_with_parent
from s2ap_deploy.errors import DeployError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from s2ap_deploy.evaluation.autoattack.frozen_model import Unit, UnitResult
    from s2ap_deploy.evaluation.workers.pool import UnitRunner


class NotPicklable(Exception):
    """The classifier cannot be rebuilt in another process (its class lives in ``__main__``, say)."""


class PickledAttacker:
    """An attacker as bytes, with the files of the modules that a plain import may not find."""

    def __init__(self, content: bytes, sources: Mapping[str, str]) -> None:
        self.content = content
        self.sources = sources

    @classmethod
    def pack(cls, attacker: UnitRunner) -> PickledAttacker:
        """Pickle the attacker. Raises NotPicklable when the classifier cannot be pickled."""
        import torch

        buffer = io.BytesIO()
        try:
            torch.save(attacker, buffer)
        except Exception as error:  # whatever a user's module raises while it is being pickled
            raise NotPicklable(f"the classifier cannot be sent to another process: {error}") from error
        return cls(buffer.getvalue(), source_files(attacker.judge))

    def unpack(self, device: torch.device | str = "cpu") -> UnitRunner:
        """Rebuild the attacker; with CUDA, tensors of the first GPU are moved to this rank's ``device``.

        Raises NotPicklable when a class cannot be imported here.
        """
        import torch

        gpu = torch.device(device).type == "cuda"
        place = {"cuda:0": f"cuda:{torch.cuda.current_device()}"} if gpu else "cpu"
        try:
            for name, file in self.sources.items():
                import_file(name, file)
            attacker: UnitRunner = torch.load(
                io.BytesIO(self.content), weights_only=False, map_location=place
            )
        except Exception as error:  # whatever a user's module raises while it is being rebuilt
            raise NotPicklable(
                f"the classifier cannot be rebuilt in another process: {type(error).__name__}: {error}"
            ) from error
        return attacker


class RemoteError:
    """An exception that is sent to the process waiting for the result."""

    def __init__(self, error: Exception) -> None:
        self.error = error if isinstance(error, DeployError | NotPicklable) else None
        self.summary = f"{type(error).__name__}: {error}"
        self.trace = traceback.format_exc()

    def raise_again(self) -> NoReturn:
        """Raise our own errors as they were, any other as DeployError with the traceback as its note."""
        error = self.error or DeployError(
            f"an attack worker failed with {self.summary}", code="worker-failed"
        )
        error.add_note(self.trace)
        raise error


def send(connection: Connection, message: object) -> None:
    """Send one message. Raises OSError when the other side is gone."""
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """Wait for one message. Raises EOFError or OSError when the other side is gone."""
    return pickle.loads(connection.recv_bytes())


def serve(parent: int, descriptor: int) -> None:
    """Run units for the process with the id ``parent`` until it closes the pipe or ends."""
    exit_with_parent(parent)
    os.dup2(2, 1)  # whatever a classifier prints must not mix with the parent's results
    connection = Connection(descriptor)

    import torch

    from s2ap_deploy.evaluation.autoattack.frozen_model import exact_arithmetic

    torch.set_num_threads(1)
    try:
        packed: PickledAttacker = receive(connection)
        try:
            attacker = packed.unpack()
        except NotPicklable as error:
            send(connection, RemoteError(error))
            return
        send(connection, None)
        while True:
            unit = receive(connection)
            try:
                with exact_arithmetic(attacker.device):
                    reply: object = attacker.run(unit)
            except Exception as error:  # the parent decides what it means
                reply = RemoteError(error)
            send(connection, reply)
    except (EOFError, OSError):
        return


_latest: dict[str, UnitRunner] = {}
"""The attacker that this process of a cluster used last, by its key."""


def run_once(key: str, device: str, packed: PickledAttacker, unit: Unit) -> UnitResult | RemoteError:
    """Run one unit as a task of a cluster; the attacker stays for the next task with the same ``key``."""
    import torch

    from s2ap_deploy.evaluation.autoattack.frozen_model import exact_arithmetic

    torch.set_num_threads(1)
    try:
        if key not in _latest:
            _latest.clear()
            _latest[key] = packed.unpack(device)
        with exact_arithmetic(_latest[key].device):
            return _latest[key].run(unit)
    except Exception as error:  # the process that waits decides what it means
        return RemoteError(error)


def source_files(network: nn.Module) -> dict[str, str]:
    """Return the file of every module in which a class of ``network`` or of its parts is defined."""
    names = {type(part).__module__ for part in network.modules()}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: file for name, file in files.items() if file}


def import_file(name: str, file: str) -> None:
    """Make ``import name`` work for a module outside the import path, such as ``--arch FILE``."""
    try:
        found = name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    spec = None if found else importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        return
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
