"""The facts that a checkpoint of this tool holds beside its weights."""

from __future__ import annotations

from typing import Literal

from s2ap_deploy.spec import Normalization, Preprocessing, Record, ThreatModel

Stage = Literal["pretrain", "search", "finetune", "foreign"]


class CheckpointInfo(Record):
    """The facts about a network: what it is, what it was trained on and against, and its source.

    Attributes:
        stage: the last one that changed the weights.
        sparsity: the fraction of zeros among prunable weights; None before pruning.
        source_sha256: the hash of the file that this one was made from.
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
