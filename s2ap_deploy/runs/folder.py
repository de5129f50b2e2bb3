"""The run folder: one folder per model, which every command continues and a kill cannot damage.

::

    s2ap-run/
      manifest.json     which stages are done, from which inputs, with which outputs
      recipe.yaml       the resolved recipe, when a recipe started the run
      .lock             held by the process that works here
      search/           one folder per stage; files in it belong to that stage
      export-int8/      a further exported file; its own certificate is in artifact-int8/
        snapshot.safetensors   only while the stage is unfinished

The manifest decides: a file that it does not list does not count. A stage starts in three steps
(remove its record and those of later stages, remove their folders, record the start), and ends in two
(record the end, remove the snapshot); a kill between any two steps leaves a consistent folder.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import JsonValue

from s2ap_deploy import files
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.runs import folder, manifest, snapshot
from s2ap_deploy.runs.manifest import (
    STAGES,
    Manifest,
    Output,
    Session,
    StageName,
    StageRecord,
    kind_of,
    now,
)
from s2ap_deploy.runs.snapshot import Stage, State

if TYPE_CHECKING:
    from s2ap_deploy.recipe.schema import Recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = ".lock"
_HINT = "wait for it to end, or choose another folder with --run"

# (device, inode) of every folder that this process holds, and the process id that entered it: a
# forked child inherits this table but not the locks.
_held: dict[tuple[int, int], int] = {}
_guard = threading.Lock()


class FolderLock:
    """An exclusive POSIX record lock on ``<folder>/.lock``.

    Such a lock is not inherited by forked or spawned workers, so that an orphan cannot keep a folder
    locked. Caution: closing *any* descriptor of the file releases it. Nothing else in the
    process may open ``.lock``, and a second lock on the same folder is refused before opening it.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises RunFolderError when it is held, StorageError when it cannot be made."""
        if fcntl is None:
            raise RunFolderError(
                "run folders need POSIX file locks, which this system lacks",
                code="locks-unsupported",
                hint="use WSL",
            )
        status = folder.stat()
        self._folder = (status.st_dev, status.st_ino)
        self._descriptor: int | None = None
        with _guard:
            if _held.get(self._folder) == os.getpid():
                raise RunFolderError(f"{folder} is already open in this process", code="run-folder-in-use")
            descriptor = _open(folder / FILE_NAME)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            except (BlockingIOError, PermissionError) as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                who = f"process {holder}" if holder.isdigit() else "another process"
                raise RunFolderError(
                    f"{folder} is in use by {who}", code="run-folder-in-use", hint=_HINT
                ) from error
            except OSError as error:
                os.close(descriptor)
                raise StorageError(
                    f"cannot lock {folder}: {error.strerror}", code="folder-not-locked"
                ) from error
            self._descriptor = descriptor
            _held[self._folder] = os.getpid()

    def release(self) -> None:
        """Release the lock; a second call does nothing. The file is kept, as removing it would be a race."""
        with _guard:
            # A forked child holds a copy of this object, but the lock is its parent's.
            if self._descriptor is not None and _held.get(self._folder) == os.getpid():
                del _held[self._folder]
                os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _open(path: Path) -> int:
    # O_NOFOLLOW: a folder from elsewhere may hold a link there, and its target would be overwritten.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise RunFolderError(
                f"{path} is a link, but the lock of a run folder must be a plain file", code="path-is-link"
            ) from error
        raise StorageError(f"cannot create {path}: {error.strerror}", code="file-not-created") from error


RECIPE_FILE = "recipe.yaml"
MODEL = "model.safetensors"
MASKS = "masks.safetensors"
CERTIFICATE = "certificate.json"  # of an exported file
COPY = "model.onnx"  # of an exported file from outside the folder
ABOUT = "model.json"  # beside C sources or the files of a runtime, with the hashes of all of them
_OVERWRITE = "add --overwrite to start over, or choose another folder with --run"
_BESIDE = "add --overwrite to replace it, or --name NAME to keep both"
_COMMANDS = {
    "pretrain": "pretrain or prune",
    "search": "prune",
    "finetune": "prune",
    "certify": "certify",
    "export": "export",
    "artifact": "certify --artifact",
    "device": "collect",
    "gate": "gate",
}
_RESUME = "add --resume to continue, or --overwrite to start over"


class Run:
    """An open, locked run folder. Use it as a context manager: leaving it releases the lock.

    Where several ranks share a run, rank 0 locks and writes the folder; the others read it, and get every
    decision about it from rank 0.
    """

    ranks = SINGLE_PROCESS

    def __init__(self, path: Path, held: FolderLock | None, contents: Manifest, ranks: Ranks) -> None:
        """Use :meth:`open` instead."""
        self.path = path
        self.manifest = contents
        self.ranks = ranks
        self._lock = held

    @classmethod
    def open(cls, path: Path | str, *, create: bool, command: str, ranks: Ranks = SINGLE_PROCESS) -> Run:
        """Lock the run folder at ``path`` and note ``command`` in its manifest.

        Args:
            path: the folder.
            create: make the folder (and its parents) when it does not exist.
            command: the command line, for the manifest.

        Raises:
            RunFolderError: ``path`` is a file, holds something else, holds no run (without ``create``) or is
                in use.
        """
        path = Path(path)
        own: list[Run] = []

        def lock_and_load() -> Manifest:
            own.append(cls._open(path, create=create, command=command, ranks=ranks))
            return own[0].manifest

        contents = ranks.on_first(lock_and_load)
        return own[0] if own else cls(path, None, contents, ranks)

    @classmethod
    def _open(cls, path: Path, *, create: bool, command: str, ranks: Ranks) -> Run:
        check_is_run_folder(path, create=create)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot create {path}: {error.strerror}", code="folder-not-created"
            ) from error
        held = FolderLock(path)
        try:
            contents = manifest_of(path)
            files.remove_leftovers(path)
            run = cls(path, held, contents, ranks)
            run.save(contents.with_command(command))
        except BaseException:
            held.release()
            raise
        return run

    @classmethod
    def look(cls, path: Path | str) -> Run:
        """Open a run folder that is only read: nothing is locked or noted, and no stage can be entered.

        Raises RunFolderError when there is no run, or its manifest is damaged.
        """
        check_is_run_folder(Path(path), create=False)
        return cls(Path(path), None, manifest_of(Path(path)), SINGLE_PROCESS)

    @property
    def locked(self) -> bool:
        """Whether this process may write here."""
        return self._lock is not None

    def save(self, contents: Manifest) -> None:
        """Replace the manifest, on the disk first. Raises StorageError."""
        contents.save(self.path)
        self.manifest = contents

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        stages = ", ".join(f"{name} {record.status}" for name, record in self.manifest.stages.items())
        return f"Run({str(self.path)!r}: {stages or 'no stage yet'})"

    def stage(
        self,
        name: StageName,
        *,
        inputs: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
        environment: Mapping[str, Any] | None = None,
    ) -> Stage:
        """Enter a stage: skip it, continue it or start it.

        ``inputs`` is JSON and holds everything that decides the result (hashes of files rather than
        paths, seeds, options); ``environment`` is only recorded. A finished stage with the same inputs
        and intact outputs is skipped. An unfinished one needs ``resume``; one with other inputs needs
        ``overwrite``; a finished one with damaged outputs needs either. Starting a stage discards the
        later ones, and needs ``overwrite`` when that would lose finished work.

        Raises RunFolderError, and StorageError when the disk refuses.
        """

        def enter() -> tuple[State, str | None, Manifest]:
            stage = self._enter(name, inputs, resume, overwrite, environment)
            return stage.state, stage.note, self.manifest

        state, note, self.manifest = self.ranks.on_first(enter)
        return Stage(self, name, state, note)

    def _enter(
        self,
        name: StageName,
        inputs: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
        environment: Mapping[str, Any] | None,
    ) -> Stage:
        folder = self.folder(name)
        wanted = manifest.as_json(inputs)
        session = Session(started=now(), environment=manifest.as_json(environment or {}))
        record = self.manifest.stages.get(name)
        damage: str | None = None
        if record is None and not overwrite:
            self._check_nothing_is_lost(name)
        elif record is not None and not overwrite:
            self._check_inputs(name, record, wanted)
            if record.status == "started":
                if not resume:
                    raise RunFolderError(
                        f"{name} in {self.path} was started and did not finish",
                        code="stage-unfinished",
                        hint=_RESUME,
                    )
                return self._continue(name, record, session)
            damage = self._damage(record)
            if damage is None:
                snapshot.remove(folder)
                return Stage(self, name, "finished")
            if not resume:
                raise RunFolderError(
                    f"{name} in {self.path} finished, but {damage}", code="output-damaged", hint=_RESUME
                )
        return self._start(name, wanted, session, note=damage and f"{name} runs again: {damage}")

    def reopen(self, name: StageName, *, inputs: Mapping[str, Any]) -> None:
        """Reopen a stage with other ``inputs`` and the files that it left, to be resumed.

        For stages that know which of their files are valid for the new inputs. Discards the later stages.
        Raises StorageError.
        """
        wanted = manifest.as_json(inputs)
        opened = self.manifest.stages[name].model_copy(
            update={
                "status": "started",
                "inputs": wanted,
                "inputs_sha256": manifest.digest(wanted),
                "outputs": (),
                "results": None,
                "finished": None,
            }
        )
        later = self._later(name)
        folders = [self.folder(each) for each in later]
        self.save(self.manifest.without(later).with_stage(name, opened))
        try:
            for folder in folders:
                if folder.exists():
                    shutil.rmtree(folder)
        except OSError as error:
            raise StorageError(f"cannot clear {self.path}: {error}", code="folder-not-cleared") from error

    def folder(self, name: StageName) -> Path:
        """Return the folder of a stage, which may not exist. Raises RunFolderError if it is a link."""
        if not manifest.is_stage(name):
            raise ValueError(f"{name!r} is not a stage; stages are {', '.join(STAGES)}")
        folder = self.path / name
        if folder.is_symlink():
            raise RunFolderError(
                f"{folder} is a link; a stage's folder must be inside the run folder", code="path-is-link"
            )
        return folder

    def output(self, name: StageName, file_name: str) -> Path:
        """Return the file that a finished stage wrote, after checking its hash.

        Raises RunFolderError when the stage is not finished, lists no such file, or the file changed.
        """
        record = self.manifest.stages.get(name)
        if record is None or record.status != "finished":
            first = f"run s2ap-deploy {_COMMANDS[kind_of(name)]} first"
            hint = first if record is None else "repeat its command with --resume"
            raise RunFolderError(f"{self.path} holds no finished {name}", code="stage-missing", hint=hint)
        path = f"{name}/{file_name}"
        for output in record.outputs:
            if output.path == path:
                damage = self._damage_of(output)
                if damage is not None:
                    command = _COMMANDS[kind_of(name)]
                    hint = f"repeat s2ap-deploy {command} with --resume, which creates it again"
                    raise RunFolderError(
                        f"{name} in {self.path} finished, but {damage}", code="output-damaged", hint=hint
                    )
                return files.within(self.path, path)
        raise RunFolderError(f"{name} in {self.path} wrote no {file_name}", code="output-missing")

    def save_recipe(self, resolved: Recipe) -> None:
        """Store the resolved recipe next to the manifest."""
        from s2ap_deploy.recipe import catalog  # late: the gate starts without recipes and YAML

        files.write_text(self.path / RECIPE_FILE, catalog.dump(resolved))

    def load_recipe(self) -> Recipe | None:
        """Load the recipe of this run, or None when there is none. Raises RecipeError."""
        from s2ap_deploy.recipe import catalog

        path = self.path / RECIPE_FILE
        return catalog.load(str(path)) if path.exists() else None

    def _start(
        self, name: StageName, inputs: dict[str, JsonValue], session: Session, *, note: str | None
    ) -> Stage:
        obsolete = (name, *self._later(name))
        folders = [self.folder(each) for each in obsolete]
        if any(each in self.manifest.stages for each in obsolete):
            self.save(self.manifest.without(obsolete))
        try:
            for folder in folders:
                if folder.exists():
                    shutil.rmtree(folder)
            folders[0].mkdir()
        except OSError as error:
            raise StorageError(f"cannot clear {self.path}: {error}", code="folder-not-cleared") from error
        record = StageRecord(
            status="started", inputs=inputs, inputs_sha256=manifest.digest(inputs), sessions=(session,)
        )
        self.save(self.manifest.with_stage(name, record))
        return Stage(self, name, "fresh", note)

    def _continue(self, name: StageName, record: StageRecord, session: Session) -> Stage:
        folder = self.folder(name)
        folder.mkdir(exist_ok=True)
        files.remove_leftovers(folder)
        resumed = record.model_copy(update={"sessions": (*record.sessions, session)})
        self.save(self.manifest.with_stage(name, resumed))
        return Stage(self, name, "resumable")

    def _check_inputs(self, name: StageName, record: StageRecord, wanted: Mapping[str, JsonValue]) -> None:
        changed = manifest.differences(record.inputs, wanted)
        if not changed:
            return
        if len(changed) > 5:
            changed[5:] = [f"and {len(changed) - 5} more"]
        raise RunFolderError(
            f"{self.path} already has a {name} stage with different inputs ({'; '.join(changed)})",
            code="stage-inputs-changed",
            hint=_BESIDE if kind_of(name) == "export" else _OVERWRITE,
        )

    def _check_nothing_is_lost(self, name: StageName) -> None:
        finished = [late for late in self._later(name) if self._is_finished(late)]
        lost = [late for late in finished if late != "gate"]  # a verdict is computed again in a second
        if lost:
            raise RunFolderError(
                f"starting {name} in {self.path} would discard its finished {' and '.join(lost)}",
                code="stages-discarded",
                hint=_OVERWRITE,
            )

    def _is_finished(self, name: StageName) -> bool:
        record = self.manifest.stages.get(name)
        return record is not None and record.status == "finished"

    def _later(self, name: StageName) -> tuple[StageName, ...]:
        """Return the stages that are built on ``name``, with folders that a kill may have left.

        Files of a run do not depend on one another: on an export, only that file's certificate is built, and
        on both the records of devices that ran the file.
        """
        if kind_of(name) in ("export", "artifact", "device"):
            own = (manifest.beside("artifact", name),) if kind_of(name) == "export" else ()
            on_device = (
                device
                for device, record in self.manifest.of_kind("device").items()
                if name in (record.inputs.get("export"), record.inputs.get("certified_by"))
            )
            return (*own, *on_device, "gate")
        later = STAGES[STAGES.index(kind_of(name)) + 1 :]
        left = {each.name for each in self.path.iterdir() if manifest.is_stage(each.name)}
        named = sorted({*self.manifest.stages, *left} - {*STAGES})
        return (*later, *(each for each in named if kind_of(each) in later))

    def _damage(self, record: StageRecord) -> str | None:
        return next((damage for damage in map(self._damage_of, record.outputs) if damage), None)

    def _damage_of(self, output: Output) -> str | None:
        path = files.within(self.path, output.path)
        if not path.is_file():
            return f"{output.path} is missing"
        if path.stat().st_size != output.bytes or files.sha256(path) != output.sha256:
            return f"{output.path} has changed since"
        return None


def manifest_of(path: Path) -> Manifest:
    """Load the manifest in ``path``, or make an empty one. Raises RunFolderError."""
    if (path / manifest.FILE_NAME).exists():
        return Manifest.load(path)
    return Manifest(tool_version=manifest.tool_version(), created=now())


def check_is_run_folder(path: Path, *, create: bool) -> None:
    """Raise RunFolderError for a path that cannot hold a run, or without ``create`` holds none."""
    other = "choose another folder with --run"
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file, not a run folder", code="run-folder-is-file", hint=other)
    try:
        entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", code="folder-not-read") from error
    if manifest.FILE_NAME in entries:
        return
    # A kill before the first manifest was written leaves no more than these.
    entries = {name for name in entries if name != folder.FILE_NAME and not name.startswith(files.TEMPORARY)}
    if entries:
        raise RunFolderError(
            f"{path} has other files and is not a run folder", code="run-folder-foreign", hint=other
        )
    if not create:
        raise RunFolderError(
            f"there is no run in {path}",
            code="run-missing",
            hint="start one with s2ap-deploy prune or s2ap-deploy run, or choose a folder with --run",
        )
