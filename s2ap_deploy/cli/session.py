"""From options to a job: the run folder opened, the recipe resolved, the machine set up."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from pydantic import ValidationError

from s2ap_deploy import runtime
from s2ap_deploy.cli import options
from s2ap_deploy.cli.progress import recorder
from s2ap_deploy.cli.verbosity import explained
from s2ap_deploy.distributed import environment
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS
from s2ap_deploy.distributed.process_group import current_group
from s2ap_deploy.errors import RunFolderError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.recipe import target
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.spec import Record
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.stages.execution import ExecutionConfig, remembered_data_root
from s2ap_deploy.stages.resolve import changed as changed
from s2ap_deploy.stages.resolve import export_changes as export_changes
from s2ap_deploy.stages.resolve import from_checkpoint as from_checkpoint
from s2ap_deploy.stages.resolve import normalization as normalization
from s2ap_deploy.stages.resolve import resolve as resolve
from s2ap_deploy.tracking import tracked
from s2ap_deploy.training.precision import choose_precision

Section = TypeVar("Section", bound=Record)


def command_line() -> str:
    """The command as it was typed, for the manifest."""
    return shlex.join(["s2ap-deploy", *sys.argv[1:]])


@contextmanager
def open_job(
    folder: Path,
    recipe: Recipe | None,
    *,
    create: bool,
    device: str,
    threads: int | None,
    data_root: Path | None,
    download: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    workers: int | None = None,
    arch: str | None = None,
    trust_pickle: bool = False,
    accumulate: int = 1,
    precision: str = "float32",
    compiled: bool = False,
    changes: Mapping[str, Any] | Callable[[Recipe], Mapping[str, Any]] | None = None,
) -> Iterator[RunContext]:
    """Open the run folder and yield the job in it.

    Without ``recipe`` the folder's own is taken, with ``changes`` (dotted keys) made to it, which may
    depend on it. ``arch`` is used here only when it is an import path: a registered name belongs into
    the recipe.
    """
    here = machine(
        folder,
        device=device,
        threads=threads,
        data_root=data_root,
        download=download,
        workers=workers,
        arch=arch,
        trust_pickle=trust_pickle,
        accumulate=accumulate,
        precision=precision,
        compiled=compiled,
    )
    with (
        recorder(quiet) as progress,
        Run.open(folder, create=create, command=command_line(), ranks=here.ranks) as run,
    ):
        if recipe is None:
            recipe = run.load_recipe()
            if recipe is None:
                raise RunFolderError(
                    f"{folder} holds no recipe yet", hint="start with s2ap-deploy prune or s2ap-deploy run"
                )
        recipe = changed(recipe, changes(recipe) if callable(changes) else changes or {})
        with telling(
            RunContext(run, recipe, here, progress, resume=resume, overwrite=overwrite), quiet
        ) as job:
            yield job


@contextmanager
def telling(job: RunContext, quiet: bool) -> Iterator[RunContext]:
    """``job``, telling also what ``--verbose`` adds, and its figures to the trackers of ``--track``."""
    trackers = options.told("track", ()) if environment.rank() == 0 else ()
    with tracked(job.recorder, trackers, job.run.path, job.recipe.model_dump(mode="json")) as recording:
        job.recorder = recording
        with explained(job, options.told("verbose", False) and not quiet):
            yield job


def machine(
    folder: Path,
    *,
    device: str,
    threads: int | None,
    data_root: Path | None,
    download: bool,
    workers: int | None = None,
    arch: str | None = None,
    trust_pickle: bool = False,
    accumulate: int = 1,
    precision: str = "float32",
    compiled: bool = False,
) -> ExecutionConfig:
    """The machine as the options describe it; ``folder`` may remember where data lies."""
    if threads is not None:
        torch.set_num_threads(threads)
    given = data_root.expanduser().resolve() if data_root is not None else None
    chosen = runtime.device(device)
    return ExecutionConfig(
        device=chosen,
        ranks=current_group(chosen),
        data_root=given or remembered_data_root(folder),
        download=download,
        workers=workers,
        arch=import_path(arch),
        trust_pickle=trust_pickle,
        accumulate=accumulate,
        precision=choose_precision(precision, chosen, compiled=compiled),
    )


def dry_run_report(
    folder: Path,
    recipe: Recipe,
    *,
    as_json: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    stages: Sequence[str] | None = None,
    **machine_options: Any,
) -> None:
    """Say what the command would do in the run folder, which is not touched, and how long that may take."""
    from s2ap_deploy.cli import sweep_tables
    from s2ap_deploy.planning import dry_run

    with recorder(quiet) as progress:
        progress.note("timing a few steps of each kind")
        here = machine(folder, **machine_options)
        if not here.ranks.first:
            return
        outlook = dry_run.dry_run_report(
            recipe,
            folder,
            dataclasses.replace(here, ranks=SINGLE_PROCESS),
            resume=resume,
            overwrite=overwrite,
            stages=stages or dry_run.STAGES,
        )
    if as_json:
        click.echo(outlook.model_dump_json())
    else:
        sweep_tables.show_run(outlook)


def import_path(arch: str | None) -> str | None:
    """``arch`` when it names code to import, which is then also looked for in the working folder."""
    if arch is None or not registry.is_import_path(arch):
        return None
    # `python -m` looks there by itself, an installed command does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return arch


def following(command: str, folder: Path, arch: str | None = None) -> str:
    """What to type next: ``command`` on the same folder, with the import path that it must be told again."""
    words = ["s2ap-deploy", *command.split()]
    if folder != options.RUN:
        words += ["--run", str(folder)]
    if import_path(arch) is not None:
        words += ["--arch", str(arch)]
    return f"next: {shlex.join(words)}"


def only_import_path(arch: str | None, decided_by: str) -> None:
    """Refuse a registered name where the recipe has already chosen one. Raises UsageError."""
    if arch is not None and not registry.is_import_path(arch):
        raise UsageError(
            f"--arch {arch}: {decided_by} decides on the architecture; "
            "only an import path, which it cannot name, is taken here",
            hint="leave it out" if decided_by == "the run folder" else f"--set model.arch={arch}",
        )


def check_output(path: Path | None, suffixes: tuple[str, ...], *, overwrite: bool) -> None:
    """Refuse an ``--output`` that could not be written in the end. Raises UsageError."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise UsageError(f"cannot tell the format of {path}", hint=f"end its name in {' or '.join(suffixes)}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise UsageError(f"{path} exists", hint="add --overwrite, or choose another --output")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} for {path.name}", hint="make it first")


def section(schema: type[Section], content: Mapping[str, Any]) -> Section:
    """A section of a recipe from options, None for those that nobody gave. Raises UsageError."""
    try:
        return schema.model_validate({key: value for key, value in content.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the options"
        raise UsageError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def export_section(
    options: Mapping[str, Any], name: str | None, prune: PruneSection
) -> tuple[ExportSection, target.Found | None]:
    """The export section that ``options`` and a target make without a recipe, and the target."""
    found = target.find(name) if name is not None and name != target.NONE else None
    content = dict(options)
    if content.get("align") is not None and prune.granularity != "channel":
        raise UsageError("--align is for channels", hint="add --granularity channel, or leave it out")
    if found is not None:
        content = target.fill(content, found.target, ExportSection.model_fields, prune.granularity)
    return section(ExportSection, {**content, "target": name}), found


def architecture(reference: str | None) -> str:
    """``--arch`` where it stands alone. Raises UsageError without it."""
    if reference is None:
        raise UsageError(
            "name a checkpoint or an architecture",
            hint="s2ap-deploy plan model.pt --sparsity 0.9, or plan --arch cifar-resnet18 --sparsity 0.9",
        )
    import_path(reference)
    return reference
