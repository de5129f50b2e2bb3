"""Which network a file's tensors belong to, and the tensors under that network's own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError, CheckpointError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.models.channels.narrowing import narrow, tied
from s2ap_deploy.models.checkpoints import foreign
from s2ap_deploy.models.checkpoints.info import CheckpointInfo
from s2ap_deploy.models.checkpoints.reading import RawCheckpoint
from s2ap_deploy.models.checkpoints.state_dict_spec import COUNTER, Difference, StateDictSpec, compare
from s2ap_deploy.spec import Normalization

# Where models.classifier.Classifier keeps its two parts.
NETWORK = "network."
NORMALIZE = "normalize."
OWN_CODE = (
    "{name} is called with num_classes, if it takes that, and nothing else; "
    "name a function that builds the file's network, whatever else it needs filled in"
)


@dataclass(frozen=True)
class Fitted:
    """An architecture and the tensors for it, named as it names them, in the type and values of the file.

    ``num_classes`` is None when building does not depend on it: foreign code without that argument.
    ``unused`` are the names in the file of tensors that were left aside, as no forward pass reaches them.
    ``compacted`` says that the tensors are of a network of ours with fewer channels than the architecture.
    """

    architecture: Architecture
    num_classes: int | None
    tensors: dict[str, Tensor] = field(repr=False)
    normalization: Normalization | None
    prefix: str
    notes: tuple[str, ...]
    unused: tuple[str, ...] = ()
    compacted: bool = False


@dataclass(frozen=True)
class Candidate:
    """One reading of a file's names: without ``prefix``, and adapted as ``notes`` tell."""

    prefix: str
    tensors: dict[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()


def candidates(tensors: Mapping[str, Tensor]) -> list[Candidate]:
    """The readings of a foreign file, in the order of trial; the last one is the easiest to compare."""
    stripped = [Candidate(prefix, named) for prefix, named in foreign.strippings(tensors)]
    adapted = [
        Candidate(candidate.prefix, named, notes)
        for candidate in stripped
        for named, notes in foreign.adaptations(candidate.tensors)
    ]
    return stripped + adapted


def fit(raw: RawCheckpoint, path: str, *, arch: str | None = None) -> Fitted:
    """Find the architecture of ``raw`` (or check that it is ``arch``) and the prefix to strip.

    A file of ours that names the user's own code is refused unless ``arch`` says so again: a file may not
    choose what is imported.  Raises ArchitectureError when nothing fits, with what differs, and
    CheckpointError for a head of fewer than two classes.
    """
    if raw.info is not None:
        fitted = _fit_own(raw.tensors, raw.info, path, arch=arch)
    elif arch is None:
        fitted = _matched(candidates(raw.tensors))
    else:
        fitted = _fit_stated(candidates(raw.tensors), path, arch=arch)
    if fitted.num_classes is not None and fitted.num_classes < 2:
        raise CheckpointError(
            f"{path} is a network of {fitted.num_classes} class; a classifier has at least 2"
        )
    return fitted


def _fit_stated(readings: list[Candidate], path: str, *, arch: str) -> Fitted:
    architecture = registry.resolve(arch)
    skeleton = registry.skeleton(architecture)
    compared = []
    for reading in readings:
        weights, normal = _split(reading.tensors, skeleton.shapes)
        compared.append((compare(architecture, weights, skeleton), reading, weights, normal))
    difference, reading, weights, normal = max(compared, key=lambda entry: entry[0].agreeing)
    _require_exact(difference, path, weights)
    return _fitted(difference, reading, weights, normal)


def _fit_own(tensors: Mapping[str, Tensor], info: CheckpointInfo, path: str, *, arch: str | None) -> Fitted:
    if arch is None and registry.is_import_path(info.arch):
        raise ArchitectureError(
            f"{path} is a network of your own code, {info.arch}, which is imported only when you say so",
            hint=f"add --arch {info.arch}",
        )
    architecture = registry.resolve(arch or info.arch)
    # The normalization is rebuilt from the facts, which hold the same numbers.
    weights = {n.removeprefix(NETWORK): t for n, t in tensors.items() if not n.startswith(NORMALIZE)}
    skeleton = registry.skeleton(architecture)
    difference = compare(architecture, weights, skeleton)
    compacted = not difference.exact and _smaller(difference, weights, skeleton)
    if not compacted:
        _require_exact(difference, path, weights)
    classes = difference.num_classes if difference.has_head else None
    notes: tuple[str, ...] = ()
    if compacted:
        smaller = f"{len(difference.reshaped)} of its {len(weights)} tensors"
        notes = (f"a compacted network: {smaller} are smaller than those of {architecture.name}",)
    return Fitted(architecture, classes, weights, info.normalization, "", notes, compacted=compacted)


def _smaller(difference: Difference, tensors: Mapping[str, Tensor], skeleton: StateDictSpec) -> bool:
    """Whether all that differs is that some tensors have fewer rows or columns than the architecture's."""
    if difference.missing or difference.unexpected:
        return False
    for name, shape in skeleton.shapes.items():
        full = list(shape)
        if name in skeleton.heads:
            full[skeleton.heads[name]] = difference.num_classes
        found = list(tensors[name].shape) if name in tensors else full
        if len(found) != len(full) or found[2:] != full[2:]:
            return False
        if not all(1 <= few <= many for few, many in zip(found, full, strict=True)):
            return False
    return True


def build(fitted: Fitted, *, full: bool = False) -> nn.Module:
    """The network of ``fitted``, freshly initialized; ``full``: at the architecture's own width.

    Raises CheckpointError for a compacted network whose shapes its layers cannot have.
    """
    network = fitted.architecture.build(fitted.num_classes or fitted.architecture.num_classes)
    if fitted.compacted and not full:
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in fitted.tensors.items()}
        try:
            narrow(network, shapes)
        except CheckpointError as error:
            raise CheckpointError(
                f"the compacted layers do not fit {fitted.architecture.name}: {error.message}"
            ) from None
    return network


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: str) -> tuple[str, ...]:
    """Load ``tensors`` into ``network`` strictly, in the network's types; returns notes.

    Batch counters that old files lack stay at zero.  Raises CheckpointError for values that are NaN or
    infinite, also when they only become so in float32, for integers where weights belong, and for different
    values under two names of one tensor.
    """
    state = network.state_dict()
    stored = set()
    for name, tensor in tensors.items():
        # Averaging a whole state turns batch counters into floats; no result depends on them.
        if state[name].is_floating_point() != tensor.is_floating_point() and not name.endswith(COUNTER):
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype} where {state[name].dtype} belongs")
        if tensor.is_floating_point() and tensor.dtype != state[name].dtype:
            stored.add(str(tensor.dtype).removeprefix("torch."))
        state[name] = tensor.to(state[name].dtype)
        damaged = nonfinite(state[name])
        if damaged:
            raise CheckpointError(
                f"{path}: {damaged} of the {tensor.numel()} values of {name} are NaN or infinite",
                hint="the training that wrote it diverged, or the file is damaged; use an earlier checkpoint",
            )
    for name, first in tied(network).items():
        if not torch.equal(state[name], state[first]):
            raise CheckpointError(
                f"{path}: {name} and {first} are one tensor in the network, but two in the file",
                hint="name a function that builds the network with which the file was written",
            )
    network.load_state_dict(state, strict=True)
    return tuple(f"weights are stored in {kind} and computed in float32" for kind in sorted(stored))


def nonfinite(tensor: Tensor) -> int:
    """How many values of ``tensor`` are NaN or infinite."""
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def _matched(readings: list[Candidate]) -> Fitted:
    for reading in readings:
        weights, normal = _split(reading.tensors, {})
        if registry.exact_fits(weights):
            return _fitted(registry.match(weights), reading, weights, normal, found=True)
    # Nothing fits: say so about the names that are easiest to compare.
    weights, normal = _split(readings[-1].tensors, {})
    return _fitted(registry.match(weights), readings[-1], weights, normal)


def _fitted(
    difference: Difference,
    reading: Candidate,
    weights: dict[str, Tensor],
    normal: dict[str, Tensor],
    *,
    found: bool = False,
) -> Fitted:
    notes = []
    if reading.prefix:
        notes.append(f"prefix {reading.prefix!r} stripped from every name")
    notes += reading.notes
    if found:
        notes.append(f"architecture {difference.architecture.name}: every name and shape agrees")
    if difference.ignored:
        parts = ", ".join(sorted({name.split(".")[0] for name in difference.ignored}))
        notes.append(f"left aside: {len(difference.ignored)} tensors of {parts}, which no forward pass uses")
    normalization = foreign.normalization(normal)
    if normalization is not None:
        notes.append(f"normalization found in the file: mean {normalization.mean}, std {normalization.std}")
    kept = {name: tensor for name, tensor in weights.items() if name not in difference.ignored}
    classes = difference.num_classes if difference.has_head else None
    unused = tuple(reading.prefix + name for name in difference.ignored)
    return Fitted(difference.architecture, classes, kept, normalization, reading.prefix, tuple(notes), unused)


def _split(
    tensors: Mapping[str, Tensor], expected: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the tensors of a normalization that the network itself does not expect."""
    normal = {n: t for n, t in tensors.items() if n not in expected and foreign.is_normalization(n)}
    return {n: t for n, t in tensors.items() if n not in normal}, normal


def _require_exact(difference: Difference, path: str, weights: Mapping[str, Tensor]) -> None:
    if not difference.exact:
        name = difference.architecture.name
        raise ArchitectureError(
            f"{path} does not fit {name}: {difference}",
            hint=OWN_CODE.format(name=name) if registry.is_import_path(name) else registry.ADVICE,
        )
