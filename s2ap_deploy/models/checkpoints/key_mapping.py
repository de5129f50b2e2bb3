"""Parameter names in published checkpoints: prefixes, RST's layers, input normalization stored as tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.spec import Normalization

PIXEL = 255.0

_MEANS = "mu|mean|means|new_mean|pixel_mean|image_mean|norm_mean|data_mean|input_mean|_mean"
_DEVIATIONS = "sigma|std|sds|stds|new_std|pixel_std|image_std|norm_std|data_std|input_std|_std"
_NORMALIZATION = re.compile(rf"(?:\w+\.){{0,5}}(?:(?P<mean>{_MEANS})|(?P<std>{_DEVIATIONS}))")
# What a training loop keeps beside the network: averaging counters, losses, metrics.
_STRAY = re.compile(r"(n_averaged$|criterion\.|loss(_fn)?\.|metrics?\.|(train|val|valid|test)_\w+\.)")
MOST_CHANNELS = 4
LEAST_SHARE = 0.5  # of all tensors, below which a prefix is not that of the network
DEEPEST = 5


def strip_prefixes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor], tuple[str, ...]]]:
    """Yield the tensors as they are, then without each prefix that at least half of them share.

    Yields (prefix removed, tensors, names ignored). A normalization need not share the prefix; any other
    tensor without it is ignored.
    """
    yield "", dict(tensors), ()
    if strays := tuple(name for name in tensors if _STRAY.match(name)):
        yield "", {name: tensor for name, tensor in tensors.items() if name not in strays}, strays
    current = [""]
    for _ in range(DEEPEST):
        current = [longer for prefix in current for longer in _prefixes(tensors, prefix)]
        for prefix in current:
            stripped, aside = _without(tensors, prefix)
            if stripped is not None:
                yield prefix, stripped, aside


def _prefixes(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Return the prefixes one part longer than ``prefix`` that enough of the weights share."""
    counts: Counter[str] = Counter()
    total = 0
    for name, tensor in tensors.items():
        if is_normalization(name, tensor):
            continue
        total += 1
        first, dot, _ = name.removeprefix(prefix).partition(".")
        if dot and name.startswith(prefix):
            counts[f"{prefix}{first}."] += 1
    return [longer for longer, count in counts.items() if count >= max(2, LEAST_SHARE * total)]


def _without(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor] | None, tuple[str, ...]]:
    stripped: dict[str, Tensor] = {}
    aside = []
    for name, tensor in tensors.items():
        if not name.startswith(prefix) and not is_normalization(name, tensor):
            aside.append(name)
            continue
        short = name.removeprefix(prefix)
        if short in stripped:  # two names would become one
            return None, ()
        stripped[short] = tensor
    return stripped, tuple(aside)


def adapt_rst(tensors: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """Yield the usual form of a network with the layers of RST (Fu et al. 2021), and notes about it.

    Yields nothing for other networks. RST has batch normalization without scale and shift, which is the same
    as scale 1 and shift 0; and a head ``fc`` that is a 1x1 convolution of averaged features [K, C, 1, 1],
    often without bias, which is the linear layer [K, C], ``fc`` or ``linear``, with bias 0.
    """
    bare = [name for name in tensors if name.endswith("running_mean")]
    bare = [name for name in bare if not {_sibling(name, "weight"), _sibling(name, "bias")} & tensors.keys()]
    head = tensors.get("fc.weight")
    convolution = head is not None and head.dim() == 4 and head.shape[2:] == (1, 1)
    if not bare and not convolution:
        return
    adapted, notes = dict(tensors), []
    for name in bare:
        adapted[_sibling(name, "weight")] = torch.ones_like(tensors[name])
        adapted[_sibling(name, "bias")] = torch.zeros_like(tensors[name])
    if bare:
        notes.append(f"{len(bare)} batch normalizations have no scale and shift: filled with 1 and 0")
    if head is None or not convolution:
        yield adapted, tuple(notes)
        return
    bias = tensors.get("fc.bias", torch.zeros(head.shape[0], dtype=head.dtype))
    others = {name: tensor for name, tensor in adapted.items() if name not in ("fc.weight", "fc.bias")}
    what = "the 1x1 convolution fc became the linear layer {}" + ("" if "fc.bias" in tensors else ", bias 0")
    for name in ("fc", "linear"):
        if not {f"{name}.weight", f"{name}.bias"} & others.keys():
            linear = {f"{name}.weight": head.flatten(1), f"{name}.bias": bias}
            yield others | linear, (*notes, what.format(name))


def is_normalization(name: str, tensor: Tensor | None = None) -> bool:
    """Return whether a tensor of this name is the mean or the deviation of an input normalization."""
    few = tensor is None or tensor.numel() <= MOST_CHANNELS
    return few and _NORMALIZATION.fullmatch(name) is not None


def find_normalization(tensors: Mapping[str, Tensor]) -> Normalization | None:
    """Return the normalization in ``tensors``, if they hold one mean and one deviation.

    Raises:
        CheckpointError: when only one of the two is there, or when their lengths differ.
    """
    found: dict[str, dict[str, tuple[float, ...]]] = {"mean": {}, "std": {}}
    for name, tensor in tensors.items():
        matched = _NORMALIZATION.fullmatch(name)
        if matched is not None:
            kind = "mean" if matched["mean"] else "std"
            found[kind][name] = tuple(float(value) for value in tensor.double().flatten())
    means, deviations = found["mean"], found["std"]
    if not means and not deviations:
        return None
    if len(set(means.values())) != 1 or len(set(deviations.values())) != 1:
        raise CheckpointError(
            f"the normalization inside the checkpoint is unclear: {', '.join([*means, *deviations])}",
            code="normalization-ambiguous",
            hint="give it as --mean and --std",
        )
    (mean,), (std,) = set(means.values()), set(deviations.values())
    if len(mean) != len(std):
        raise CheckpointError(
            f"the normalization inside the checkpoint has {len(mean)} means and {len(std)} deviations",
            code="normalization-length-mismatch",
        )
    return Normalization(mean=mean, std=std)


def for_unit_images(normalization: Normalization) -> tuple[Normalization, str | None]:
    """Return ``normalization`` for images in [0, 1], and a note where it was made for 0 to 255.

    (255 x - m) / s is (x - m / 255) / (s / 255).

    Raises:
        CheckpointError: for a mean above 1 that no images of either range have.
    """
    mean, std = normalization.mean, normalization.std
    if max(mean) <= 1:
        return normalization, None
    if max(mean) > PIXEL or min(mean) < 0 or not all(1 <= value <= PIXEL for value in std):
        raise CheckpointError(
            f"the normalization mean {mean}, std {std} is for images neither in [0, 1] nor in [0, 255]",
            code="normalization-not-for-images",
            hint="give mean and standard deviation of images in [0, 1] as --mean and --std",
        )
    scaled = Normalization(
        mean=tuple(value / PIXEL for value in mean), std=tuple(value / PIXEL for value in std)
    )
    return scaled, f"the normalization is for images in [0, 255]: mean {mean}, std {std} divided by 255"


def _sibling(name: str, last: str) -> str:
    return name.removesuffix("running_mean") + last
