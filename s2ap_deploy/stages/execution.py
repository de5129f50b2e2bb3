"""The machine that does the work: what only the person at it knows, and the part a run folder remembers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from s2ap_deploy import files
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.evaluation.workers.pool import WorkerSpec
from s2ap_deploy.training.precision import FLOAT32, Precision

MACHINE = "machine.json"


@dataclass(frozen=True)
class ExecutionConfig:
    """What only the command line knows: where data lies here, and what computes.

    ``arch`` is an architecture by import path, and ``trust_pickle`` allows pickles to run code; both are
    the word of the person at the keyboard and never come from a file. ``ranks`` share the training, each in
    ``accumulate`` pieces of its rows; ``workers`` are attack processes where there is one rank.
    ``precision`` is that of training alone; attacks that certify compute in float32.
    """

    device: torch.device
    data_root: Path | None = None
    download: bool = False
    workers: int | None = None
    arch: str | None = None
    trust_pickle: bool = False
    accumulate: int = 1
    ranks: Ranks = SINGLE_PROCESS
    precision: Precision = FLOAT32

    @property
    def pieces(self) -> dict[str, int]:
        """What a training stage records of ``accumulate``: BatchNorm normalizes by the piece."""
        return {} if self.accumulate == 1 else {"accumulate": self.accumulate}

    @property
    def workforce(self) -> WorkerSpec:
        """The ranks or worker processes that run attacks."""
        return self.ranks if self.ranks.size > 1 else self.workers

    def save(self, folder: Path) -> None:
        """Keep in ``folder`` where data lies, for the commands that follow. Raises StorageError."""
        if self.data_root is not None:
            files.write_json(folder / MACHINE, {"data_root": str(self.data_root)})


def remembered_data_root(folder: Path) -> Path | None:
    """The data root that an earlier command was given, or None. Raises RunFolderError when damaged."""
    path = folder / MACHINE
    if not path.exists():
        return None
    try:
        return Path(files.parse_json(files.read_bytes(path))["data_root"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}", hint="give --data-root again") from error
