"""BatchNorm statistics: shared over all ranks, frozen during extra passes, and recomputed.

torch's SyncBatchNorm does not support CPUs and does not check its counts; :func:`shared_statistics` works
with any backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.training.precision import compiled

_SHAREABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def layers(network: nn.Module) -> list[BatchNorm]:
    """Return the BatchNorm layers of ``network`` that keep running statistics."""
    return [m for m in network.modules() if isinstance(m, BatchNorm) and m.track_running_stats]


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Normalize passes inside by their batch, as in training, without updating running statistics."""
    tracking = layers(network)
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics by the plain average over ``batches`` of images [B, C, H, W].

    During a search the statistics belong to earlier masks. Returns the number of batches read, which is 0
    for a network without BatchNorm.
    """
    tracking = layers(network)
    if not tracking:
        return 0
    momenta = [layer.momentum for layer in tracking]
    training = [(module, module.training) for module in network.modules()]
    network.eval()
    for layer in tracking:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for the cumulative average
        layer.train()
    count = 0
    try:
        for images in batches:
            with torch.no_grad():
                network(images)
            count += 1
    finally:
        for layer, momentum in zip(tracking, momenta, strict=True):
            layer.momentum = momentum
        for module, was in training:
            module.training = was
    return count


@contextmanager
def shared_statistics(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Normalize training passes inside by the batch over all ranks, and update statistics from it.

    Every rank makes the same passes in the same order. Only layers of torch's three BatchNorm classes take
    part; a layer of any other class normalizes by the rows of its own rank.
    """
    taking_part = [m for m in network.modules() if type(m) in _SHAREABLE] if ranks.size > 1 else []
    originals: list[type[nn.Module]] = [type(layer) for layer in taking_part]
    uncompiled = compiled(network)
    for layer in taking_part:
        layer.__class__ = _sharing(type(layer), ranks, uncompiled)
    try:
        yield
    finally:
        for layer, original in zip(taking_part, originals, strict=True):
            layer.__class__ = original


_SHARING: dict[tuple[type[nn.Module], Ranks, bool], type[nn.Module]] = {}


def _sharing(kind: type[nn.Module], ranks: Ranks, uncompiled: bool) -> type[nn.Module]:
    """Return a subclass of ``kind`` with statistics over ``ranks``; a copied layer keeps it, without state.

    The class is cached, because a compiler treats a layer of another class as another layer. With
    ``uncompiled`` the compiler skips this layer, as collectives cannot be compiled.
    """
    key = kind, ranks, uncompiled
    if key not in _SHARING:
        content: dict[str, Any] = {"ranks": ranks}
        if uncompiled:
            content["forward"] = torch.compiler.disable(_Shared.forward)  # type: ignore[no-untyped-call]
        _SHARING[key] = type(f"Shared{kind.__name__}", (_Shared, kind), content)
    return _SHARING[key]


class _Shared(BatchNorm):
    """The training pass of a BatchNorm layer whose statistics are shared over ranks."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        mean, variance, count = batch_statistics(x, self.ranks)
        if count.device.type == "cpu" and count < 2:  # looking would wait for another device
            raise ValueError(f"BatchNorm has no variance in a batch of shape {list(x.shape)}")
        if self.track_running_stats and self.running_mean is not None:
            self._keep(mean, variance * (count.double() / (count.double() - 1)))
        out: Tensor = _Normalize.apply(x, mean, variance, self.weight, self.bias, self.eps, count, self.ranks)
        return out

    @torch.no_grad()
    def _keep(self, mean: Tensor, unbiased: Tensor) -> None:
        """Update the running statistics as torch's own layer does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


@torch.no_grad()
def batch_statistics(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean, biased variance [C] and number of values of ``x`` [b, C, ...] over all ranks.

    The count is a scalar tensor: reading it would synchronize with the device in every layer.

    The ranks' own means and variances are merged (Chan, Golub and LeVeque, 1979), rather than sums of
    squares, which cancel. Rows of a rank that is not ``present`` do not count. Never below float32.
    """
    values = x if x.dtype == torch.float64 else x.float()
    others = [dim for dim in range(x.dim()) if dim != 1]
    variance, mean = torch.var_mean(values, dim=others, correction=0)
    here = x.numel() // x.shape[1] if ranks.present else 0
    found = ranks.gather(torch.cat([mean, variance, mean.new_full((1,), here)]))
    means, variances = found[:, : len(mean)], found[:, len(mean) : -1]
    weights = found[:, -1:]
    count = weights.sum()
    some = count > 0
    divisor = torch.where(some, count, 1)
    merged = (weights * means).sum(dim=0) / divisor
    spread = (weights * (variances + (means - merged) ** 2)).sum(dim=0) / divisor
    return torch.where(some, merged, mean), torch.where(some, spread, variance), count


class _Normalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance depend on all ranks' x.

    Backward (Ioffe and Szegedy, 2015, section 3, gathered): with x̂ the normalized x and N the count,
    dx = weight / sqrt(variance + eps) (dy - sum(dy) / N - x̂ sum(dy x̂) / N), both sums over all ranks.
    The gradients of weight and bias are of the rank's own rows: the loop sums those over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        count: Tensor,
        ranks: Ranks,
    ) -> Tensor:
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, mean, scale, weight, count)
        ctx.ranks, ctx.counts = ranks, ranks.present
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        others = [dim for dim in range(x.dim()) if dim != 1]
        dy = gradients[0].to(mean.dtype)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        of_bias = dy.sum(dim=others)
        of_weight = (dy * normalized).sum(dim=others)
        both = torch.stack([of_bias, of_weight])
        ctx.ranks.sum_([both])
        center, slope = (both / count).view(2, *shape)
        if not ctx.counts:  # padding rows have not changed statistics
            center, slope = torch.zeros_like(center), torch.zeros_like(slope)
        factor = scale if weight is None else scale * weight.to(mean.dtype)
        dx = (dy - center - normalized * slope) * factor.view(shape)
        learned = (None, None) if weight is None else (of_weight.to(weight.dtype), of_bias.to(weight.dtype))
        return (dx.to(x.dtype), None, None, *learned, None, None, None)
