"""Precision, memory layout and compilation of training steps; certification always computes in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError

PrecisionName = Literal["auto", "float32", "bf16"]
Network = TypeVar("Network", bound=nn.Module)

_VARIANTS = 64
"""Train or eval mode, gradients of images or none, statistics kept or frozen, whole and last batches: torch
would give up after 8 of them, and run the network as it is from then on."""


@dataclass(frozen=True)
class Precision:
    """Numerical settings of a training loop. The default keeps torch's own settings.

    ``bf16``: the network's forward pass autocasts to bfloat16 and returns float32 logits, so that
    losses, weights, scores, masks, norms and the optimizer stay float32. ``channels_last``: convolutions keep
    channels innermost. ``tf32``: whether CUDA may multiply float32 matrices in TF32, None for torch's own
    choice. ``compiled``: the forward pass goes through ``torch.compile``.
    """

    bf16: bool = False
    channels_last: bool = False
    tf32: bool | None = None
    compiled: bool = False

    def to_channels_last(self, network: Network) -> Network:
        """Change the weights' memory layout in place, if asked for; before scores are made of them."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        return network

    def apply(self, network: nn.Module, warn: Callable[[str], None]) -> Applied:
        """Return a context that applies the settings to ``network``; failed compilation calls ``warn``."""
        return Applied(self, network, warn)

    def facts(self) -> dict[str, bool | str]:
        """Return the settings, for a run's record of its environment."""
        facts: dict[str, bool | str] = {"precision": "bf16" if self.bf16 else "float32"}
        return facts | {
            name: value for name, value in asdict(self).items() if name != "bf16" and value is not None
        }


FLOAT32 = Precision()


class Applied:
    """Let every call of the network compute in the precision, while it is entered; may be entered often.

    The network only gets its own ``forward`` on the instance: parameters, buffers, modules and their names
    stay the same.
    """

    def __init__(self, precision: Precision, network: nn.Module, warn: Callable[[str], None]) -> None:
        self.precision, self.network = precision, network
        ahead: Callable[..., Tensor] = network.forward
        if precision.compiled:
            ahead = Compiled(network, warn)
        self.forward = Bfloat16Forward(ahead) if precision.bf16 else ahead
        self.saved: tuple[bool, bool] | None = None

    def __enter__(self) -> None:
        if self.saved is not None:
            raise RuntimeError("this precision is already active")
        self.saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        if self.precision.tf32 is not None:
            allow_tf32(self.precision.tf32, self.precision.tf32)
        if self.precision.bf16 or self.precision.compiled:
            self.network.forward = self.forward

    def __exit__(self, *exception: object) -> None:
        assert self.saved is not None
        self.network.__dict__.pop("forward", None)
        if self.precision.tf32 is not None:
            allow_tf32(*self.saved)
        self.saved = None


class Bfloat16Forward:
    """Run a forward pass in bfloat16 and return float32 logits."""

    def __init__(self, ahead: Callable[..., Tensor]) -> None:
        self.ahead = ahead

    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.ahead(images)
        return logits.float()


def in_bfloat16(network: nn.Module) -> bool:
    """Return whether calls of ``network`` compute in bfloat16."""
    return isinstance(vars(network).get("forward"), Bfloat16Forward)


def allow_tf32(matmul: bool, convolutions: bool) -> None:
    """Let CUDA round float32 operands to TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolutions


def choose_precision(name: str, device: torch.device, *, compiled: bool = False) -> Precision:
    """Return the precision called ``auto``, ``float32`` or ``bf16`` on ``device``.

    ``auto`` is bf16 with TF32 on a CUDA device that computes bf16 itself, float32 elsewhere; ``float32`` on
    CUDA is float32 without TF32. On CUDA convolutions keep channels innermost. Raises UsageError for bf16 on
    a CUDA device that has none, and for another name.
    """
    if name not in get_args(PrecisionName):
        raise UsageError(
            f"there is no precision {name!r}", code="precision-unknown", hint="choose auto, float32 or bf16"
        )
    cuda = device.type == "cuda"
    able = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bf16" and cuda and not able:
        raise UsageError(
            f"{device} does not support bf16", code="bf16-unsupported", hint="use --precision float32"
        )
    bf16 = name == "bf16" or (name == "auto" and able)
    return Precision(bf16=bf16, channels_last=cuda, tf32=(bf16 if cuda else None), compiled=compiled)


def compiled(network: nn.Module) -> bool:
    """Return whether calls of ``network`` are compiled; a compiler sees layers as they were then."""
    forward = vars(network).get("forward")
    return isinstance(forward, Compiled) or isinstance(getattr(forward, "ahead", None), Compiled)


class Compiled:
    """Compile the forward pass of ``network`` at its first call; call ``warn`` where that fails.

    A forward and backward trial on a copy with the first images comes first: a compiler error then occurs
    there, not in the middle of a step that has already updated BatchNorm's statistics.
    """

    def __init__(self, network: nn.Module, warn: Callable[[str], None]) -> None:
        self.network, self.warn = network, warn
        self.eager: Callable[[Tensor], Tensor] = network.forward
        self.ahead: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.ahead is None:
            allow_variants()
            self.ahead = torch.compile(self.eager) if self.works(images) else self.eager
        return self.ahead(images)

    def works(self, images: Tensor) -> bool:
        """Return whether a compiled copy of the network computes logits and gradients."""
        try:
            # The copy's forward is the class's own: ours sits on the instance.
            held = self.network.__dict__.pop("forward", None)
            try:
                twin = copy.deepcopy(self.network)
            finally:
                if held is not None:
                    self.network.forward = held
            ahead = torch.compile(twin.forward)
            given = images.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                torch.autograd.grad(ahead(given).float().sum(), given)
        except Exception as error:  # a compiler, or the network's own code under it, may raise anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.warn(f"the network could not be compiled and runs uncompiled: {lines[0][:200]}")
            return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[Tensor], Tensor]:
        """Copy the uncompiled forward pass: a copied network computes with its own weights."""
        return copy.deepcopy(self.eager, memo)


def allow_variants() -> None:
    """Raise the compiler's limit to the number of variants that training has."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
