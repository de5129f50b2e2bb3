"""Find and load what installed packages add by entry point: base methods, robust losses and targets.

::

    [project.entry-points."s2ap_deploy.methods"]     →  s2ap_deploy.recipe.methods.Method
    [project.entry-points."s2ap_deploy.losses"]      →  s2ap_deploy.training.objective.RobustLoss
    [project.entry-points."s2ap_deploy.targets"]     →  s2ap_deploy.recipe.target.Target

A plug-in is imported only when it is named. Built-in names take precedence, and an error in a plug-in names
its distribution. Architectures have a group of their own, which ``models.architectures.registry`` reads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, TypeVar, get_args

from s2ap_deploy.errors import DeployError, PluginError

Kind = Literal["methods", "losses", "targets", "architectures"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORDS: dict[Kind, str] = {
    "methods": "base method",
    "losses": "robust loss",
    "targets": "target",
    "architectures": "architecture",
}

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Plugin:
    """One entry point: its ``module:attribute``, and its distribution and version (``origin``)."""

    kind: Kind
    name: str
    value: str
    origin: str

    def __str__(self) -> str:
        return f"the {WORDS[self.kind]} {self.name!r} of {self.origin} ({self.value})"


def group(kind: Kind) -> str:
    """Return the entry-point group of a kind."""
    return f"s2ap_deploy.{kind}"


def offered(kind: Kind) -> tuple[Plugin, ...]:
    """Return every plug-in of a kind, by name. Imports none of them."""
    found = (
        Plugin(kind, entry.name, entry.value, _origin(entry))
        for entry in metadata.entry_points(group=group(kind))
    )
    return tuple(sorted(set(found), key=lambda each: (each.name, each.origin)))


def names(kind: Kind) -> tuple[str, ...]:
    """Return the names under which plug-ins of a kind can be chosen."""
    return tuple(dict.fromkeys(each.name for each in offered(kind)))


def find(kind: Kind, name: str) -> Plugin | None:
    """Return the plug-in of that name, or None. Raises PluginError when two distributions offer it."""
    found = [each for each in offered(kind) if each.name == name]
    if len(found) > 1:
        raise PluginError(
            f"{len(found)} plug-ins offer a {WORDS[kind]} {name!r}: "
            f"{' and '.join(each.origin for each in found)}",
            code="plugin-ambiguous",
            hint="uninstall all but one of them",
        )
    return found[0] if found else None


@functools.cache
def load(kind: Kind, name: str, expected: type[Loaded]) -> Loaded:
    """Import the plug-in of that name, once per process.

    Raises:
        PluginError: when there is none, when importing it fails, and when it is not an ``expected``.
    """
    plugin = find(kind, name)
    if plugin is None:
        raise PluginError(
            f"no {WORDS[kind]} {name!r} is installed",
            code="plugin-missing",
            hint="s2ap-deploy doctor lists what plug-ins offer",
        )
    (entry,) = (
        each
        for each in metadata.entry_points(group=group(kind), name=name)
        if (each.value, _origin(each)) == (plugin.value, plugin.origin)
    )
    try:
        found: object = entry.load()
    except (Exception, SystemExit) as error:  # foreign code
        raise PluginError(
            f"{plugin} fails while it is imported: {reason(error)}",
            code="plugin-import-failed",
            hint=_contact(plugin),
        ) from error
    if not isinstance(found, expected):
        raise PluginError(
            f"{plugin} is {type(found).__name__}, not an {expected.__module__}.{expected.__qualname__}",
            code="plugin-type-invalid",
            hint=_contact(plugin),
        )
    return found


@contextmanager
def blamed(kind: Kind, name: str) -> Iterator[Plugin | None]:
    """Turn what a plug-in's code raises into a PluginError that names its distribution."""
    try:
        yield find(kind, name)
    except (DeployError, MemoryError):
        raise
    except Exception as error:
        plugin = find(kind, name)
        hint = _contact(plugin) if plugin is not None else None
        raise PluginError(
            f"{plugin or name} fails: {reason(error)}", code="plugin-failed", hint=hint
        ) from error


def origins(**chosen: str | None) -> dict[str, dict[str, str]]:
    """Return the plug-ins behind the names in a stage's inputs, since another version is another input.

    ``origins(methods="mine", losses="at")`` is ``{"plugins": {"methods/mine": "acme 1.0"}}``, and empty where
    every name is the tool's own.
    """
    found: dict[str, str] = {}
    for kind, name in chosen.items():
        plugin = find(kind, name) if name is not None else None  # type: ignore[arg-type]
        if plugin is not None:
            found[f"{kind}/{name}"] = plugin.origin
    return {"plugins": found} if found else {}


def reason(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


def _origin(entry: metadata.EntryPoint) -> str:
    """Return distribution and version, such as ``acme-pruning 1.2``."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"


def _contact(plugin: Plugin) -> str:
    return f"report it to the maintainers of {plugin.origin.rpartition(' ')[0]}, or uninstall it"
