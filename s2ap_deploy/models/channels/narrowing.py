"""Layers with fewer channels, and the JSON plan of a compacted network.

A layer's configuration has to follow its tensors: ``in_channels``, ``num_features`` and the like. Shapes and
plans come from files that are not trusted, so each is checked against the layers at full width.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from s2ap_deploy import files, records
from s2ap_deploy.errors import CheckpointError, VerificationError
from s2ap_deploy.models.channels.layer_channels import (
    ChannelGroup,
    Coupling,
    is_depthwise,
    macs,
    positions_gone,
    sliced,
)
from s2ap_deploy.models.checkpoints.read import CheckpointInfo
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.recipe.field_types import Whole
from s2ap_deploy.spec import Normalization, Record

FORMAT: Literal["s2ap-deploy compacted network"] = "s2ap-deploy compacted network"
LONGEST = 256 * 2**20  # bytes

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LayerConfig = dict[str, int]
"""Constructor arguments of a layer: ``in_channels``, ``out_channels``, ``groups``; ``in_features``; ..."""

RELATIVE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def compacted(
    network: nn.Module, groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, LayerConfig]]:
    """Return a copy of ``network`` with only the channels ``kept`` (indices by name of group).

    The copy computes what ``network`` computes when nothing reads the other channels. Also returns the
    changed :data:`LayerConfig` of every layer. Errors as for
    :func:`~s2ap_deploy.models.channels.layer_channels.sliced`.
    """
    tensors = sliced(network.state_dict(), tuple(groups), kept)
    tensors |= {name: tensors[first] for name, first in tied(network).items()}
    small = copy.deepcopy(network)
    changed = narrow(small, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    small.load_state_dict(tensors, strict=True)
    return small, changed


def narrow(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, LayerConfig]:
    """Cut the tensors of ``network`` to ``shapes`` (by name in its state dict) and adapt its layers.

    Changes ``network`` itself; of every tensor the leading rows and columns stay. Only channels of Conv2d,
    Linear, BatchNorm and PReLU layers can be removed. Returns what changed, by name of layer. Whether the
    shapes fit together shows only when the network runs.

    Raises:
        CheckpointError: for shapes that the layers cannot have; ``network`` is then unchanged.
    """
    _check_names(network.state_dict(), shapes)
    for name, first in tied(network).items():
        if tuple(shapes[name]) != tuple(shapes[first]):
            raise CheckpointError(
                f"{first} and {name} are one tensor, but not of one shape", code="tied-weights-differ"
            )
    changed: dict[str, LayerConfig] = {}
    for prefix, module in network.named_modules():
        own = _own_shapes(prefix, module, shapes)
        config = _changed_config(prefix, module, own)
        if config:
            changed[prefix] = config
    for prefix, config in changed.items():
        module = network.get_submodule(prefix)
        _resize(prefix, module, shapes)
        for name, value in config.items():
            setattr(module, name, value)
    return changed


def check_equal(reference: nn.Module, small: nn.Module, images: Tensor) -> float:
    """Return the largest difference of their logits on ``images`` [n, C, H, W], both in evaluation mode.

    Raises:
        VerificationError: when it exceeds 1e-5 x max(1, largest |logit|) in float32, 1e-10 in float64:
            sums over fewer terms round differently, and nothing else may differ.
    """
    with torch.no_grad():
        expected, found = reference(images), small(images)
    largest = float(expected.abs().max())
    tolerance = RELATIVE_TOLERANCE[images.dtype] * max(1.0, largest)
    difference = float((found - expected).abs().max())
    if not difference <= tolerance < float("inf"):  # written so that NaN fails
        raise VerificationError(
            f"without the removed channels the logits differ by up to {difference:.3g} "
            f"(allowed {tolerance:.3g})",
            code="compacted-logits-differ",
            hint="export with --no-compact, and please report the network",
        )
    return difference


def _check_names(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    for name in tensors:
        if name not in shapes:
            raise CheckpointError(f"it lacks {name}, which the network has", code="tensor-missing")
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"it has {name}, which the network lacks", code="tensor-unexpected")
        full = tensors[name].shape
        # Kernels keep their size; channels are the first two dimensions.
        fits = len(shape) == len(full) and tuple(shape[2:]) == tuple(full[2:])
        if not fits or not all(1 <= few <= many for few, many in zip(shape, full, strict=True)):
            raise CheckpointError(
                f"{name} is {list(shape)}, which is no part of {list(full)}", code="tensor-shape-mismatch"
            )


def tied(network: nn.Module) -> dict[str, str]:
    """Map the further names of tensors that have several to the first one."""
    first: dict[int, str] = {}
    every = (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    )
    stored = network.state_dict().keys()
    names = ((name, first.setdefault(id(tensor), name)) for name, tensor in every if name in stored)
    return {name: original for name, original in names if name != original}


def _own_shapes(prefix: str, module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the shapes of the tensors that ``module`` itself holds and that a state dict has."""
    held = (*module._parameters, *module._buffers)
    return {leaf: list(shapes[name]) for leaf in held if (name := _join(prefix, leaf)) in shapes}


def _changed_config(prefix: str, module: Any, own: Mapping[str, list[int]]) -> LayerConfig:
    """Return the changed arguments of ``module`` for shapes ``own``. Raises CheckpointError for a misfit."""
    if all(shape == list(getattr(module, leaf).shape) for leaf, shape in own.items()):
        return {}
    before, after = _configs(prefix, module, own)
    rows = {shape[0] for shape in own.values() if shape}
    if len(rows) > 1:
        raise CheckpointError(
            f"the tensors of {prefix} have {min(rows)} and {max(rows)} rows", code="tensor-shape-mismatch"
        )
    return {name: value for name, value in after.items() if value != before[name]}


def _configs(prefix: str, module: Any, own: Mapping[str, list[int]]) -> tuple[LayerConfig, LayerConfig]:
    """Return the constructor arguments of ``module``, and those that shapes ``own`` require."""
    if isinstance(module, nn.Conv2d) and (module.groups == 1 or is_depthwise(module)):
        rows, columns = own["weight"][:2]
        before = {
            "in_channels": module.in_channels,
            "out_channels": module.out_channels,
            "groups": module.groups,
        }
        if module.groups == 1:
            return before, {"in_channels": columns, "out_channels": rows, "groups": 1}
        return before, {"in_channels": rows, "out_channels": rows, "groups": rows}
    if isinstance(module, nn.Linear):
        rows, columns = own["weight"]
        before = {"in_features": module.in_features, "out_features": module.out_features}
        return before, {"in_features": columns, "out_features": rows}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        rows = max(shape[0] for shape in own.values() if shape)
        return {"num_features": module.num_features}, {"num_features": rows}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.num_parameters}, {"num_parameters": own["weight"][0]}
    raise CheckpointError(
        f"{prefix or 'the network'} is {type(module).__name__}, whose channels cannot be removed",
        code="layer-not-separable",
    )


def _resize(prefix: str, module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Cut the tensors of one layer; a parameter stays the same object, so that tied layers stay tied."""
    for leaf in (*module._parameters, *module._buffers):
        tensor: Tensor | None = getattr(module, leaf)
        shape = shapes.get(_join(prefix, leaf))
        if tensor is not None and shape is not None and tuple(shape) != tuple(tensor.shape):
            tensor.data = tensor.data[tuple(slice(size) for size in shape)].clone()
            tensor.grad = None


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf


class KeptTensor(Record):
    """One tensor: its ``shape`` now, and which rows and columns of the full one it still has.

    ``rows`` and ``columns`` are ascending positions in the full tensor; None where all stayed.
    """

    shape: tuple[Whole, ...]
    rows: tuple[Whole, ...] | None = None
    columns: tuple[Whole, ...] | None = None

    def describes(self, tensor: Tensor, full: Tensor) -> bool:
        """Return whether ``tensor`` can be this part of ``full``."""
        sides = (self.rows, self.columns)
        return self.shape == tuple(tensor.shape) and all(
            _describes(sides[dim] if dim < 2 else None, size, full.shape[dim])
            for dim, size in enumerate(self.shape)
        )


class NetworkSize(Record):
    """The learnable values of a network, and the multiply-accumulates per image of its layers."""

    parameters: Whole
    macs: Whole

    @classmethod
    def of(cls, network: nn.Module, input_size: tuple[int, int, int]) -> NetworkSize:
        """Measure ``network``. Raises ArchitectureError when it cannot run on ``input_size`` (C, H, W)."""
        parameters = sum(tensor.numel() for tensor in network.parameters())
        return cls(parameters=parameters, macs=macs(network, input_size))


class ChannelPlan(Record):
    """The plan for building a network with fewer channels from ``arch`` at full width, with the file's names.

    Attributes:
        modules: what changes in each layer, by name, such as ``in_channels``.
        tensors: every tensor of the file.
        source_sha256: the hash of the checkpoint that was compacted.
        source_weights_sha256: the hash of its weights.
        sha256: the hash of the weights file next to the plan.
        weights_sha256: the hash of the weights in it.
    """

    format: Literal["s2ap-deploy compacted network"] = FORMAT
    schema_version: Literal[1] = 1
    arch: str
    num_classes: Whole
    input_size: tuple[Whole, Whole, Whole]
    normalization: Normalization | None
    modules: dict[str, dict[str, Whole]]
    tensors: dict[str, KeptTensor]
    before: NetworkSize
    after: NetworkSize
    source_sha256: Digest | None
    source_weights_sha256: Digest
    sha256: Digest
    weights_sha256: Digest

    def save(self, path: Path) -> None:
        """Write JSON, one layer or tensor per line, atomically. Raises StorageError."""
        parts = []
        for key, value in sorted(self.model_dump(mode="json").items()):
            text = json.dumps(value, sort_keys=True)
            if key in ("modules", "tensors"):
                entries = (f"    {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in value.items())
                text = "{\n" + ",\n".join(sorted(entries)) + "\n  }"
            parts.append(f"  {json.dumps(key)}: {text}")
        files.write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> ChannelPlan:
        """Read what :meth:`save` wrote. Raises CheckpointError for anything else, StorageError."""
        data = files.read_bytes(path, limit=LONGEST)
        if len(data) > LONGEST:
            raise CheckpointError(
                f"{path} is longer than any plan of a compacted network", code="channel-plan-too-long"
            )
        hint = "the plan belongs to the weights next to it; copy both files again, or move the plan away"
        return records.parse(data, cls, CheckpointError, source=str(path), hint=hint)

    def check(
        self,
        full: nn.Module,
        small: nn.Module,
        changed: Mapping[str, LayerConfig],
        info: CheckpointInfo,
        sha256: str,
    ) -> None:
        """Check every entry against the classifier at full width and the loaded one.

        ``changed`` is what ``narrow`` changed, ``info`` and ``sha256`` are the file's.

        Raises:
            CheckpointError: naming the first entry that does not match.
        """
        size = info.preprocessing.size
        facts: dict[str, tuple[object, object]] = {
            "sha256": (self.sha256, sha256),
            "arch": (self.arch, info.arch),
            "num_classes": (self.num_classes, info.num_classes),
            "input_size": (self.input_size, size),
            "normalization": (self.normalization, info.normalization),
        }
        for name in sorted(self.modules.keys() | changed.keys()):
            facts[f"modules.{name}"] = (self.modules.get(name), changed.get(name))
        whole, state = full.state_dict(), small.state_dict()
        facts["tensors"] = (sorted(self.tensors), sorted(state))
        for name in self.tensors.keys() & state.keys():
            facts[f"tensors.{name}"] = (self.tensors[name].describes(state[name], whole[name]), True)
        facts["weights_sha256"] = (self.weights_sha256, weights_hash(small))
        facts["before"] = (self.before, NetworkSize.of(full, size))
        facts["after"] = (self.after, NetworkSize.of(small, size))
        for where, (stated, found) in facts.items():
            if stated != found:
                raise CheckpointError(
                    f"the plan next to the compacted weights does not describe them: {where} is not true",
                    code="channel-plan-mismatch",
                    hint="the plan belongs to another file; copy both files again, or move the plan away",
                )


def make_plan(
    full: nn.Module,
    small: nn.Module,
    changed: Mapping[str, LayerConfig],
    coupling: Coupling,
    kept: Mapping[str, Tensor],
    *,
    info: CheckpointInfo,
    source_sha256: str | None,
    source_weights_sha256: str,
    sha256: str,
) -> ChannelPlan:
    """Return the plan by which ``small`` was made of ``full`` with the channels ``kept``."""
    whole, state = full.state_dict(), small.state_dict()
    gone, first = positions_gone(coupling.groups, kept), tied(full)

    def left(name: str, dim: int) -> tuple[int, ...] | None:
        name = first.get(name, name)
        if (name, dim) not in gone or not gone[name, dim].numel():
            return None
        stays = torch.ones(whole[name].shape[dim], dtype=torch.bool)
        stays[gone[name, dim]] = False
        return tuple(stays.nonzero().flatten().tolist())

    size = info.preprocessing.size
    return ChannelPlan(
        arch=info.arch,
        num_classes=info.num_classes,
        input_size=size,
        normalization=info.normalization,
        modules={name: dict(config) for name, config in changed.items()},
        tensors={
            name: KeptTensor(shape=tuple(tensor.shape), rows=left(name, 0), columns=left(name, 1))
            for name, tensor in state.items()
        },
        before=NetworkSize.of(full, size),
        after=NetworkSize.of(small, size),
        source_sha256=source_sha256,
        source_weights_sha256=source_weights_sha256,
        sha256=sha256,
        weights_sha256=weights_hash(small),
    )


def _describes(kept: tuple[int, ...] | None, size: int, full: int) -> bool:
    if kept is None:
        return size == full
    ascending = all(one < other for one, other in itertools.pairwise(kept))
    return len(kept) == size and ascending and bool(kept) and kept[-1] < full
