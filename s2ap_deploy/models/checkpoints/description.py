"""Everything that can be said about a checkpoint file, as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError, CheckpointError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import fitting, foreign, masked
from s2ap_deploy.models.checkpoints.fitting import Fitted, nonfinite
from s2ap_deploy.models.checkpoints.masked import DenseFromMasks
from s2ap_deploy.models.checkpoints.reading import RawCheckpoint, read_tensors
from s2ap_deploy.models.checkpoints.state_dict_spec import learnable_values
from s2ap_deploy.models.classifier import Classifier, prunable

REACHED = "weights of the convolutions and linear layers that a forward pass uses"
REGISTERED = "weights of all convolutions and linear layers (no input size known to run the network on)"
SHAPED = "tensors of two or more dimensions called weight (no architecture known)"


def describe(
    path: Path | str,
    *,
    trust_pickle: bool = False,
    arch: str | None = None,
    keep: float | None = None,
    alpha: float | None = None,
) -> dict[str, Any]:
    """What ``path`` holds: format, hash, architecture (or the closest, where ``arch`` names none), layers.

    A checkpoint that could not be loaded (no architecture fits, values are NaN, its masks need ``keep``) is
    described all the same and says why under ``warnings``; ``sparsity`` is zeros / ``prunable_weights``, of
    the weights that ``denominator`` names; ``layout`` is how somebody else's pruned file keeps its masks.
    Raises CheckpointError and UnsafePickleError for a file that cannot be read, ArchitectureError when
    ``arch`` is no architecture at all, and UsageError for a ``keep`` or ``alpha`` that has no use.
    """
    raw = read_tensors(path, trust_pickle=trust_pickle)
    if arch is not None:
        registry.resolve(arch)
    fitted: Fitted | None = None
    warnings = [
        f"{name}: {count} of {tensor.numel()} values are NaN or infinite"
        for name, tensor in raw.tensors.items()
        if (count := nonfinite(tensor))
    ]
    dense, unmasked = _unmasked(raw, str(path), keep, alpha, warnings)
    try:
        fitted = fitting.fit(dense, str(path), arch=arch)
    except ArchitectureError as error:
        # What is closest has its own place.
        hint = f"; {error.hint}" if error.hint else ""
        warnings.append(f"{error.message.partition('; closest:')[0]}{hint}")
    tensors = dense.tensors if fitted is None else fitted.tensors
    names, denominator = _prunable(dense, fitted)
    layers = [_layer(name, tensors[name]) for name in names if name in tensors]
    weights = sum(layer["weights"] for layer in layers)
    zeros = sum(layer["zeros"] for layer in layers)
    return {
        "file": str(path),
        "sha256": raw.sha256,
        "format": raw.format,
        "wrapper": raw.wrapper,
        "prefix": fitted.prefix if fitted else None,
        "architecture": fitted.architecture.name if fitted else None,
        "layout": unmasked.layout,
        "closest": [] if fitted or arch is not None else _closest(dense),
        "num_classes": fitted.num_classes if fitted else None,
        "parameters": learnable_values(tensors),
        "prunable_weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else None,
        "denominator": denominator,
        "layers": layers,
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in raw.tensors.values())),
        "devices": list(raw.locations),
        "normalization": _normalization(raw, fitted),
        "info": raw.info.model_dump(mode="json") if raw.info else None,
        "notes": [
            *raw.notes,
            *unmasked.notes(fitted.unused if fitted else ()),
            *(fitted.notes if fitted else ()),
        ],
        "warnings": warnings,
        "tensors": [
            {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in raw.tensors.items()
        ],
    }


def _unmasked(
    raw: RawCheckpoint, path: str, keep: float | None, alpha: float | None, warnings: list[str]
) -> tuple[RawCheckpoint, DenseFromMasks]:
    """The plain weights of ``raw``; unmasked, with a warning, where the masks cannot be rebuilt.

    Options that were given are not described away: they are wrong, or the file contradicts them.
    """
    try:
        return masked.opened(raw, path, keep=keep, alpha=alpha)
    except (CheckpointError, UsageError) as error:
        if keep is not None or alpha is not None:
            raise
        hint = f"; {error.hint}" if error.hint else ""
        warnings.append(f"the weights below are not masked: {error.message.removeprefix(f'{path}: ')}{hint}")
    plain = masked.without_scores(raw.tensors)
    return dataclasses.replace(raw, tensors=plain), DenseFromMasks(plain, _layout(raw))


def _layout(raw: RawCheckpoint) -> str | None:
    try:
        return masked.layout_of(raw.tensors)
    except CheckpointError:  # two layouts at once, which the warning tells
        return None


def _prunable(raw: RawCheckpoint, fitted: Fitted | None) -> tuple[list[str], str]:
    """Names of the prunable weights, in forward order where the network can run, and what they are."""
    if fitted is None:
        shaped = [n for n, t in raw.tensors.items() if t.dim() >= 2 and n.endswith("weight")]
        return shaped, SHAPED
    network = fitting.build(fitted)
    size = raw.info.preprocessing.size if raw.info else fitted.architecture.input_size
    if size is None:
        layers = network.named_modules()
        return [f"{n}.weight" for n, m in layers if isinstance(m, (nn.Conv2d, nn.Linear))], REGISTERED
    names = prunable(Classifier(network), size)
    return [name.removeprefix(fitting.NETWORK) for name in names], REACHED


def _layer(name: str, tensor: Tensor) -> dict[str, Any]:
    weights = tensor.numel()
    zeros = int((tensor == 0).sum())
    return {
        "name": name,
        "shape": list(tensor.shape),
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else None,
    }


def _closest(raw: RawCheckpoint) -> list[dict[str, str]]:
    """The nearest architectures and what differs, for the names with every common prefix gone."""
    names = fitting.candidates(raw.tensors)[-1].tensors
    weights = {name: tensor for name, tensor in names.items() if not foreign.is_normalization(name)}
    return [{"architecture": d.architecture.name, "differs": str(d)} for d in registry.closest(weights)]


def _normalization(raw: RawCheckpoint, fitted: Fitted | None) -> dict[str, Any] | None:
    found = fitted.normalization if fitted else None
    return found.model_dump(mode="json") if found else None
