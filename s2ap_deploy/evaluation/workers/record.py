"""The append-only record of an attack: the result of every finished unit, safe against a kill at any time.

``attack.jsonl`` starts with a header (everything the outcome depends on) and gains one line per unit.
The points that a unit found are stored in a separate file, which is complete before its line is written.
A line torn by a kill is dropped, and its unit is run again; one that is not as its SHA-256 says is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.evaluation.autoattack.frozen_model import Unit, UnitResult
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.runtime import versions

SCHEMA_VERSION = 2
_FILE = "attack.jsonl"


class AttackRecord:
    """The record in ``folder``. The caller holds the run folder's lock."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Open or begin a record whose outcome depends on ``header`` (JSON values).

        Raises RunFolderError for a damaged record or one of a different attack, StorageError
        when the disk refuses.
        """
        self._folder = folder
        self._path = folder / _FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {folder}: {error.strerror or error}") from error
        first = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **header}))
        if not self._path.exists():
            files.write_bytes(self._path, _line(first))
        lines = self._whole_lines()
        self._refuse_other(lines[0] if lines else None, first)
        self.results = tuple(self._result(line) for line in lines[1:])

    def append(self, result: UnitResult) -> None:
        """Keep ``result``; on return it survives a kill. Raises StorageError."""
        entry: dict[str, Any] = {
            "block": result.unit.block,
            "attack": result.unit.attack,
            "seed": result.unit.seed,
            "indices": list(result.unit.indices),
            "broken": list(result.broken),
            "predictions": list(result.predictions),
            "seconds": round(result.seconds, 3),
            "zero_gradient": result.zero_gradient,
        }
        if result.broken:
            content = safetensors.numpy.save({"points": result.points})
            entry["points"] = f"block-{result.unit.block:05d}-{result.unit.attack}.safetensors"
            entry["points_sha256"] = hashlib.sha256(content).hexdigest()
            files.write_bytes(self._folder / entry["points"], content)
        size = self._path.stat().st_size
        try:
            with open(self._path, "ab") as stream:
                stream.write(_line(entry))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            os.truncate(self._path, size)  # freeing space never fails for lack of it
            raise StorageError(f"cannot write {self._path}: {error.strerror or error}") from error

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Return the complete lines; truncate the file after them if the last line is torn."""
        content = files.read_bytes(self._path)
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        try:
            return [_parsed(line) for line in whole.splitlines(keepends=True)]
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _refuse_other(self, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
        if found is None:
            raise self._damaged("it has no header")
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise RunFolderError(
                    f"{self._path} records a different attack: {key} was {found.get(key)!r}, "
                    f"now it is {wanted.get(key)!r}",
                    code="attack-record-foreign",
                    hint="restart this stage with --overwrite, or use another --run",
                )

    def _result(self, line: dict[str, Any]) -> UnitResult:
        try:
            unit = Unit(line["block"], line["attack"], line["seed"], tuple(line["indices"]))
            points = np.empty((0,), dtype=np.float32)
            if line["broken"]:
                content = files.read_bytes(files.within(self._folder, line["points"]))
                if hashlib.sha256(content).hexdigest() != line["points_sha256"]:
                    raise self._damaged(f"{line['points']} was changed")
                points = safetensors.numpy.load(content)["points"]
            return UnitResult(
                unit=unit,
                broken=tuple(line["broken"]),
                predictions=tuple(line["predictions"]),
                points=points,
                seconds=line["seconds"],
                zero_gradient=line["zero_gradient"],
            )
        except (KeyError, TypeError, StorageError, safetensors.SafetensorError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def _damaged(self, reason: str) -> RunFolderError:
        return RunFolderError(
            f"{self._path} is damaged: {reason}",
            code="attack-record-damaged",
            hint="start this stage again with --overwrite",
        )


def binding(
    network: nn.Module, images: Tensor, labels: Tensor, *, seed: int, block_size: int, device: torch.device
) -> dict[str, Any]:
    """Return everything that an attack's outcome depends on, as JSON values for the header."""
    samples = hashlib.sha256(images.numpy().tobytes())
    samples.update(labels.numpy().tobytes())
    found = versions()
    return {
        "weights_sha256": weights_hash(network),
        "samples_sha256": samples.hexdigest(),
        "shape": list(images.shape),
        "seed": seed,
        "block_size": block_size,
        "device": device.type,
        "torch": found["torch"],
        "pyautoattack": found["pyautoattack"],
    }


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return ``entry`` as a line of canonical JSON that holds its own SHA-256."""
    content = json.dumps(entry, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    return b'{"sha256":"%s",%s\n' % (hashlib.sha256(content).hexdigest().encode(), content[1:])


def _parsed(line: bytes) -> dict[str, Any]:
    """Parse what :func:`_line` wrote. Raises ValueError for anything else."""
    entry = files.parse_json(line)
    if not isinstance(entry, dict) or entry.pop("sha256", None) is None or _line(entry) != line:
        raise ValueError("a line does not have the SHA-256 in it")
    return entry
