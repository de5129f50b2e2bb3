"""Load, save and describe checkpoint files.

A file of this tool needs no option; for any other, the architecture is matched and missing facts are
arguments. Loading is strict: every tensor is used, or is named in a note or an error.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.errors import ArchitectureError, CheckpointError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import masked
from s2ap_deploy.models.checkpoints.build import build_classifier, build_network, count_nonfinite, fill
from s2ap_deploy.models.checkpoints.key_mapping import for_unit_images, is_normalization
from s2ap_deploy.models.checkpoints.masked import DenseFromMasks
from s2ap_deploy.models.checkpoints.match import (
    Match,
    closest,
    key_readings,
    learnable_values,
    match_architecture,
    match_dense,
    unmatched,
)
from s2ap_deploy.models.checkpoints.read import (
    FORMAT,
    METADATA_KEY,
    CheckpointInfo,
    RawCheckpoint,
    read_info,
    read_tensors,
)
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.models.used_weights import used_weights, weight_count
from s2ap_deploy.spec import Normalization, Preprocessing, WeightCount

__all__ = ["CheckpointInfo", "RawCheckpoint", "describe", "load", "read_info", "read_tensors", "save"]

REACHED = "weights that multiply activations in a forward pass"
REGISTERED = "parameters of two or more dimensions (no input size known to run the network on)"
SHAPED = "tensors of two or more dimensions called weight (no architecture known)"


def load(
    path: Path | str,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    preprocessing: Preprocessing | None = None,
    normalization: Normalization | None = None,
    trust_pickle: bool = False,
    keep: float | None = None,
    alpha: float | None = None,
    key: str | None = None,
) -> tuple[Classifier, CheckpointInfo, tuple[str, ...]]:
    """Return the classifier in eval mode on the CPU in float32, its facts, and notes for the user.

    Args:
        arch: a registered name or an import path; None finds it by names and shapes.
        num_classes: what the file must have; None accepts any number.
        preprocessing: overrides what the file or the architecture states.
        normalization: overrides what the file states.
        trust_pickle: unpickle a file that requests more than tensors, which may run code in it.
        keep: the fraction kept, which rebuilds the masks of a pruned file that holds scores. Weights come out
            dense, and ``sparsity`` of the facts is measured on them.
        alpha: HARP's k_min / ``keep``.
        key: the path to the weights inside the file, where it holds several.

    Raises:
        CheckpointError: for a file that cannot be read, weights that are not finite, another number of
            classes, and a compacted network that the plan next to it does not describe.
        UnsafePickleError: for a pickle that requests more than tensors, without ``trust_pickle``.
        ArchitectureError: when no architecture, or more than one, matches.
        UsageError: for a ``keep`` or ``alpha`` that is missing or has no use.
    """
    raw = read_tensors(path, trust_pickle=trust_pickle, key=key)
    match = match_architecture(raw, arch=arch, keep=keep, alpha=alpha)
    return build_classifier(
        raw, match, num_classes=num_classes, preprocessing=preprocessing, normalization=normalization
    )


def save(path: Path | str, classifier: Classifier, info: CheckpointInfo) -> None:
    """Write weights and facts to one file, atomically.

    ``.safetensors`` keeps the facts as JSON in its header; ``.pt`` and ``.pth`` hold a dictionary that
    ``torch.load(weights_only=True)`` reads. Equal contents give equal bytes.

    Raises:
        UsageError: for another suffix.
        StorageError: when the disk refuses.
    """
    path = Path(path)
    facts = info.model_dump_json()
    state = {name: value.detach().to("cpu").contiguous() for name, value in classifier.state_dict().items()}
    if path.suffix == ".safetensors":
        # Cloned because the format refuses tensors that share memory, as tied weights do.
        own = {name: value.clone() for name, value in state.items()}
        files.write_bytes(path, safetensors.torch.save(own, metadata={METADATA_KEY: facts}))
    elif path.suffix in {".pt", ".pth"}:
        stream = io.BytesIO()
        torch.save({"format": FORMAT, "info": facts, "state_dict": state}, stream)
        files.write_bytes(path, stream.getvalue())
    else:
        raise UsageError(
            f"cannot tell the format of {path}",
            code="checkpoint-suffix-unknown",
            hint="use the suffix .safetensors or .pt",
        )


def describe(
    path: Path | str,
    *,
    trust_pickle: bool = False,
    arch: str | None = None,
    keep: float | None = None,
    alpha: float | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Return what ``path`` holds as plain values: format, hash, architecture (or the closest), layers.

    A checkpoint that cannot be loaded (no architecture matches, values are NaN, its masks need ``keep``) is
    described as well, with the reason under ``warnings``. ``sparsity`` is zeros / ``prunable_weights``, of
    the weights that ``denominator`` names; ``layout`` is how a file pruned elsewhere keeps its masks;
    ``not_compared`` lists what a match by names and shapes does not show.

    Raises:
        CheckpointError, UnsafePickleError: for a file that cannot be read.
        ArchitectureError: when ``arch`` is no architecture at all.
        UsageError: for a ``keep`` or ``alpha`` that has no use.
    """
    raw = read_tensors(path, trust_pickle=trust_pickle, key=key)
    if arch is not None:
        registry.resolve(arch)
    match: Match | None = None
    warnings = [
        f"{name}: {count} of {tensor.numel()} values are NaN or infinite"
        for name, tensor in raw.tensors.items()
        if (count := count_nonfinite(tensor))
    ]
    dense = _dense(raw, keep, alpha, warnings)
    try:
        match = match_dense(raw, dense, arch=arch)
    except ArchitectureError as error:
        # The closest architectures have a key of their own.
        none_fits = error.code == "architecture-unmatched"
        reason = unmatched(len(dense.tensors)) if none_fits else error.message
        warnings.append(f"{reason}; {error.hint}" if error.hint else reason)
    if match is not None and not warnings:
        try:
            fill(build_network(match), match.tensors, raw.path)
        except CheckpointError as error:
            warnings.append(error.message)
    tensors = dense.tensors if match is None else match.tensors
    names, denominator, kinds = _counted(raw, dense, match)
    layers = [_layer(name, tensors[name]) for name in names if name in tensors]
    weights = sum(layer["weights"] for layer in layers)
    zeros = sum(layer["zeros"] for layer in layers)
    normalization, notes = _normalization(raw, match, warnings)
    return {
        "file": str(path),
        "sha256": raw.sha256,
        "format": raw.format,
        "wrapper": raw.wrapper,
        "prefix": match.prefix if match else None,
        "architecture": match.architecture.name if match else None,
        "matched_by": match.matched_by if match else None,
        "not_compared": list(match.not_compared) if match else [],
        "layout": dense.layout,
        "closest": [] if match or arch is not None else _closest(dense.tensors),
        "num_classes": match.num_classes if match else None,
        "parameters": learnable_values(tensors),
        "prunable_weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else None,
        "denominator": denominator,
        "weights": kinds.model_dump(mode="json") if kinds else None,
        "layers": layers,
        "dtypes": dict(Counter(_dtype(tensor) for tensor in raw.tensors.values())),
        "devices": list(raw.locations),
        "normalization": normalization.model_dump(mode="json") if normalization else None,
        "info": raw.info.model_dump(mode="json") if raw.info else None,
        "notes": [*(match.notes if match else (*raw.notes, *dense.notes())), *notes],
        "warnings": warnings,
        "tensors": [
            {"name": name, "shape": list(tensor.shape), "dtype": _dtype(tensor)}
            for name, tensor in raw.tensors.items()
        ],
    }


def _normalization(
    raw: RawCheckpoint, match: Match | None, warnings: list[str]
) -> tuple[Normalization | None, list[str]]:
    """Return the normalization as it would be loaded, with a note where it was rescaled.

    One that is for no images is left as it is, with a warning.
    """
    found = match.normalization if match else None
    if found is None or raw.info is not None:
        return found, []
    try:
        found, note = for_unit_images(found)
    except CheckpointError as error:
        warnings.append(f"{error.message}; {error.hint}")
        return found, []
    return found, [] if note is None else [note]


def _dense(
    raw: RawCheckpoint, keep: float | None, alpha: float | None, warnings: list[str]
) -> DenseFromMasks:
    """Return the dense weights of ``raw``; unmasked, with a warning, where the masks cannot be rebuilt.

    An error about an option that was given is raised: the option is wrong, or the file contradicts it.
    """
    try:
        return masked.dense_from_masks(raw, keep=keep, alpha=alpha)
    except (CheckpointError, UsageError) as error:
        if keep is not None or alpha is not None:
            raise
        hint = f"; {error.hint}" if error.hint else ""
        reason = error.message.removeprefix(f"{raw.path}: ")
        warnings.append(f"the weights below are not masked: {reason}{hint}")
    try:
        layout = masked.layout_of(raw.tensors)
    except CheckpointError:  # two layouts at once, as the warning says
        layout = None
    return DenseFromMasks(masked.without_scores(raw.tensors), layout)


def _counted(
    raw: RawCheckpoint, dense: DenseFromMasks, match: Match | None
) -> tuple[list[str], str, WeightCount | None]:
    """Return the names of the counted weights, in forward order where possible, what they are, and counts."""
    if match is None:
        shaped = [n for n, t in dense.tensors.items() if t.dim() >= 2 and n.endswith("weight")]
        return shaped, SHAPED, None
    network = build_network(match)
    size = raw.info.preprocessing.size if raw.info else match.architecture.input_size
    if size is None:
        return [n for n, p in network.named_parameters() if p.dim() >= 2], REGISTERED, None
    used = used_weights(network, size)
    return list(used.counted), REACHED, weight_count(network, used)


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


def _closest(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the nearest architectures and what differs, for the names without any common prefix.

    Of several that fit exactly, none is taken by itself.
    """
    names = key_readings(tensors)[-1].tensors
    weights = {name: tensor for name, tensor in names.items() if not is_normalization(name, tensor)}
    return [
        {"architecture": found.architecture.name, "exact": found.exact, "differs": str(found)}
        for found in closest(weights)
    ]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
