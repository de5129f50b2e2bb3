"""How training computes on its device: numbers, memory layout, compilation. Certification never does so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.training.compilation import Compiled

PrecisionName = Literal["auto", "float32", "bf16"]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Precision:
    """What a training loop computes with. The default leaves everything to torch's own settings.

    ``bf16``: the network's forward pass autocasts to bfloat16 and answers with float32 logits, so that
    losses, weights, scores, masks, norms and the optimizer stay float32. ``channels_last``: convolutions keep
    channels innermost. ``tf32``: whether CUDA may multiply float32 matrices in TF32, None for torch's own
    choice. ``compiled``: the forward pass goes through ``torch.compile``.
    """

    bf16: bool = False
    channels_last: bool = False
    tf32: bool | None = None
    compiled: bool = False

    def arrange(self, network: Network) -> Network:
        """Lay the network's weights out as training wants them, in place; before scores are made of them."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        return network

    def apply(self, network: nn.Module, warn: Callable[[str], None]) -> Applied:
        """This precision for one network; ``warn`` is told when compilation fails."""
        return Applied(self, network, warn)

    def facts(self) -> dict[str, bool | str]:
        """The settings, for a run's record of its environment."""
        facts: dict[str, bool | str] = {"precision": "bf16" if self.bf16 else "float32"}
        return facts | {
            name: value for name, value in asdict(self).items() if name != "bf16" and value is not None
        }


FLOAT32 = Precision()


class Applied:
    """While it is entered, every call of the network computes in the precision; may be entered often.

    All that changes about the network is that its instance gets a ``forward`` of its own: parameters,
    buffers, modules and their names stay as they are.
    """

    def __init__(self, precision: Precision, network: nn.Module, warn: Callable[[str], None]) -> None:
        self.precision, self.network = precision, network
        ahead: Callable[..., Tensor] = network.forward
        if precision.compiled:
            ahead = Compiled(network, warn)
        self.forward = Narrow(ahead) if precision.bf16 else ahead
        self.saved: tuple[bool, bool] | None = None

    def __enter__(self) -> None:
        if self.saved is not None:
            raise RuntimeError("this precision is already in force")
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


class Narrow:
    """A forward pass in bfloat16 whose answer is float32."""

    def __init__(self, ahead: Callable[..., Tensor]) -> None:
        self.ahead = ahead

    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.ahead(images)
        return logits.float()


def narrowed(network: nn.Module) -> bool:
    """Whether calls of ``network`` compute in bfloat16."""
    return isinstance(vars(network).get("forward"), Narrow)


def allow_tf32(matmul: bool, convolutions: bool) -> None:
    """Let CUDA round float32 operands to TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolutions


def choose(name: str, device: torch.device, *, compiled: bool = False) -> Precision:
    """The precision called ``auto``, ``float32`` or ``bf16`` on ``device``.

    ``auto`` is bf16 with TF32 on a CUDA device that computes bf16 itself, float32 elsewhere; ``float32`` on
    CUDA is float32 without TF32. On CUDA convolutions keep channels innermost. Raises UsageError for bf16 on
    a CUDA device that has none, and for another name.
    """
    if name not in get_args(PrecisionName):
        raise UsageError(f"there is no precision {name!r}", hint="choose auto, float32 or bf16")
    cuda = device.type == "cuda"
    able = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bf16" and cuda and not able:
        raise UsageError(f"{device} does not compute bf16 itself", hint="use --precision float32")
    bf16 = name == "bf16" or (name == "auto" and able)
    return Precision(bf16=bf16, channels_last=cuda, tf32=(bf16 if cuda else None), compiled=compiled)
