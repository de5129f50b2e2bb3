"""Everything that can be said about a checkpoint file, as plain values for JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models import fitting, foreign, registry
from s2ap_deploy.models.classifier import Classifier, prunable
from s2ap_deploy.models.fitting import Fitted, nonfinite
from s2ap_deploy.models.reading import RawCheckpoint, read_tensors
from s2ap_deploy.models.skeleton import learnable_values

REACHED = "weights of the convolutions and linear layers that a forward pass uses"
REGISTERED = "weights of all convolutions and linear layers (no input size known to run the network on)"
SHAPED = "tensors of two or more dimensions called weight (no architecture known)"


def describe(path: Path | str, *, trust_pickle: bool = False, arch: str | None = None) -> dict[str, Any]:
    """What ``path`` holds: format, hash, architecture or the closest ones, sparsity and a table of layers.

    A checkpoint that could not be loaded (no architecture fits, values are NaN) is described all the same and
    says why under ``warnings``; ``sparsity`` is zeros / ``prunable_weights``, of the weights that
    ``denominator`` names.  Raises CheckpointError and UnsafePickleError for a file that cannot be read, and
    ArchitectureError when ``arch`` is no architecture at all.
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
    try:
        fitted = fitting.fit(raw, str(path), arch=arch)
    except ArchitectureError as error:
        warnings.append(error.message)
    tensors = raw.tensors if fitted is None else fitted.tensors
    names, denominator = _prunable(raw, fitted)
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
        "closest": [] if fitted else _closest(raw),
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
        "notes": [*raw.notes, *(fitted.notes if fitted else ())],
        "warnings": warnings,
        "tensors": [
            {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in raw.tensors.items()
        ],
    }


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
    zeros = weights - int(tensor.count_nonzero())
    return {
        "name": name,
        "shape": list(tensor.shape),
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else None,
    }


def _closest(raw: RawCheckpoint) -> list[dict[str, str]]:
    """The nearest architectures and what differs, for the names with every common prefix gone."""
    _, stripped = list(foreign.strippings(raw.tensors))[-1]
    weights = {name: tensor for name, tensor in stripped.items() if not foreign.is_normalization(name)}
    return [{"architecture": d.architecture.name, "differs": str(d)} for d in registry.closest(weights)]


def _normalization(raw: RawCheckpoint, fitted: Fitted | None) -> dict[str, Any] | None:
    found = fitted.normalization if fitted else None
    return found.model_dump(mode="json") if found else None
