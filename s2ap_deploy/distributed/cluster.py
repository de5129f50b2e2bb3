"""Tasks on a Ray cluster. Ray schedules, retries and moves data; this module connects and checks.

Ray is the extra ``ray`` and imported here alone, when ``--on ray`` asks for it.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError, InconclusiveError, StorageError, UsageError
from s2ap_deploy.requirements import DISTRIBUTION, extra_requirements

Ticket = Any
"""What stands for the result of a task until it is there."""

SAME = (DISTRIBUTION, "torch", "torchvision", "pyautoattack", "numpy")
"""Distributions whose versions a result depends on: every node needs those of this machine."""

REACH_SECONDS = 10
CHECK_SECONDS = 120
"""Longest wait for a node's answer, which may have to start a first process there."""
RETRIES = 3
"""How often Ray starts a task again whose node died; one killed for lack of memory, once."""

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Resources:
    """What one task takes: CPU cores, GPUs, and bytes of memory (None: not counted)."""

    cpus: int = 1
    gpus: int = 0
    memory: int | None = None

    @classmethod
    def parse(cls, text: str) -> Resources:
        """Parse ``cpus=2,gpus=1,memory=8GiB``; each part may be left out. Raises UsageError."""
        found: dict[str, int] = {}
        for part in text.split(","):
            match = re.fullmatch(r"(cpus|gpus|memory)=(\d{1,9})([KMG]i?B)?", part.strip(), re.IGNORECASE)
            name = match[1].lower() if match else ""
            if match is None or name in found or (match[3] and name != "memory"):
                raise cls._invalid(text)
            found[name] = int(match[2]) * _UNITS[(match[3] or "").upper()]
        if found.get("cpus") == 0 or found.get("memory") == 0:
            raise cls._invalid(text)
        return cls(**found)

    @staticmethod
    def _invalid(text: str) -> UsageError:
        return UsageError(
            f"--per-task {text!r} does not say what a task takes",
            code="per-task-invalid",
            hint="for example --per-task cpus=2,gpus=1,memory=8GiB; a task takes at least one core",
        )

    def options(self) -> dict[str, Any]:
        """Return the resources as Ray names them."""
        memory = {} if self.memory is None else {"memory": self.memory}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory}

    def fits(self, node: Mapping[str, float]) -> bool:
        """Return whether a node with Ray's ``Resources`` can hold one task."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory or 0}
        return all(node.get(name, 0) >= amount for name, amount in wanted.items())


class Tasks(ABC):
    """Calls of importable functions somewhere else; arguments may be tickets of earlier ones."""

    resources: Resources

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many tasks run side by side."""

    @abstractmethod
    def put(self, value: object) -> Ticket:
        """Store a value once for many tasks."""

    @abstractmethod
    def submit(self, function: Callable[..., Any], *arguments: object) -> Ticket:
        """Start ``function`` as soon as there is room and its arguments are there."""

    @abstractmethod
    def first(self, tickets: Sequence[Ticket]) -> Ticket:
        """Wait until one of the tickets has a result or an error, and return it."""

    @abstractmethod
    def result(self, ticket: Ticket) -> Any:
        """Return a task's result. Raises a task's own DeployError, or one that says how it was lost."""

    @abstractmethod
    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Drop tasks whose results are not needed."""


class RayTasks(Tasks):
    """Tasks of a connected Ray cluster."""

    def __init__(self, ray: Any, resources: Resources) -> None:
        self.ray = ray
        self.resources = resources

    @property
    def slots(self) -> int:
        found = self.ray.cluster_resources()
        slots = int(found.get("CPU", 0)) // self.resources.cpus
        if self.resources.gpus:
            slots = min(slots, int(found.get("GPU", 0)) // self.resources.gpus)
        return max(1, slots)

    def put(self, value: object) -> Ticket:
        return self.ray.put(value)

    def submit(self, function: Callable[..., Any], *arguments: object) -> Ticket:
        task = self.ray.remote(function).options(max_retries=RETRIES, **self.resources.options())
        return task.remote(*arguments)

    def first(self, tickets: Sequence[Ticket]) -> Ticket:
        done, _ = self.ray.wait(list(tickets), num_returns=1)
        return done[0]

    def result(self, ticket: Ticket, seconds: float | None = None) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(ticket, timeout=seconds)
        except errors.OutOfMemoryError as error:
            raise InconclusiveError(
                f"a node ran out of memory: {_line(error)}",
                code="cluster-out-of-memory",
                hint="finished work is kept; add --resume and --per-task memory=SIZE: fewer run there",
            ) from None
        except errors.RayTaskError as error:
            raise _of_task(error) from None
        except errors.GetTimeoutError:
            raise InconclusiveError(
                f"a node did not answer within {seconds:.0f} s", code="cluster-silent", hint="see: ray status"
            ) from None
        except errors.RayError as error:
            raise InconclusiveError(
                f"the cluster lost a task: {_line(error)}",
                code="cluster-task-lost",
                hint="finished work is kept; add --resume, with or without --on",
            ) from None

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.ray.cancel(ticket, force=True)

    def on_every_node(self, function: Callable[..., Any], *arguments: object) -> Iterator[tuple[str, Any]]:
        """Yield each living node's address and what ``function`` returns there. Raises as :meth:`result`."""
        strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        task, waiting = self.ray.remote(function), []
        for node in self.nodes():
            pinned = strategy(node_id=node["NodeID"], soft=False)
            ticket = task.options(num_cpus=0, scheduling_strategy=pinned).remote(*arguments)
            waiting.append((str(node["NodeManagerAddress"]), ticket))
        for address, ticket in waiting:
            yield address, self.result(ticket, CHECK_SECONDS)

    def nodes(self) -> list[Mapping[str, Any]]:
        """Return the living nodes."""
        return [node for node in self.ray.nodes() if node["Alive"]]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _of_task(error: Any) -> DeployError:
    """Return our own error of a task as it was, any other with the name of its class."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, DeployError):
        return cause
    if isinstance(cause, ImportError):
        return UsageError(
            f"a node cannot import what this machine has: {_line(cause)}",
            code="cluster-package-missing",
            hint=f"install {DISTRIBUTION} {_version(DISTRIBUTION)} in the Python of every node",
        )
    return DeployError(f"a task failed: {type(cause).__name__}: {_line(cause)}", code="cluster-task-failed")


@contextmanager
def connected(target: str, resources: Resources, folder: Path | None = None) -> Iterator[RayTasks]:
    """Connect to ``ray`` or ``ray://HOST:PORT``, check every node, and disconnect on exit.

    ``ray`` is the cluster of ``RAY_ADDRESS``, else one that runs on this machine, else a new one of this
    machine alone. ``folder`` must be on storage that all nodes share. A connection that the caller has opened
    is used and kept. Raises UsageError (no Ray, other versions, too little of something), InconclusiveError
    (nobody there) and StorageError.
    """
    ray = _library()
    address = _address(target)
    own = not ray.is_initialized()
    if own:
        _connect(ray, address)
    try:
        tasks = RayTasks(ray, resources)
        _refuse_small(tasks)
        check_nodes(tasks.on_every_node, folder)
        yield tasks
    finally:
        if own:
            ray.shutdown()


def _library() -> Any:
    # Before Ray is imported: it reads these once. Its default is to try forever where memory runs out.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "1")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        listed = " ".join(f'"{each}"' for each in extra_requirements("ray"))
        raise UsageError(
            "--on ray needs Ray, which is not installed",
            code="ray-missing",
            hint=f"pip install {listed}: the extra ray of {DISTRIBUTION}",
        ) from None
    return ray


def _address(target: str) -> str | None:
    """Return the address to connect to, None for Ray's own choice. Raises UsageError."""
    if target == "ray":
        return os.environ.get("RAY_ADDRESS") or None
    if not re.fullmatch(r"ray://[^/\s:]+:\d{1,5}", target):
        raise UsageError(
            f"--on {target!r} is no cluster",
            code="cluster-invalid",
            hint="--on ray, or --on ray://HOST:10001",
        )
    return target


def _connect(ray: Any, address: str | None) -> None:
    place = re.fullmatch(r"(?:ray://)?([^/\s:]+):(\d{1,5})", address or "")
    try:
        if place is not None:
            socket.create_connection((place[1], int(place[2])), REACH_SECONDS).close()
        ray.init(address=address, logging_level="error", log_to_driver=False)  # stdout is for results
    except (OSError, ValueError, OverflowError) as error:
        raise InconclusiveError(
            f"no Ray cluster answers at {address or 'this machine'}: {_line(error)}",
            code="cluster-unreachable",
            hint="see: ray status; ray:// takes the port of Ray's client server, 10001 by default",
        ) from None
    except RuntimeError as error:  # another version of Ray or Python
        raise UsageError(
            f"the cluster refuses this machine: {_line(error)}",
            code="cluster-version-differs",
            hint="use the same versions of Ray and Python on all machines",
        ) from None


def _refuse_small(tasks: RayTasks) -> None:
    """Raise UsageError if no node can ever hold a task; Ray would wait for one."""
    if not any(tasks.resources.fits(node["Resources"]) for node in tasks.nodes()):
        wanted = ", ".join(f"{name} {value}" for name, value in tasks.resources.options().items())
        raise UsageError(
            f"no node of the cluster has what a task takes ({wanted})",
            code="cluster-too-small",
            hint="see: ray status; ask for less with --per-task",
        )


Everywhere = Callable[..., Iterator[tuple[str, Any]]]


def check_nodes(everywhere: Everywhere, folder: Path | None) -> None:
    """Check that all nodes have this machine's versions and see what it writes into ``folder``.

    ``everywhere(function, *arguments)`` yields address and result of every node. Raises UsageError,
    StorageError.
    """
    here, token = facts(), secrets.token_hex(8)
    probe = None if folder is None else folder / f"{files.TEMPORARY}probe-{token}"
    try:
        if probe is not None:
            files.write_text(probe, token)
        for node, (found, seen) in everywhere(answer, None if probe is None else str(probe)):
            _refuse_other(node, here, found)
            if probe is not None and seen != token:
                raise StorageError(
                    f"node {node} does not see {folder}",
                    code="storage-not-shared",
                    hint="name a folder with --run that is at the same path on every node",
                )
    finally:
        if probe is not None:
            files.remove(probe)


def _refuse_other(node: str, here: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name, version in here.items():
        if found.get(name) != version:
            raise UsageError(
                f"node {node} has {name} {found.get(name, '(none)')}, this machine {version}",
                code="cluster-version-differs",
                hint="install the same versions everywhere, since results depend on them",
            )


def facts() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    return found | {name: version for name in SAME if (version := _version(name)) is not None}


def answer(probe: str | None) -> tuple[dict[str, str], str | None]:
    """Return this node's :func:`facts` and what it reads in the file ``probe``."""
    if probe is None:
        return facts(), None
    try:
        return facts(), Path(probe).read_text(encoding="utf-8")
    except OSError:
        return facts(), None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def with_device(resources: Resources, device: str) -> Resources:
    """Return the resources with a GPU, where ``device`` is one and none was asked for."""
    return replace(resources, gpus=1) if device.startswith("cuda") and resources.gpus == 0 else resources
