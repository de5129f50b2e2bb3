"""Attacks on held-out images, what they show, and the verdict drawn from it.

The room shares its name with a function of the Python interface, so it can be called:
``s2ap_deploy.certify(...)``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """As :func:`s2ap_deploy.api.certify`."""
        return importlib.import_module("s2ap_deploy.api").certify(*arguments, **keywords)


sys.modules[__name__].__class__ = _Room
