"""Habits of other people's checkpoints: wrappers, prefixes, normalization kept as tensors. No files here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.spec import Normalization

# In this order: a file with both `state_dict` and `ema` means the first.
WRAPPERS = ("state_dict", "net", "model_state_dict", "model", "ema")
# DataParallel, torch.compile, RobustBench and robustness, HARP's ImageNet; Sequential(normalize, network).
PREFIXES = ("module.", "_orig_mod.", "model.", "basic_model.", "1.")

_LAYER = r"(?:(?:0|normalize|normalizer|normalization|normalize_layer|norm)\.)?"
_NORMALIZATION = re.compile(
    rf"(?:(?:module|_orig_mod|model|basic_model)\.)*{_LAYER}"
    r"(?:(?P<mean>mu|mean|means|new_mean)|(?P<std>sigma|std|sds|new_std))"
)
# MadryLab's robustness saves the network twice, the second time inside its attacker.
_COPY = re.compile(r"((?:module\.)*)attacker\.(?:normalize\.|model\.)")


@dataclass(frozen=True)
class Unwrapped:
    """The tensors of a file under the names it gives them, and what was done to find them."""

    tensors: dict[str, Tensor]
    wrapper: str | None
    notes: tuple[str, ...]


def unwrap(content: object) -> Unwrapped:
    """Find the state dict in what a file holds.

    Raises CheckpointError when there is none, naming what was found instead.
    """
    path: list[str] = []
    notes: list[str] = []
    while True:
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"the file holds {_kind(content)}, not a dictionary of tensors",
                hint="save it with torch.save(model.state_dict(), 'model.pt')",
            )
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), (Mapping, nn.Module))), None)
        if wrapper is None:
            break
        others = [
            key for key in WRAPPERS if key != wrapper and isinstance(content.get(key), (Mapping, nn.Module))
        ]
        if others:
            notes.append(f"the file holds {', '.join([wrapper, *others])}; read {wrapper}")
        path.append(wrapper)
        content = content[wrapper]
    if path:
        notes.insert(0, f"weights found under {'.'.join(path)}")
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"it has no tensors, neither at the top nor under {', '.join(WRAPPERS)}; it holds: {found}",
            hint="save it with torch.save(model.state_dict(), 'model.pt')",
        )
    dropped = [str(key) for key in content if key not in tensors]
    if dropped:
        notes.append(f"left aside, as they are no tensors: {', '.join(dropped[:8])}")
    copies = [name for name in tensors if _is_copy(name, tensors)]
    if copies:
        tensors = {name: value for name, value in tensors.items() if name not in copies}
        notes.append(f"left aside: a second copy of the network ({len(copies)} tensors under attacker)")
    return Unwrapped(tensors, ".".join(path) or None, tuple(notes))


def strippings(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors as they are, then without each prefix that all weights have in common, one after another.

    Yields (prefix removed so far, tensors).  Tensors of a normalization need not share the prefix.
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


def adaptations(tensors: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """``tensors`` of a network with RST's habits in the form that other networks have, and notes about it.

    Yields nothing for a file without these habits: batch normalization without scale and shift, which is the
    same as scale 1 and shift 0; and a head ``fc`` that is a 1x1 convolution of averaged features
    [K, C, 1, 1], often without bias, which is the linear layer [K, C], ``fc`` or ``linear``, with bias 0.
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
    """Whether a tensor of this name is the mean or the deviation of an input normalization."""
    return _NORMALIZATION.fullmatch(name) is not None


def normalization(tensors: Mapping[str, Tensor]) -> Normalization | None:
    """The normalization that ``tensors`` spell out, if they hold one mean and one deviation.

    Raises CheckpointError when only one of the two is there, or when their lengths differ.
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
            hint="give it as --mean and --std",
        )
    (mean,), (std,) = set(means.values()), set(deviations.values())
    if len(mean) != len(std):
        raise CheckpointError(
            f"the normalization inside the checkpoint has {len(mean)} means and {len(std)} deviations"
        )
    return Normalization(mean=mean, std=std)


def _sibling(name: str, last: str) -> str:
    return name.removesuffix("running_mean") + last


def _is_copy(name: str, tensors: Mapping[str, Tensor]) -> bool:
    matched = _COPY.match(name)
    if matched is None:
        return False
    rest = name[matched.end() :]
    return any(matched[1] + start + rest in tensors for start in ("model.", "normalizer."))


def _kind(content: Any) -> str:
    kind = type(content)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
