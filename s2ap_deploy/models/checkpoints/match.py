"""Match a file's tensors with an architecture, and name them as it does."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from s2ap_deploy.errors import ArchitectureError, CheckpointError
from s2ap_deploy.models.architectures import imagenet, registry, variants
from s2ap_deploy.models.architectures.architecture import (
    Architecture,
    StateDictSpec,
    fold_parametrizations,
    parametrized_spec,
)
from s2ap_deploy.models.checkpoints import key_mapping, masked
from s2ap_deploy.models.checkpoints.masked import DenseFromMasks
from s2ap_deploy.models.checkpoints.read import CheckpointInfo, RawCheckpoint
from s2ap_deploy.spec import Normalization

# Where models.classifier.Classifier keeps its two parts.
NETWORK = "network."
NORMALIZE = "normalize."
COUNTER = "num_batches_tracked"
# Buffers of torch and torchvision that are no learnable values.
_BUFFER = re.compile(
    r"(running_mean|running_var|num_batches_tracked|relative_position_index|relative_coords_table)$"
)
ARCH_HINT = "give it as --arch NAME, --arch package.module:factory or --arch file.py:factory"
FACTORY_HINT = (
    "{name} is called with num_classes, if it takes that, and nothing else; "
    "name a function that builds the file's network, whatever else it needs filled in"
)

# Prefixes of a second network beside the one that is meant.
_SECOND = re.compile(r"(^|\.)\w*(teacher|ema|swa|target|momentum|averaged)\w*\.")

MatchedBy = Literal["description", "names", "option"]
# Two networks can agree in every name and shape but differ in all of these.
NOT_IN_TENSORS = (
    "activation functions",
    "strides (of the first convolution, for one), padding, and maximum or average pooling",
    "what a shortcut reads",
    "constants such as BatchNorm's epsilon of 1e-5 or 1e-3",
    "operations on the image before the first layer, such as 2x - 1 or standardization of each image",
)


@dataclass(frozen=True)
class Match:
    """An architecture and the file's tensors for it, under its own names, in their stored type.

    Attributes:
        matched_by: ``description``: a file of this tool names its architecture; ``option``: ``--arch``
            names it; ``names``: it is the one whose names and shapes agree. Names and shapes are compared
            strictly in all three.
        num_classes: None when building does not depend on it: custom code without that argument.
        normalization: the one in the file.
        prefix: what was stripped from all names.
        notes: for the user; what was read, unmasked, stripped and ignored.
        unused: names in the file of tensors that were ignored, as no forward pass reaches them.
        compacted: the file is of this tool and has fewer channels than the architecture.
    """

    architecture: Architecture
    matched_by: MatchedBy
    num_classes: int | None
    tensors: dict[str, Tensor] = field(repr=False)
    normalization: Normalization | None = None
    prefix: str = ""
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    compacted: bool = False

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Properties that names and shapes do not show; empty if the file names its architecture."""
        return () if self.matched_by == "description" else NOT_IN_TENSORS


def match_architecture(
    raw: RawCheckpoint, *, arch: str | None = None, keep: float | None = None, alpha: float | None = None
) -> Match:
    """Find the architecture of ``raw`` (or check that it is ``arch``), and its dense weights.

    A file of this tool that names the user's own code is refused unless ``arch`` repeats it: a file may not
    choose what is imported.

    Args:
        keep: rebuilds the masks of a file with pruning scores, with HARP's ``alpha``.

    Raises:
        ArchitectureError: when nothing matches, with what differs.
        CheckpointError: for a head of fewer than two classes, and masks that do not belong to the weights.
        UsageError: for a ``keep`` or ``alpha`` that is missing or has no use.
    """
    return match_dense(raw, masked.dense_from_masks(raw, keep=keep, alpha=alpha), arch=arch)


def match_dense(raw: RawCheckpoint, dense: DenseFromMasks, *, arch: str | None = None) -> Match:
    """Find the architecture of the dense weights of ``raw``; see :func:`match_architecture`."""
    if raw.info is not None:
        found = _match_description(dense.tensors, raw.info, raw.path, arch)
    elif arch is None:
        found = _match_names(key_readings(dense.tensors))
    else:
        found = _match_option(key_readings(dense.tensors), raw.path, arch)
    if found.num_classes is not None and found.num_classes < 2:
        raise CheckpointError(
            f"{raw.path} is a network of {found.num_classes} class; a classifier has at least 2",
            code="class-count-too-small",
        )
    notes = (*raw.notes, *dense.notes(found.unused), *found.notes)
    return dataclasses.replace(found, notes=notes)


@dataclass(frozen=True)
class KeyReading:
    """One reading of a file's names: without ``prefix`` and what lacks it, adapted as ``notes`` say."""

    prefix: str
    tensors: dict[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()

    def split(self, expected: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights, and the tensors of a normalization that the network does not expect."""
        normal = {
            name: tensor
            for name, tensor in self.tensors.items()
            if name not in expected and key_mapping.is_normalization(name, tensor)
        }
        return {name: tensor for name, tensor in self.tensors.items() if name not in normal}, normal


def key_readings(tensors: Mapping[str, Tensor]) -> list[KeyReading]:
    """Return the readings of a foreign file in the order of trial."""
    stripped = [
        KeyReading(prefix, named, _aside_note(aside), aside)
        for prefix, named, aside in key_mapping.strip_prefixes(tensors)
    ]
    adapted = [
        KeyReading(reading.prefix, named, (*reading.notes, *notes), reading.aside)
        for reading in stripped
        for named, notes in key_mapping.adapt_rst(reading.tensors)
    ]
    return stripped + adapted


def _aside_note(names: tuple[str, ...]) -> tuple[str, ...]:
    return (f"ignored, outside the network's prefix: {_few(names, 6)}",) if names else ()


def _match_names(readings: list[KeyReading]) -> Match:
    split = [(reading, *reading.split({})) for reading in readings]
    fitting = [each for each in split if exact_matches(each[1])]
    prefixes = [reading.prefix for reading, *_ in fitting]
    apart = [prefix for prefix in prefixes if not any(prefix.startswith(other) for other in prefixes[:1])]
    if apart:
        known = [prefix for prefix in (prefixes[0], *apart) if not _SECOND.search(prefix)]
        if len(known) != 1:
            raise ArchitectureError(
                f"the file holds several whole networks, under {', '.join((prefixes[0], *apart))}",
                code="networks-several",
                hint="save the one that is meant: torch.save(model.state_dict(), 'model.pt')",
            )
        fitting = [each for each in fitting if each[0].prefix == known[0]]
    # Where nothing matches, the error is about the reading that an architecture comes closest to.
    reading, weights, normal = (
        fitting[0] if fitting else max(reversed(split), key=lambda each: _agreeing(each[1]))
    )
    return _matched("names", only_match(weights), reading, weights, normal)


def _agreeing(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of names and shapes that the closest architecture shares with ``tensors``."""
    return max((found.agreeing for found in closest(tensors)), default=0)


def _match_option(readings: list[KeyReading], path: str, arch: str) -> Match:
    architecture = registry.resolve(arch)
    spec = registry.spec(architecture)
    compared = []
    for reading in readings:
        weights, normal = reading.split(spec.shapes)
        compared.append((compare(architecture, weights, spec), reading, weights, normal))
    if not any(difference.exact for difference, *_ in compared):
        folded = [
            found
            for reading in readings
            for found in (_folded(architecture, reading), _converted(architecture, reading))
            if found is not None
        ]
        compared += [
            (compare(architecture, weights, spec), reading, weights, normal)
            for reading in folded
            for weights, normal in [reading.split(spec.shapes)]
        ]
    difference, reading, weights, normal = max(
        compared, key=lambda entry: (entry[0].exact, entry[0].agreeing)
    )
    _require_exact(difference, path)
    return _matched("option", difference, reading, weights, normal)


def _folded(architecture: Architecture, reading: KeyReading) -> KeyReading | None:
    """Return ``reading`` with plain weights in place of the parametrized ones of ``architecture``.

    None where the architecture has none, or the file does not hold exactly what they are computed from.
    """
    spec = parametrized_spec(architecture)
    if spec is None or architecture.parametrized is None:
        return None
    weights, normal = reading.split(spec.shapes)
    difference = compare(architecture, weights, spec)
    if not difference.exact:
        return None
    network = architecture.parametrized(difference.num_classes)
    network.load_state_dict(weights, strict=False)  # old files lack batch counters
    names = fold_parametrizations(network)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    note = f"parametrizations (weight_norm, spectral_norm or the like) folded to plain weights: {shown}"
    return KeyReading(reading.prefix, {**network.state_dict(), **normal}, (*reading.notes, note))


def _converted(architecture: Architecture, reading: KeyReading) -> KeyReading | None:
    """Return ``reading`` under the names that the architecture's library gives to a file of its own."""
    if architecture.converted is None:
        return None
    tensors = architecture.converted(reading.tensors)
    note = "names of the file converted to those of its library's network"
    return None if tensors is None else KeyReading(reading.prefix, tensors, (*reading.notes, note))


def _match_description(
    tensors: Mapping[str, Tensor], info: CheckpointInfo, path: str, arch: str | None
) -> Match:
    if arch is None and registry.is_import_path(info.arch):
        raise ArchitectureError(
            f"{path} is a network from your own code, {info.arch}, which is imported only with --arch",
            code="architecture-import-not-allowed",
            hint=f"add --arch {info.arch}",
        )
    architecture = registry.resolve(arch or info.arch)
    # The normalization is rebuilt from the description, which holds the same numbers.
    weights = {n.removeprefix(NETWORK): t for n, t in tensors.items() if not n.startswith(NORMALIZE)}
    spec = registry.spec(architecture)
    difference = compare(architecture, weights, spec)
    compacted = not difference.exact and _is_compacted(difference, weights, spec)
    notes: tuple[str, ...] = ()
    if compacted:
        smaller = f"{len(difference.reshaped)} of its {len(weights)} tensors"
        notes = (f"a compacted network: {smaller} are smaller than those of {architecture.name}",)
    else:
        _require_exact(difference, path)
    return Match(
        architecture,
        "description",
        difference.num_classes if difference.has_head else None,
        weights,
        info.normalization,
        notes=notes,
        compacted=compacted,
    )


def _is_compacted(difference: Difference, tensors: Mapping[str, Tensor], spec: StateDictSpec) -> bool:
    """Return whether the only difference is that some tensors have fewer rows or columns."""
    if difference.missing or difference.unexpected:
        return False
    for name in spec.shapes:
        full = spec.shape(name, difference.num_classes)
        found = tuple(tensors[name].shape) if name in tensors else full
        if len(found) != len(full) or found[2:] != full[2:]:
            return False
        if not all(1 <= few <= many for few, many in zip(found, full, strict=True)):
            return False
    return True


def _matched(
    matched_by: MatchedBy,
    difference: Difference,
    reading: KeyReading,
    weights: dict[str, Tensor],
    normal: dict[str, Tensor],
) -> Match:
    notes = []
    if reading.prefix:
        notes.append(f"prefix {reading.prefix!r} stripped from every name")
    notes += reading.notes
    if matched_by == "names":
        name = difference.architecture.name
        unseen = "; ".join(NOT_IN_TENSORS)
        notes.append(
            f"architecture {name}: all names and shapes match; not compared: {unseen}. Where the code "
            f"differs, name a variant, such as --arch {name}{variants.SIGN}{next(iter(variants.VARIANTS))}"
        )
    if difference.ignored:
        parts = ", ".join(sorted({name.split(".")[0] for name in difference.ignored}))
        notes.append(f"ignored: {len(difference.ignored)} tensors of {parts}, which no forward pass uses")
    normalization = key_mapping.find_normalization(normal)
    if normalization is not None:
        notes.append(f"normalization found in the file: mean {normalization.mean}, std {normalization.std}")
    elif constants := difference.architecture.normalization:
        normalization = constants.get(difference.num_classes, constants[0])
        notes.append(
            f"normalization that the code of this family holds as constants: mean {normalization.mean}, "
            f"std {normalization.std}"
        )
    return Match(
        difference.architecture,
        matched_by,
        difference.num_classes if difference.has_head else None,
        {name: tensor for name, tensor in weights.items() if name not in difference.ignored},
        normalization,
        reading.prefix,
        tuple(notes),
        unused=tuple(reading.prefix + name for name in difference.ignored),
    )


def _require_exact(difference: Difference, path: str) -> None:
    if not difference.exact:
        name = difference.architecture.name
        raise ArchitectureError(
            f"{path} does not fit {name}: {difference}",
            code="architecture-mismatch",
            hint=FACTORY_HINT.format(name=name) if registry.is_import_path(name) else ARCH_HINT,
        )


@dataclass(frozen=True)
class Difference:
    """Differences between a checkpoint and an architecture; empty when it can be loaded strictly.

    Attributes:
        num_classes: read from the head's shape, where the architecture has a head (``has_head``).
        missing: without batch counters, which old files lack and no result depends on.
        ignored: tensors that the architecture knows to be unused.
    """

    architecture: Architecture
    num_classes: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    agreeing: int = 0
    has_head: bool = True

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def likeness(self) -> float:
        """The fraction of the tensors of both sides that agree in name and shape."""
        apart = len(self.missing) + len(self.unexpected) + len(self.reshaped)
        return self.agreeing / max(1, self.agreeing + apart)

    def __str__(self) -> str:
        parts = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.reshaped),
        )
        return "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in parts if names) or "nothing"


def compare(architecture: Architecture, tensors: Mapping[str, Tensor], spec: StateDictSpec) -> Difference:
    """Compare the names and shapes of ``tensors`` (without foreign prefixes) with ``spec``."""
    expected = spec.shapes
    num_classes = architecture.num_classes
    for name, dimension in spec.heads.items():
        if name in tensors and tensors[name].dim() == len(expected[name]):
            num_classes = tensors[name].shape[dimension]
            break
    extra = [name for name in tensors if name not in expected]
    shared = [name for name in expected if name in tensors]
    reshaped = [name for name in shared if tuple(tensors[name].shape) != spec.shape(name, num_classes)]
    return Difference(
        architecture,
        num_classes,
        missing=tuple(n for n in expected if n not in tensors and not n.endswith(COUNTER)),
        unexpected=tuple(name for name in extra if not name.startswith(architecture.unused)),
        reshaped=tuple(
            f"{name} {list(tensors[name].shape)} instead of {list(spec.shape(name, num_classes))}"
            for name in reshaped
        ),
        ignored=tuple(name for name in extra if name.startswith(architecture.unused)),
        agreeing=len(shared) - len(reshaped),
        has_head=bool(spec.heads),
    )


def only_match(tensors: Mapping[str, Tensor]) -> Difference:
    """Return the one architecture with exactly the names and shapes of ``tensors``, at any number of classes.

    Raises:
        ArchitectureError: when none matches, with the closest and what differs, and when several do.
    """
    found = exact_matches(tensors)
    if len(found) == 1:
        return found[0]
    if found:
        listed = "".join(f"\n  {each.architecture}" for each in found)
        raise ArchitectureError(
            f"{len(found)} architectures with other functions have exactly these names and shapes:{listed}\n"
            f"and each of them with one or more of:\n{variants.listed()}",
            code="architecture-ambiguous",
            hint=f"choose one, for example --arch {found[0].architecture.name}, or "
            f"--arch {found[0].architecture.name}{variants.SIGN}{next(iter(variants.VARIANTS))}",
        )
    nearest = closest(tensors)
    listed = "".join(f"\n  {each.architecture.name}: {each}" for each in nearest)
    raise ArchitectureError(
        unmatched(len(tensors)) + (f"; closest:{listed}" if nearest else ""),
        code="architecture-unmatched",
        hint=ARCH_HINT,
    )


def unmatched(count: int) -> str:
    """Return the sentence that no architecture fits a checkpoint of ``count`` tensors."""
    return f"no registered architecture fits the {count} tensors of this checkpoint"


def exact_matches(tensors: Mapping[str, Tensor]) -> list[Difference]:
    """Return every architecture with exactly these names and shapes."""

    def among(entries: Iterable[Architecture]) -> list[Difference]:
        compared = (
            compare(entry, tensors, registry.spec(entry)) for entry in entries if _could_match(entry, tensors)
        )
        return [found for found in compared if found.exact]

    # No own network has the names of one of torchvision's, so those are compared only when needed.
    return among(registry.own_and_installed()) or among(imagenet.architectures().values())


def closest(tensors: Mapping[str, Tensor], n: int = 3) -> tuple[Difference, ...]:
    """Return the ``n`` architectures that share most names and shapes with ``tensors``, best first.

    Of torchvision's many, only the six nearest in size are compared.
    """
    total = learnable_values(tensors)
    distant = sorted(
        (entry for entry in imagenet.architectures().values() if entry.parameters is not None),
        key=lambda entry: abs((entry.parameters or 0) - total),
    )
    candidates = [*registry.own_and_installed(), *distant[:6]]
    compared = [compare(entry, tensors, registry.spec(entry)) for entry in candidates]
    ranked = sorted(compared, key=lambda found: -found.likeness)
    return tuple(found for found in ranked[:n] if found.agreeing)


def _could_match(architecture: Architecture, tensors: Mapping[str, Tensor]) -> bool:
    """Return False when the number of learnable values rules the architecture out without building it.

    With K classes instead of its default K0 a network has (K - K0) * (F + 1) more of them, or (K - K0) * F
    without a bias, where [K, F, ...] is its head; every tensor of the checkpoint is tried as that head.
    """
    if architecture.parameters is None:
        return True
    surplus = learnable_values(tensors, architecture.unused) - architecture.parameters
    if surplus == 0:
        return True
    heads = (tensor.shape for tensor in tensors.values() if tensor.dim() >= 2)
    return any(
        surplus == (shape[0] - architecture.num_classes) * (math.prod(shape[1:]) + bias)
        for shape in heads
        for bias in (0, 1)
    )


def learnable_values(tensors: Mapping[str, Tensor], unused: tuple[str, ...] = ()) -> int:
    """Count the values in ``tensors`` without the buffers that torch and torchvision register."""
    return sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if not _BUFFER.search(name) and not name.startswith(unused)
    )


def _few(names: tuple[str, ...], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names) - limit} more)"
