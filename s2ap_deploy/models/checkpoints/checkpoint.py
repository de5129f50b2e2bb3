"""Checkpoint files in and out: the public face of this room.

A file of this tool needs no option; for anybody else's, the architecture is matched and the missing facts are
arguments.  Loading ends strictly: every tensor has its place or is named in an error.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from s2ap_deploy import files, runtime
from s2ap_deploy.errors import CheckpointError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.models.channels.channel_plan import Plan
from s2ap_deploy.models.channels.narrowing import narrow
from s2ap_deploy.models.checkpoints import fitting, masked
from s2ap_deploy.models.checkpoints.description import describe
from s2ap_deploy.models.checkpoints.fitting import Fitted
from s2ap_deploy.models.checkpoints.info import CheckpointInfo
from s2ap_deploy.models.checkpoints.reading import FORMAT, METADATA_KEY, RawCheckpoint, read_tensors
from s2ap_deploy.models.classifier import Classifier, dry_run, prunable
from s2ap_deploy.spec import Normalization, Preprocessing, ThreatModel

__all__ = ["CheckpointInfo", "RawCheckpoint", "describe", "load", "read_tensors", "save"]


def load(
    path: Path | str,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    data: str | None = None,
    preprocessing: Preprocessing | None = None,
    normalization: Normalization | None = None,
    threat: ThreatModel | None = None,
    class_names: Sequence[str] | None = None,
    trust_pickle: bool = False,
    keep: float | None = None,
    alpha: float | None = None,
) -> tuple[Classifier, CheckpointInfo, tuple[str, ...]]:
    """The classifier in eval mode on the CPU in float32, its facts, and notes for the user.

    Arguments that are not None override what a file of ours says and complete what another one does not;
    ``num_classes`` only checks.  ``threat`` and ``data`` may stay unknown.  ``source_sha256`` of the facts is
    the hash of this file.  ``keep`` (fraction kept) and HARP's ``alpha`` rebuild the masks of a pruned file
    that holds scores; its weights come out dense, and ``sparsity`` of the facts is measured on them.  A
    compacted network of ours gets its smaller layers, and the plan beside it, if any, is checked.  Raises
    CheckpointError (also for non-finite weights, and for another number of classes), UnsafePickleError,
    ArchitectureError, and UsageError for a ``keep`` or ``alpha`` that is missing or has no use.
    """
    raw = read_tensors(path, trust_pickle=trust_pickle)
    raw, unmasked = masked.opened(raw, str(path), keep=keep, alpha=alpha)
    fitted = fitting.fit(raw, str(path), arch=arch)
    stated = raw.info
    notes = [*raw.notes, *unmasked.notes(fitted.unused), *fitted.notes]
    if preprocessing is None:
        preprocessing = stated.preprocessing if stated else _meant_for(fitted.architecture, path)
    normalization = normalization or fitted.normalization
    if normalization is None and stated is None:
        notes.append(
            "no normalization in the file or the options: the network gets images in [0, 1] as they are"
        )
    network = fitting.build(fitted)
    notes += fitting.fill(network, fitted.tensors, str(path))
    classifier = Classifier(network, normalization).eval()
    _check_channels(normalization, preprocessing, path)
    found = fitted.num_classes
    if found is None or registry.is_import_path(fitted.architecture.name):
        # The answer tells what the user's code does not say, and that it runs at all.
        found = dry_run(classifier, preprocessing.size).shape[1]
    names = tuple(class_names) if class_names is not None else (stated.class_names if stated else ())
    _check_classes(found, num_classes, names, path)
    info = CheckpointInfo(
        arch=fitted.architecture.name,
        num_classes=found,
        data=data or (stated.data if stated else None),
        preprocessing=preprocessing,
        normalization=normalization,
        threat=threat or (stated.threat if stated else None),
        class_names=names,
        stage=stated.stage if stated else "foreign",
        sparsity=stated.sparsity if stated else _sparsity(classifier, preprocessing.size),
        source_sha256=raw.sha256,
        tool_version=runtime.versions().get("s2ap-deploy", "unknown"),
    )
    if fitted.compacted and stated is not None:
        _check_compacted(classifier, fitted, stated, raw.sha256, Path(path))
    return classifier, info, tuple(notes)


def save(path: Path | str, classifier: Classifier, info: CheckpointInfo) -> None:
    """Write weights and facts to one file, whole or not at all.

    ``.safetensors`` keeps the facts as JSON in its header; ``.pt`` and ``.pth`` hold a dictionary that
    ``torch.load(weights_only=True)`` reads.  Equal contents give equal bytes.  Raises UsageError for another
    suffix and StorageError when the disk refuses.
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
        raise UsageError(f"cannot tell the format of {path}", hint="end its name in .safetensors or .pt")


def _check_compacted(
    classifier: Classifier, fitted: Fitted, stated: CheckpointInfo, sha256: str, path: Path
) -> None:
    """Shapes that a file chose must at least run together; a plan must be that of this file."""
    dry_run(classifier, stated.preprocessing.size)
    plan = path.with_suffix(".json")
    if not plan.is_file():
        return
    full = Classifier(fitting.build(fitted, full=True), stated.normalization).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
    changed = narrow(copy.deepcopy(full), shapes)
    as_stored = Classifier(
        classifier.network, stated.normalization
    )  # the user may have another normalization
    Plan.load(plan).check(full, as_stored, changed, stated, sha256)


def _meant_for(architecture: Architecture, path: Path | str) -> Preprocessing:
    """The input that the architecture is meant for, where neither file nor user says."""
    if architecture.input_size is None:
        raise CheckpointError(
            f"the input size of {architecture.name} is unknown, and {path} does not tell it",
            hint="name the data with --data, or give the factory an attribute input_size = (C, H, W)",
        )
    size = architecture.input_size
    return Preprocessing(size=size, channel_order="L" if size[0] == 1 else "RGB")


def _sparsity(classifier: Classifier, size: tuple[int, int, int]) -> float | None:
    """The fraction of zeros among the weights that a forward pass uses; None for a network without zeros."""
    weights = [tensor for tensor in classifier.network.parameters() if tensor.dim() >= 2]
    if all(bool(tensor.all()) for tensor in weights):
        return None
    used = [classifier.get_parameter(name) for name in prunable(classifier, size)]
    zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in used)
    return zeros / sum(tensor.numel() for tensor in used) if zeros else None


def _check_channels(
    normalization: Normalization | None, preprocessing: Preprocessing, path: Path | str
) -> None:
    channels = preprocessing.size[0]
    if normalization is not None and len(normalization.mean) not in {1, channels}:
        raise CheckpointError(
            f"{path}: the normalization is for {len(normalization.mean)} channels, the input has {channels}"
        )


def _check_classes(found: int, asked: int | None, names: tuple[str, ...], path: Path | str) -> None:
    if asked is not None and asked != found:
        raise CheckpointError(
            f"{path} is a network of {found} classes, but {asked} are asked for",
            hint="choose the data that it was trained on",
        )
    if found < 2:
        raise CheckpointError(f"{path} is a network of {found} class; a classifier has at least 2")
    if names and len(names) != found:
        raise CheckpointError(
            f"{path} is a network of {found} classes, but {len(names)} class names are given"
        )
