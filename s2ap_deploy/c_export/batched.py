"""Sparse layers for attacks on a CPU: C kernels for convolutions and linear layers of mostly zeros.

Forward passes walk lists of kept weights, and so do gradients of the image, with lists of the transposed
weights. Weights are constants: no gradient reaches them, nor a score.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s2ap_deploy.c_export.library import build, compiler
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.training.folding import ImageConv2d, agree, folded_copy, hooked

Compute = Literal["auto", "on", "off"]
SPARSE_ABOVE = 0.8
"""The share of zeros from which a network, and a layer of it, is computed from lists."""
_LANES, _AT_ONCE = 8, 16  # images in a vector, and passed through the network together
_Ints = NDArray[np.int64]
_SIZES = (
    "outputs",
    "images",
    "lines",
    "line",
    "length",
    "step",
    "pitch",
    "width",
    "out_plane",
    "out_row",
    "out_step",
    "out_first",
)


class Kernels:
    """The built kernels. They are pickled as bytes; each process loads its own copy."""

    def __init__(self, content: bytes) -> None:
        """Store the shared library."""
        self.content = content
        self._run: Any = None

    @classmethod
    def built(cls) -> Kernels | None:
        """Build the kernels with the system's compiler; None where there is none or it fails."""
        command = compiler()
        if command is None:
            return None
        source = (resources.files("s2ap_deploy.c_export") / "kernels" / "batch.c").read_bytes()
        try:
            return cls(build({"model.c": source}, command))
        except VerificationError:
            return None

    @property
    def run(self) -> Any:
        """The function ``sparse_lists``, loaded on first use from a private file that is removed at once."""
        if self._run is None:
            with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
                path = Path(folder) / "batch.so"
                path.write_bytes(self.content)
                self._run = ctypes.CDLL(str(path)).sparse_lists
            self._run.restype = None
        return self._run

    def __getstate__(self) -> bytes:
        return self.content

    def __setstate__(self, state: bytes) -> None:
        self.__init__(state)  # type: ignore[misc]


class _Lists:
    """The kept weights by output channel, and the pixels of one call; the number of images is added to it."""

    def __init__(
        self, rows: _Ints, positions: _Ints, values: NDArray[np.float32], outputs: int, sizes: dict[str, int]
    ) -> None:
        order = np.lexsort((positions, rows))
        starts = np.cumsum([0, *np.bincount(rows, minlength=outputs)])
        self.starts = torch.from_numpy(starts.astype(np.int32))
        self.positions = torch.from_numpy(positions[order].astype(np.int32))
        self.values = torch.from_numpy(np.ascontiguousarray(values[order], np.float32))
        self.sizes = np.array([sizes.get(name, 0) for name in _SIZES], np.int64)
        self.sizes[0] = outputs

    def run(self, kernels: Kernels, source: Tensor, bias: Tensor, target: Tensor) -> None:
        """Compute from ``source`` into ``target``, both [C, H, W, B]."""
        sizes = self.sizes.copy()
        sizes[1] = source.shape[-1]
        tensors = (source, self.starts, self.positions, self.values, bias, target)
        kernels.run(
            ctypes.c_void_p(sizes.ctypes.data), *(ctypes.c_void_p(each.data_ptr()) for each in tensors)
        )


class _Plan:
    """Lists of one convolution for images of one size [H, W]: forward, and for each phase of its stride."""

    def __init__(self, layer: SparseConv2d, height: int, width: int) -> None:
        weight = layer.weight.detach().numpy()
        outputs, grouped, rows, columns = weight.shape
        self.size, (self.top, self.left) = (height, width), layer.padding
        (sy, sx), (dy, dx) = layer.stride, layer.dilation
        self.output = (
            (height + 2 * self.top - dy * (rows - 1) - 1) // sy + 1,
            (width + 2 * self.left - dx * (columns - 1) - 1) // sx + 1,
        )
        self.padded = (height + 2 * self.top, width + 2 * self.left)
        o, c, y, x = np.nonzero(weight)
        values = weight[o, c, y, x]
        c = o // (outputs // layer.groups) * grouped + c
        # Forward: one run over all rows for stride 1, otherwise a run for each row.
        (high, wide), pitch = self.output, self.padded[1]
        sizes = {"lines": high, "line": sy * pitch, "length": wide, "step": sx, "pitch": wide, "width": wide}
        if (sy, sx) == (1, 1):
            sizes |= {"lines": 1, "length": (high - 1) * pitch + wide, "pitch": pitch}
        sizes |= {"out_plane": high * wide, "out_row": wide, "out_step": 1}
        positions = (c * self.padded[0] + y * dy) * pitch + x * dx
        self.forward = _Lists(o, positions, values, outputs, sizes)
        # Backward: pixel (sy * u + i, sx * v + j) of the image reads pixel (u + a, v + b) of the gradient.
        down, right = self.top - y * dy, self.left - x * dx
        a, b = down // sy, right // sx  # for phase 0; the phases of later rows may read one more
        self.before = (int(max(0, -a.min(initial=0))), int(max(0, -b.min(initial=0))))
        spaces = [
            int(max(0, (size - 1) // stride + (far.max(initial=0) + 1) - (given - 1)))
            for size, stride, far, given in zip(self.size, layer.stride, (a, b), self.output, strict=True)
        ]
        self.gradient = (high + self.before[0] + spaces[0], wide + self.before[1] + spaces[1])
        self.backward = []
        for i in range(min(sy, height)):
            for j in range(min(sx, width)):
                fits = ((down + i) % sy == 0) & ((right + j) % sx == 0)
                u, v = -(-(height - i) // sy), -(-(width - j) // sx)
                row = (down[fits] + i) // sy + self.before[0]
                column = (right[fits] + j) // sx + self.before[1]
                positions = (o[fits] * self.gradient[0] + row) * self.gradient[1] + column
                phase = {
                    "lines": 1,
                    "length": (u - 1) * self.gradient[1] + v,
                    "step": 1,
                    "pitch": self.gradient[1],
                    "width": v,
                    "out_plane": height * width,
                    "out_row": sy * width,
                    "out_step": sx,
                    "out_first": i * width + j,
                }
                self.backward.append(_Lists(c[fits], positions, values[fits], grouped * layer.groups, phase))


def _bordered(images: Tensor, before: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return images [B, C, H, W] as [C, *size, B] among zeros."""
    moved = images.permute(1, 2, 3, 0)
    if moved.shape[1:3] == size:
        return moved.contiguous()
    channels, height, width, count = moved.shape
    found = moved.new_zeros((channels, *size, count))
    found[:, before[0] : before[0] + height, before[1] : before[1] + width] = moved
    return found


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor, layer: SparseConv2d) -> Tensor:
        plan = layer.plan(images.shape[2], images.shape[3])
        context.layer, context.plan = layer, plan
        source = _bordered(images, (plan.top, plan.left), plan.padded)
        found = source.new_empty((len(layer.offset), *plan.output, len(images)))
        plan.forward.run(layer.kernels, source, layer.offset, found)
        return found.permute(3, 0, 1, 2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer, plan = context.layer, context.plan
        source = _bordered(gradients[0], plan.before, plan.gradient)
        found = source.new_empty((layer.channels, *plan.size, source.shape[-1]))
        for lists in plan.backward:
            lists.run(layer.kernels, source, layer.nothing, found)
        return found.permute(3, 0, 1, 2), None


class SparseConv2d(nn.Module):
    """A convolution from lists of its kept weights. The number of images must be a multiple of 8."""

    weight: Tensor
    offset: Tensor
    nothing: Tensor

    def __init__(self, layer: nn.Conv2d, kernels: Kernels) -> None:
        """Copy the weights of ``layer``, on the CPU in float32."""
        super().__init__()
        weight = layer.weight.detach().clone()
        offset = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        self.channels = layer.in_channels
        self.register_buffer("weight", weight)
        self.register_buffer("offset", offset)
        self.register_buffer("nothing", torch.zeros(self.channels))
        self.kernels = kernels
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        padding = layer.padding
        assert not isinstance(padding, str)
        self.padding = (int(padding[0]), int(padding[1]))
        self._plans: dict[tuple[int, int], _Plan] = {}

    def plan(self, height: int, width: int) -> _Plan:
        """Return the lists for images of a size, made on first use."""
        if (height, width) not in self._plans:
            self._plans[height, width] = _Plan(self, height, width)
        return self._plans[height, width]

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = _Convolve.apply(images, self)
        return found


class SparseLinear(nn.Module):
    """A linear layer as a convolution of one pixel."""

    def __init__(self, layer: nn.Linear, kernels: Kernels) -> None:
        """Copy the weights of ``layer``."""
        super().__init__()
        single = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
        single.weight.data = layer.weight.detach()[:, :, None, None]
        if single.bias is not None:
            single.bias.data = layer.bias.detach()
        self.single = SparseConv2d(single, kernels)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.single(rows[:, :, None, None]).flatten(1)
        return found


class SparseNetwork(nn.Module):
    """A network of such layers, for any number of images: a few at a time, so that they stay in the caches.

    The last image is repeated to a multiple of 8.
    """

    def __init__(self, network: nn.Module) -> None:
        """Wrap a network whose layers are replaced."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits = [self._chunk(part) for part in torch.split(images, _AT_ONCE)]
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _chunk(self, images: Tensor) -> Tensor:
        missing = -len(images) % _LANES
        filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        logits: Tensor = self.network(filled)
        return logits[: len(images)]


def share_of_zeros(network: nn.Module) -> float:
    """Return the share of zeros among the weights of convolutions and linear layers."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    entries = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / entries if entries else 0.0


def sparse_compute(
    network: nn.Module, mode: Compute, device: torch.device, recorder: Recorder
) -> Callable[[nn.Module, Tensor], nn.Module | None] | None:
    """Return how attacks on ``network`` skip zeros; None where they do not.

    Never on a GPU; without a compiler the attacks compute as ever, with a note.
    """
    wanted = mode == "on" or (mode == "auto" and share_of_zeros(network) >= SPARSE_ABOVE)
    if not wanted or device.type != "cpu":
        return None
    kernels = Kernels.built()
    if kernels is None:
        recorder.note("no C compiler builds the sparse kernels (CC, cc): attacks compute zeros as well")
        return None
    return functools.partial(sparse_copy, kernels=kernels)


def sparse_copy(network: nn.Module, images: Tensor, *, kernels: Kernels) -> nn.Module | None:
    """Return a copy of the frozen ``network`` in eval mode that computes sparse layers from lists.

    ``images`` [n, C, H, W] decide whether it may be used. Returns None where no layer is sparse, or where
    predictions or logits on them differ by more than rounding.
    """
    private = folded_copy(network, images) or copy.deepcopy(network)
    chosen = [
        (owner, name, layer)
        for owner in private.modules()
        for name, layer in owner.named_children()
        if _suits(layer)
    ]
    if not chosen:
        return None
    for owner, name, layer in chosen:
        kind = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
        setattr(owner, name, kind(layer, kernels))  # type: ignore[arg-type]
    found = SparseNetwork(private)
    return found if all(agree(network, found, part) for part in torch.split(images, 50)) else None


def _suits(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d | nn.Linear) or hooked(layer):
        return False
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        return False
    if type(layer) not in (nn.Conv2d, nn.Linear, ImageConv2d):
        return False
    return share_of_zeros(layer) >= SPARSE_ABOVE and layer.weight.device.type == "cpu"
