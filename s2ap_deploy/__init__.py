"""From an adversarially robust checkpoint to a pruned, attacked and exported model with a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2ap_deploy.api import (
        bundle,
        certify,
        collect,
        compare,
        decode,
        export,
        gate,
        init,
        inspect,
        load_checkpoint,
        plan,
        pretrain,
        prune,
        report,
        run,
        sign,
        sweep,
        verify,
    )
    from s2ap_deploy.stages.results import Certificates, Finished, Loaded, Reports, Trained

    __version__: str

__all__ = [
    "Certificates",
    "Finished",
    "Loaded",
    "Reports",
    "Trained",
    "bundle",
    "certify",
    "collect",
    "compare",
    "decode",
    "export",
    "gate",
    "init",
    "inspect",
    "load_checkpoint",
    "plan",
    "pretrain",
    "prune",
    "report",
    "run",
    "sign",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the Python interface at its first use; torch is imported by the first call that needs it."""
    import importlib

    if name == "__version__":
        return importlib.import_module("s2ap_deploy.runs.manifest").tool_version()
    if name in __all__:
        return getattr(importlib.import_module("s2ap_deploy.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
