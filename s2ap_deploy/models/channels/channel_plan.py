"""The JSON beside compacted weights: which channels stayed, and what each layer is now built with.

A plan comes from a file, so nothing in it is believed: every statement is held against the architecture at
full width and against the weights that it describes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.models.channels.layer_channels import Coupling, macs, positions_gone
from s2ap_deploy.models.channels.narrowing import Numbers, tied
from s2ap_deploy.models.checkpoints.info import CheckpointInfo
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.spec import Normalization, Record

FORMAT: Literal["s2ap-deploy compacted network"] = "s2ap-deploy compacted network"
LONGEST = 256 * 2**20  # bytes

Whole = Annotated[int, Field(strict=True, ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class KeptTensor(Record):
    """One tensor: its ``shape`` now, and which rows and columns of the full one it still has.

    ``rows`` and ``columns`` are rising positions in the full tensor; None where all stayed.
    """

    shape: tuple[Whole, ...]
    rows: tuple[Whole, ...] | None = None
    columns: tuple[Whole, ...] | None = None

    def describes(self, tensor: Tensor, full: Tensor) -> bool:
        """Whether ``tensor`` can be this part of ``full``."""
        sides = (self.rows, self.columns)
        return self.shape == tuple(tensor.shape) and all(
            _describes(sides[dim] if dim < 2 else None, size, full.shape[dim])
            for dim, size in enumerate(self.shape)
        )


class Size(Record):
    """Learnable values of a network, and multiply-accumulates per image of its layers."""

    parameters: Whole
    macs: Whole

    @classmethod
    def of(cls, network: nn.Module, input_size: tuple[int, int, int]) -> Size:
        """Raises ArchitectureError when the network cannot run on ``input_size`` (C, H, W)."""
        parameters = sum(tensor.numel() for tensor in network.parameters())
        return cls(parameters=parameters, macs=macs(network, input_size))


class Plan(Record):
    """How a network with fewer channels is made of ``arch`` at full width.

    ``modules``: the numbers to change in each layer, by name, such as ``in_channels``. ``tensors``: every
    tensor of the file. ``source_sha256`` is the hash of the checkpoint that was compacted, and
    ``source_weights_sha256`` that of its weights; ``sha256`` and ``weights_sha256`` are those of the file
    beside the plan. All names are those of the file.
    """

    format: Literal["s2ap-deploy compacted network"] = FORMAT
    schema_version: Literal[1] = 1
    arch: str
    num_classes: Whole
    input_size: tuple[Whole, Whole, Whole]
    normalization: Normalization | None
    modules: dict[str, dict[str, Whole]]
    tensors: dict[str, KeptTensor]
    before: Size
    after: Size
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
    def load(cls, path: Path) -> Plan:
        """Read what :meth:`save` wrote. Raises CheckpointError for anything else, StorageError."""
        data = files.read_bytes(path, limit=LONGEST)
        if len(data) > LONGEST:
            raise CheckpointError(f"{path} is longer than any plan of a compacted network")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"]))[:200] or "its start"
            raise CheckpointError(
                f"{path} is no plan of a compacted network: at {where}: {first['msg']}",
                hint="it belongs to the weights beside it; copy both again, or move it away",
            ) from None

    def check(
        self,
        full: nn.Module,
        small: nn.Module,
        changed: Mapping[str, Numbers],
        info: CheckpointInfo,
        sha256: str,
    ) -> None:
        """Hold every statement against the classifier at full width and the one that was loaded.

        ``changed`` are the numbers that ``narrow`` changed, ``info`` and ``sha256`` the file's. Raises
        CheckpointError that names the first statement that is not true.
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
        facts["before"] = (self.before, Size.of(full, size))
        facts["after"] = (self.after, Size.of(small, size))
        for where, (stated, found) in facts.items():
            if stated != found:
                raise CheckpointError(
                    f"the plan beside the compacted weights does not describe them: {where} is not true",
                    hint="it belongs to another file; copy both again, or move it away",
                )


def make_plan(
    full: nn.Module,
    small: nn.Module,
    changed: Mapping[str, Numbers],
    coupling: Coupling,
    kept: Mapping[str, Tensor],
    *,
    info: CheckpointInfo,
    source_sha256: str | None,
    source_weights_sha256: str,
    sha256: str,
) -> Plan:
    """The plan by which ``small`` was made of ``full`` with the channels ``kept``; see :class:`Plan`."""
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
    return Plan(
        arch=info.arch,
        num_classes=info.num_classes,
        input_size=size,
        normalization=info.normalization,
        modules={name: dict(numbers) for name, numbers in changed.items()},
        tensors={
            name: KeptTensor(shape=tuple(tensor.shape), rows=left(name, 0), columns=left(name, 1))
            for name, tensor in state.items()
        },
        before=Size.of(full, size),
        after=Size.of(small, size),
        source_sha256=source_sha256,
        source_weights_sha256=source_weights_sha256,
        sha256=sha256,
        weights_sha256=weights_hash(small),
    )


def _describes(kept: tuple[int, ...] | None, size: int, full: int) -> bool:
    if kept is None:
        return size == full
    rises = all(one < other for one, other in itertools.pairwise(kept))
    return len(kept) == size and rises and bool(kept) and kept[-1] < full
