"""From options to a job: the run folder opened, the recipe resolved, the machine set up."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from s2ap_deploy import runtime
from s2ap_deploy.cli.progress import recorder
from s2ap_deploy.errors import RunFolderError, UsageError
from s2ap_deploy.models import checkpoint, registry
from s2ap_deploy.pipeline.job import Job
from s2ap_deploy.pipeline.machine import Machine, remembered_data_root
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.run.folder import Run


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
    changes: Mapping[str, Any] | None = None,
) -> Iterator[Job]:
    """Open the run folder and yield the job in it.

    Without ``recipe`` the folder's own is taken, with ``changes`` (dotted keys) made to it. ``arch`` is
    used here only when it is an import path: a registered name belongs into the recipe.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = runtime.device(device)
    with recorder(quiet) as progress, Run.open(folder, create=create, command=command_line()) as run:
        if recipe is None:
            recipe = run.load_recipe()
            if recipe is None:
                raise RunFolderError(
                    f"{folder} holds no recipe yet", hint="start with s2ap-deploy prune or s2ap-deploy run"
                )
        given = data_root.expanduser().resolve() if data_root is not None else None
        machine = Machine(
            device=chosen,
            data_root=given or remembered_data_root(run.path),
            download=download,
            workers=workers,
            arch=import_path(arch),
            trust_pickle=trust_pickle,
        )
        recipe = changed(recipe, changes or {})
        yield Job(run, recipe, machine, progress, resume=resume, overwrite=overwrite)


def import_path(arch: str | None) -> str | None:
    """``arch`` when it names code to import, which is then also looked for in the working folder."""
    if arch is None or not registry.is_import_path(arch):
        return None
    # `python -m` looks there by itself, an installed command does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return arch


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


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """``recipe`` with the dotted keys of ``changes`` set, where their value is not None."""
    return resolve(recipe.model_dump(), changes)


def resolve(content: dict[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """A recipe from options. Raises UsageError, which names the key that the value does not fit."""
    for key, value in changes.items():
        if value is None:
            continue
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
        section[last] = value
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the options"
        raise UsageError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def from_checkpoint(
    path: Path,
    *,
    name: str,
    arch: str | None,
    data: str | None,
    eps: str | None,
    norm: str | None,
    normalization: dict[str, Any] | None,
    trust_pickle: bool,
) -> dict[str, Any]:
    """The start of a recipe: what the checkpoint says of itself, completed by options.

    A checkpoint of this tool knows its data and threat model; for any other, UsageError says which
    option is missing.
    """
    info = checkpoint.read_tensors(path, trust_pickle=trust_pickle).info
    data = data or (info.data if info is not None else None)
    if data is None:
        raise UsageError(
            f"{path} does not say which data it was trained on",
            hint="add --data: digits, mnist, cifar10, cifar100, svhn or imagefolder:PATH",
        )
    threat = info.threat if info is not None else None
    if eps is None and threat is None:
        raise UsageError(
            f"{path} does not say which attack it should withstand",
            hint="add --eps, for example --eps 8/255 for CIFAR-10 in L-infinity",
        )
    return {
        "name": name,
        "model": {
            "checkpoint": str(path),
            "arch": arch if arch is not None and not registry.is_import_path(arch) else None,
            "normalization": normalization,
        },
        "data": {"name": data},
        "threat": {
            "norm": norm or (threat.norm if threat is not None else "Linf"),
            "eps": eps or (threat.eps if threat is not None else None),
        },
    }


def normalization(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> dict[str, Any] | None:
    """The section that ``--mean`` and ``--std`` make together. Raises UsageError for one alone."""
    if mean is None and std is None:
        return None
    if mean is None or std is None or len(mean) != len(std):
        raise UsageError("--mean and --std belong together, one number per channel each")
    return {"mean": mean, "std": std}
