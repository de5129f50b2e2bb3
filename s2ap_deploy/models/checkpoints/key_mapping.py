"""Parameter names in published checkpoints: prefixes, RST's layers, input normalization stored as tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.spec import Normalization

# DataParallel, torch.compile, RobustBench and robustness, HARP's ImageNet; Sequential(normalize, network).
PREFIXES = ("module.", "_orig_mod.", "model.", "basic_model.", "1.")

_LAYER = r"(?:(?:0|normalize|normalizer|normalization|normalize_layer|norm)\.)?"
_NORMALIZATION = re.compile(
    rf"(?:(?:module|_orig_mod|model|basic_model)\.)*{_LAYER}"
    r"(?:(?P<mean>mu|mean|means|new_mean)|(?P<std>sigma|std|sds|new_std))"
)


def strip_prefixes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors as they are, then without each prefix that all weights share, one after another.

    Yields (prefix removed so far, tensors). Tensors of a normalization need not share the prefix.
    """
    removed, current = "", dict(tensors)
    yield removed, current
    while True:
        weights = [name for name in current if not is_normalization(name)]
        prefix = next(
            (p for p in PREFIXES if weights and all(n.startswith(p) and len(n) > len(p) for n in weights)),
            None,
        )
        if prefix is None:
            return
        stripped = {name.removeprefix(prefix): value for name, value in current.items()}
        if len(stripped) != len(current):  # two names would become one
            return
        removed, current = removed + prefix, stripped
        yield removed, current


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


def is_normalization(name: str) -> bool:
    """Return whether a tensor of this name is the mean or the deviation of an input normalization."""
    return _NORMALIZATION.fullmatch(name) is not None


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


def _sibling(name: str, last: str) -> str:
    return name.removesuffix("running_mean") + last
