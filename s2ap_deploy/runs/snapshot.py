"""The state of an unfinished stage: tensors and JSON in one file, so that a kill cannot mix two epochs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.runs import snapshot
from s2ap_deploy.runs.manifest import Manifest, Output, StageName, StageRecord, as_json, now

if TYPE_CHECKING:
    from torch import Tensor

    from s2ap_deploy.runs.folder import Run

FILE_NAME = "snapshot.safetensors"
_KEY, _SUM = "s2ap-deploy.snapshot", "s2ap-deploy.sha256"


def save(folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Replace the snapshot in ``folder``.

    ``header`` (JSON) is stored in the safetensors header, with a SHA-256 of it and of all tensors, so that
    damage never becomes a result. Tensors may be on any device, be views or share memory; they are stored
    contiguous. Raises StorageError.
    """
    import torch
    from safetensors.torch import save as serialize

    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    text = files.canonical_json(dict(header))
    data = serialize(copies, {_KEY: text, _SUM: _sha256(copies, text)})
    files.write_bytes(folder / FILE_NAME, data)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Load the tensors (on the CPU) and the header, or None. Raises RunFolderError if damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE_NAME
    if not path.exists():
        return None
    files.check_regular(path)
    try:
        with safe_open(path, framework="pt") as stream:
            facts = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if facts[_SUM] != _sha256(tensors, facts[_KEY]):
            raise ValueError("its content does not have the SHA-256 in its header")
        header = dict(json.loads(facts[_KEY]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error}",
            code="snapshot-damaged",
            hint="add --overwrite to start again",
        ) from error
    return tensors, header


def _sha256(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hash the header's ``text`` and contiguous CPU ``tensors`` with their names, types and shapes."""
    import torch

    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def remove(folder: Path) -> None:
    """Remove the snapshot, if there is one. Raises StorageError."""
    files.remove(folder / FILE_NAME)


State = Literal["finished", "resumable", "fresh"]


class Stage:
    """One stage of an open run.

    ``state`` is ``finished`` (skip it), ``resumable`` (a snapshot may exist) or ``fresh``; ``folder`` is
    where its files go; ``note`` is the reason why a finished stage runs again.
    """

    def __init__(self, run: Run, name: StageName, state: State, note: str | None = None) -> None:
        """Use :meth:`Run.stage` instead."""
        self.name = name
        self.state = state
        self.folder = run.folder(name)
        self.note = note
        self._run = run
        self._entered = time.monotonic()
        self._seconds_before = 0.0

    def __repr__(self) -> str:
        return f"Stage({self.name}: {self.state}, in {str(self.folder)!r})"

    @property
    def results(self) -> JsonValue:
        """The results that :meth:`finish` recorded; None before."""
        return self._record.results

    def save_snapshot(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the snapshot from which ``--resume`` continues; ``state`` is JSON. Raises StorageError."""
        if not self._run.ranks.first:
            return
        header = {
            "inputs_sha256": self._record.inputs_sha256,
            "seconds": self._seconds(),
            "state": dict(state),
        }
        snapshot.save(self.folder, tensors, header)

    def load_snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the last snapshot's tensors (on the CPU) and state, or None when there is none.

        Raises RunFolderError when it is damaged or was copied here from a stage with other inputs.
        """
        loaded = self._run.ranks.on_first(lambda: snapshot.load(self.folder))
        if loaded is None:
            return None
        tensors, header = loaded
        if header.get("inputs_sha256") != self._record.inputs_sha256:
            raise RunFolderError(
                f"the snapshot in {self.folder} belongs to different inputs",
                code="snapshot-foreign",
                hint="add --overwrite to start again",
            )
        self._seconds_before = header["seconds"]
        self._entered = time.monotonic()
        return tensors, header["state"]

    def finish(self, outputs: Sequence[Path], results: Any) -> None:
        """Record the stage as done, with ``results`` (JSON) and the hashes of ``outputs``; drop the snapshot.

        Every output must be in :attr:`folder`, so that starting the stage again removes it. Raises
        StorageError when one cannot be read, ValueError for one elsewhere or results that are not JSON.
        """

        def finish() -> Manifest:
            record = self._record.model_copy(
                update={
                    "status": "finished",
                    "outputs": tuple(self._describe(path) for path in outputs),
                    "results": as_json({"results": results})["results"],
                    "finished": now(),
                    "seconds": self._seconds(),
                }
            )
            self._run.save(self._run.manifest.with_stage(self.name, record))
            snapshot.remove(self.folder)
            return self._run.manifest

        self._run.manifest = self._run.ranks.on_first(finish)
        self.state = "finished"

    @property
    def _record(self) -> StageRecord:
        return self._run.manifest.stages[self.name]

    def _seconds(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._entered, 3)

    def _describe(self, path: Path) -> Output:
        relative = Path(path).relative_to(self.folder)
        found = files.within(self.folder, relative.as_posix())
        return Output(
            path=f"{self.name}/{relative.as_posix()}", sha256=files.sha256(found), bytes=found.stat().st_size
        )
