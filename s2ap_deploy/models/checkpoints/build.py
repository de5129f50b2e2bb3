"""Build the classifier of a matched checkpoint, and state the facts about it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ap_deploy import runtime
from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.models.channels.narrowing import ChannelPlan, narrow, tied
from s2ap_deploy.models.checkpoints.key_mapping import find_normalization, for_unit_images
from s2ap_deploy.models.checkpoints.match import COUNTER, Match
from s2ap_deploy.models.checkpoints.read import CheckpointInfo, RawCheckpoint
from s2ap_deploy.models.classifier import Classifier, dry_run
from s2ap_deploy.models.used_weights import used_weights
from s2ap_deploy.plugins import reason
from s2ap_deploy.spec import Normalization, Preprocessing

MODULE_TOLERANCE = 1e-4  # of logits, relative to the largest


def build_classifier(
    raw: RawCheckpoint,
    match: Match,
    *,
    num_classes: int | None = None,
    preprocessing: Preprocessing | None = None,
    normalization: Normalization | None = None,
) -> tuple[Classifier, CheckpointInfo, tuple[str, ...]]:
    """Return the classifier in eval mode on the CPU in float32, its facts, and notes for the user.

    Raises:
        CheckpointError: for weights that are not finite or of the wrong type, a number of classes other than
            ``num_classes``, an unknown input size, and a plan that does not describe compacted layers.
        ArchitectureError: when the network cannot run.
    """
    stated = raw.info
    if preprocessing is None:
        preprocessing = stated.preprocessing if stated else _intended_input(match.architecture, raw.path)
    normalization = normalization or match.normalization
    notes = list(match.notes)
    if normalization is not None and stated is None:
        normalization, note = for_unit_images(normalization)
        notes += [] if note is None else [note]
    if normalization is None and stated is None:
        notes.append(
            "no normalization in the file or the options: the network receives images in [0, 1]"
            + _published_input(match.architecture)
        )
    network = build_network(match)
    notes += fill(network, match.tensors, raw.path)
    classifier = Classifier(network, normalization).eval()
    _check_channels(normalization, preprocessing, raw.path)
    _compare_module(raw, classifier, match, preprocessing)
    classes = match.num_classes
    if classes is None or registry.is_import_path(match.architecture.name):
        # A run shows what custom code does not state, and that it runs at all.
        classes = dry_run(classifier, preprocessing.size).shape[1]
    _check_classes(classes, num_classes, stated.class_names if stated else (), raw.path)
    facts: dict[str, Any] = {
        "arch": match.architecture.name,
        "num_classes": classes,
        "preprocessing": preprocessing,
        "normalization": normalization,
        "source_sha256": raw.sha256,
        "tool_version": runtime.versions().get("s2ap-deploy", "unknown"),
    }
    if stated is None:
        sparsity = _sparsity(classifier, preprocessing.size)
        return classifier, CheckpointInfo(stage="foreign", sparsity=sparsity, **facts), tuple(notes)
    info = stated.model_copy(update=facts)
    if match.compacted:
        _check_compacted(classifier, match, stated, raw)
    return classifier, info, tuple(notes)


def _compare_module(
    raw: RawCheckpoint, classifier: Classifier, match: Match, preprocessing: Preprocessing
) -> None:
    """Compare the logits of the matched network with those of the whole pickled module.

    Raises CheckpointError if they differ or the module cannot run.
    """
    if raw.module is None:
        return
    # A normalization in the file is a part of the module; one that a user states comes before it.
    same = classifier if find_normalization(raw.tensors) is not None else classifier.network
    images = torch.rand(4, *preprocessing.size, generator=runtime.generator("compare", "module"))
    try:
        with torch.no_grad():
            expected = copy.deepcopy(raw.module).float().eval()(images)
            found = same(images)
            scale = max(1.0, float(expected.abs().max()))
            apart = float((found - expected).abs().max())
    except Exception as error:  # the module is foreign code
        raise CheckpointError(
            f"{raw.path}: its module cannot be compared with {match.architecture.name}: {reason(error)}",
            code="module-cannot-run",
            hint="names and shapes are no proof: name a function that builds it, --arch file.py:factory",
        ) from error
    if not apart <= MODULE_TOLERANCE * scale:
        raise CheckpointError(
            f"{raw.path}: its module computes something else than {match.architecture.name}, under the same "
            f"names and shapes: logits differ by up to {apart:.3g}",
            code="module-differs",
            hint="name a function that builds this module with --arch file.py:factory",
        )


def build_network(match: Match, *, full: bool = False) -> nn.Module:
    """Build the network of ``match``, freshly initialized; ``full``: at the architecture's own width.

    Raises:
        CheckpointError: for a compacted network whose shapes its layers cannot have.
    """
    network = match.architecture.build(match.num_classes or match.architecture.num_classes)
    if match.compacted and not full:
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in match.tensors.items()}
        try:
            narrow(network, shapes)
        except CheckpointError as error:
            raise CheckpointError(
                f"the compacted layers do not fit {match.architecture.name}: {error.message}",
                code="compacted-layers-mismatch",
            ) from None
    return network


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: str) -> tuple[str, ...]:
    """Load ``tensors`` into ``network`` strictly, in the network's types; returns notes.

    Batch counters that old files lack stay at zero.

    Raises:
        CheckpointError: for values that are NaN or infinite, also when they only become so in float32, for
            integers in place of weights, and for different values under two names of one tensor.
    """
    state = network.state_dict()
    stored = set()
    for name, tensor in tensors.items():
        # Averaging a whole state turns batch counters into floats; no result depends on them.
        if state[name].is_floating_point() != tensor.is_floating_point() and not name.endswith(COUNTER):
            raise CheckpointError(
                f"{path}: {name} holds {tensor.dtype} in place of {state[name].dtype}",
                code="tensor-dtype-invalid",
            )
        if tensor.is_floating_point() and tensor.dtype != state[name].dtype:
            stored.add(str(tensor.dtype).removeprefix("torch."))
        state[name] = tensor.to(state[name].dtype)
        damaged = count_nonfinite(state[name])
        if damaged:
            raise CheckpointError(
                f"{path}: {damaged} of the {tensor.numel()} values of {name} are NaN or infinite",
                code="weights-nonfinite",
                hint="the training that wrote it diverged, or the file is damaged; use an earlier checkpoint",
            )
    for name, first in tied(network).items():
        if not torch.equal(state[name], state[first]):
            raise CheckpointError(
                f"{path}: {name} and {first} are one tensor in the network, but two in the file",
                code="tied-weights-differ",
                hint="use a function that builds the network that wrote the file",
            )
    network.load_state_dict(state, strict=True)
    return tuple(f"weights are stored in {kind} and computed in float32" for kind in sorted(stored))


def count_nonfinite(tensor: Tensor) -> int:
    """Count the values of ``tensor`` that are NaN or infinite."""
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def _published_input(architecture: Architecture) -> str:
    """Return the options for weights that were published under this name, as the end of a note."""
    stated = architecture.published
    if stated is None:
        return ""
    mean, std = (",".join(f"{each:g}" for each in values) for values in (stated.mean, stated.std))
    return f"; weights published as {architecture.name} expect --mean {mean} --std {std}"


def _intended_input(architecture: Architecture, path: str) -> Preprocessing:
    """Return the input that the architecture is meant for, where neither file nor user states one."""
    if architecture.input_size is None:
        raise CheckpointError(
            f"the input size of {architecture.name} is unknown, and {path} does not state it",
            code="input-size-missing",
            hint="set --data, or give the factory an attribute input_size = (C, H, W)",
        )
    size = architecture.input_size
    return Preprocessing(size=size, channel_order="L" if size[0] == 1 else "RGB")


def _sparsity(classifier: Classifier, size: tuple[int, int, int]) -> float | None:
    """Return the fraction of zeros among the weights that multiply activations; None without any zero."""
    weights = [tensor for tensor in classifier.network.parameters() if tensor.dim() >= 2]
    if all(bool(tensor.all()) for tensor in weights):
        return None
    used = [classifier.get_parameter(name) for name in used_weights(classifier, size).counted]
    zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in used)
    return zeros / sum(tensor.numel() for tensor in used) if zeros else None


def _check_compacted(
    classifier: Classifier, match: Match, stated: CheckpointInfo, raw: RawCheckpoint
) -> None:
    """Check that a file's shapes fit together, and that a plan next to it belongs to this file."""
    dry_run(classifier, stated.preprocessing.size)
    plan = Path(raw.path).with_suffix(".json")
    if not plan.is_file():
        return
    full = Classifier(build_network(match, full=True), stated.normalization).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
    changed = narrow(copy.deepcopy(full), shapes)
    # The user may have stated another normalization.
    as_stored = Classifier(classifier.network, stated.normalization)
    ChannelPlan.load(plan).check(full, as_stored, changed, stated, raw.sha256)


def _check_channels(normalization: Normalization | None, preprocessing: Preprocessing, path: str) -> None:
    channels = preprocessing.size[0]
    if normalization is not None and len(normalization.mean) not in {1, channels}:
        raise CheckpointError(
            f"{path}: the normalization is for {len(normalization.mean)} channels, the input has {channels}",
            code="normalization-channel-mismatch",
        )


def _check_classes(found: int, expected: int | None, names: tuple[str, ...], path: str) -> None:
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{path} is a network of {found} classes, not of {expected}",
            code="class-count-mismatch",
            hint="choose the data that it was trained on",
        )
    if found < 2:
        raise CheckpointError(
            f"{path} is a network of {found} class; a classifier has at least 2",
            code="class-count-too-small",
        )
    if names and len(names) != found:
        raise CheckpointError(
            f"{path} is a network of {found} classes, but it holds {len(names)} class names",
            code="class-names-mismatch",
        )
