"""The facts that a checkpoint of this tool carries beside its weights. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationError

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.spec import Normalization, Preprocessing, Record, ThreatModel

SCHEMA_VERSION = 1
Stage = Literal["pretrain", "search", "finetune", "foreign"]


class CheckpointInfo(Record):
    """What a network is, what it was trained on and against, and where it came from.

    ``source_sha256`` is the hash of the file that this one was made from; ``sparsity`` is the fraction of
    zeros among prunable weights, None before pruning; ``stage`` is the last one that changed the weights.
    """

    schema_version: Literal[1] = 1
    arch: str
    num_classes: int
    data: str | None = None
    preprocessing: Preprocessing
    normalization: Normalization | None = None
    threat: ThreatModel | None = None
    class_names: tuple[str, ...] = ()
    stage: Stage
    sparsity: float | None = None
    source_sha256: str | None = None
    tool_version: str


def parse(text: str, path: str) -> CheckpointInfo:
    """Read the JSON that a checkpoint at ``path`` carries. Raises CheckpointError."""
    try:
        return CheckpointInfo.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if where == "schema_version":
            raise CheckpointError(
                f"{path} was written in schema version {first['input']!r}; this one reads {SCHEMA_VERSION}",
                hint="use the version of s2ap-deploy that wrote it, or a newer one",
            ) from None
        raise CheckpointError(
            f"the description inside {path} is damaged at {where or 'its start'}: {first['msg']}"
        ) from None
