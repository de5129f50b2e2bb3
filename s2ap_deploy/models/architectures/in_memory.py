"""Networks that a Python program hands over: known by name in this process, and in no other."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping

from torch import nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures.architecture import Architecture

PREFIX = "given/"

_GIVEN: dict[str, Architecture] = {}


def give(network: nn.Module, *, input_size: tuple[int, int, int], num_classes: int) -> str:
    """Remember a copy of ``network`` and return its name, such as ``given/Net-1a2b3c4d``.

    The name depends on the class and on the names and shapes of all tensors, so that whoever gives the same
    network in another process finds his run folder again. ``input_size`` is (C, H, W). Raises
    ArchitectureError for a network that cannot be copied.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    digest = hashlib.sha256(repr((type(network).__qualname__, sorted(shapes.items()))).encode()).hexdigest()
    kind = re.sub(r"[^\w]", "", type(network).__name__) or "network"
    name = f"{PREFIX}{kind}-{digest[:8]}"
    try:
        kept = copy.deepcopy(network).to("cpu").float().eval()
    except Exception as error:  # a stranger's module
        raise ArchitectureError(
            f"the network {type(network).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="write a function that builds it, and give its import path: arch='package.module:factory'",
        ) from error
    _GIVEN[name] = Architecture(
        name, lambda _: copy.deepcopy(kept), input_size=input_size, num_classes=num_classes
    )
    return name


def architectures() -> Mapping[str, Architecture]:
    """What was given so far, by name."""
    return _GIVEN
