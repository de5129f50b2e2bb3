"""Checks for gradient masking and other reasons not to trust the result of an attack.

Each flag is raised by an observation on a few images in a few passes: its absence proves nothing.
Those that only the attacks can show (zero_gradient, square_improves) are raised by the ledger.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

RELATIVE = 1e-4
"""Two passes over the same image that differ by more, relative to the largest logit, are different answers.
Rounding in another order of summation stays near 1e-6."""

_PRECISION = 1e-3  # of float32 against float64, relative to the spread of the logits
_CERTAIN = 0.95  # share of answers without any loss left
_PROBES = 8  # images for the passes below; a doubt needs one
_UNBOUND = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def reliability_flags(
    network: nn.Module, images: Tensor, first: Tensor, second: Tensor, device: torch.device
) -> tuple[str, ...]:
    """Check a frozen ``network`` on images [n, C, H, W] on the CPU; returns flags as in the certificate.

    ``first`` and ``second`` [n, K] are the logits of two passes over all images. A randomized network is
    not checked for precision or batch dependence, as every answer would differ.
    """
    flags = list(output_flags(first, second))
    chosen = torch.linspace(0, len(images) - 1, min(_PROBES, len(images))).round().long()
    probes = images[chosen].to(device)
    with torch.no_grad():
        if "randomized" not in flags and batch_dependent(network, probes):
            flags.append("batch_dependent")
        if dynamic_control_flow(network, probes):
            flags.append("dynamic_control_flow")
        if saturated(first) or ("randomized" not in flags and loss_of_precision(network, probes)):
            flags.append("loss_of_precision")
    return tuple(flags)


def output_flags(first: Tensor, second: Tensor) -> tuple[str, ...]:
    """Check for ``randomized`` and ``not_logits`` by two passes over the same clean images, [n, K] each."""
    flags = []
    if _differ(first, second, RELATIVE):
        flags.append("randomized")
    if first.min() >= 0 and ((first.sum(dim=1) - 1.0).abs() < 1e-5).all():
        flags.append("not_logits")
    return tuple(flags)


def batch_dependent(network: nn.Module, probes: Tensor) -> bool:
    """Return whether an image's logits change with its neighbors in the batch (probes [b, C, H, W]).

    Attacks run in batches and stop image by image, which assumes that they do not.
    """
    alone = torch.cat([network(probe[None]) for probe in probes])
    among = network(torch.cat([probes, 1 - probes]))[: len(probes)]  # never the image's own copy
    return _differ(alone, among, RELATIVE)


def dynamic_control_flow(network: nn.Module, probes: Tensor) -> bool:
    """Return whether the network's code takes a different path for different images (probes [b, C, H, W]).

    Three signs: a value computed from the image is read back into Python (as every ``if`` on it must, and as
    operations do whose output's shape depends on values), two images of one shape cause different operations,
    or the forward pass computes gradients, as networks do that adapt at test time. Attacks follow the
    gradient of the path that was taken, which says nothing about other paths.
    """
    ways = []
    for probe in probes:
        way = _Way(probe[None].clone())
        with torch.no_grad(), way:
            network(way.image)
        if way.reads or way.learns:
            return True
        ways.append(way.steps)
    return any(steps != ways[0] for steps in ways)


def loss_of_precision(network: nn.Module, probes: Tensor) -> bool:
    """Return whether float32 is too coarse: logits of the probes [b, C, H, W] differ in float64.

    Gradients are then coarser still. A network that fails in float64 cannot be compared and gets no flag.
    """
    coarse = network(probes).double()
    try:
        fine = copy.deepcopy(network).double()(probes.double()).double()
    except (RuntimeError, TypeError):  # it makes float32 tensors of its own
        return False
    if not bool(fine.isfinite().all()):
        return False
    # An offset common to all classes changes no prediction and may hide the error of the rest.
    fine, coarse = (logits - logits.mean(dim=1, keepdim=True) for logits in (fine, coarse))
    return bool((fine - coarse).abs().max() > _PRECISION * fine.abs().max())


def saturated(logits: Tensor) -> bool:
    """Return whether nearly all logits [n, K] are saturated in float32: their cross entropy is exactly 0.

    Its gradient has then lost the label's own part, and APGD-CE sees neither progress nor direction. A
    well trained network on easy images is certain of most of them; DLR's losses have no such limit.
    """
    return bool((logits.softmax(dim=1).amax(dim=1) == 1).double().mean() > _CERTAIN)


class _Way(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of one pass: ``steps``, whether one ``reads`` a value that comes from the image, and
    whether one runs with gradients enabled again (``learns``)."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.image = image
        self.steps: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        self.reads = self.learns = False
        # Storages with values from the image; kept alive, so that no address is used twice.
        self._kept = [image]
        self._touched = {image.untyped_storage().data_ptr()}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = _tensors((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        self.learns = self.learns or torch.is_grad_enabled()
        if any(tensor.untyped_storage().data_ptr() in self._touched for tensor in given):
            self.reads = self.reads or any(tag in func.tags for tag in _UNBOUND)
            for tensor in made:
                self._kept.append(tensor)
                self._touched.add(tensor.untyped_storage().data_ptr())
        self.steps.append((str(func), tuple(tuple(tensor.shape) for tensor in made)))
        return result


def _tensors(values: Any) -> list[Tensor]:
    """List the tensors in nested arguments."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _differ(one: Tensor, other: Tensor, relative: float) -> bool:
    return bool((one - other).abs().max() > relative * max(1.0, float(one.abs().max())))
