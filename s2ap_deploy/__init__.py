"""From an adversarially robust checkpoint to a pruned, attacked and exported model with a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2ap_deploy.api import certify, export, gate, load_checkpoint, pretrain, prune, report, verify
    from s2ap_deploy.stages.results import Certificates, Loaded, Reports, Trained

__all__ = [
    "Certificates",
    "Loaded",
    "Reports",
    "Trained",
    "certify",
    "export",
    "gate",
    "load_checkpoint",
    "pretrain",
    "prune",
    "report",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is first used; torch comes with the first call that needs it."""
    import importlib

    if name in __all__:
        return getattr(importlib.import_module("s2ap_deploy.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
