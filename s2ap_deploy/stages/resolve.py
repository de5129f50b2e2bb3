"""What is asked for, as a recipe: options of a command or arguments of a Python call, and what a file says.

The command line (``cli.session``) and the Python interface (``api``) both start here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from s2ap_deploy.errors import UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.recipe import diagnosis, target
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.runs.manifest import FILE_NAME, Manifest

if TYPE_CHECKING:
    from s2ap_deploy.onnx_export.onnx_file import OnnxFile

NULL: Final = object()
"""A value that is null in the recipe; None is an option that nobody gave."""

_THREAT = re.compile(r"(Linf|L2|L1) eps (\S+)")


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
            if not isinstance(section, dict):
                raise UsageError(f"{key}: {parent} holds a value and no keys", hint=f"leave out .{last}")
        section[last] = None if value is NULL else value
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the options"
        if first["type"] == "extra_forbidden":
            raise UsageError(f"unknown key {where}{diagnosis.nearest(first['loc'], Recipe)}") from None
        raise UsageError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def export_changes(options: Mapping[str, Any], name: str | None, recipe: Recipe) -> dict[str, Any]:
    """Changes to the recipe's export section: the ``options`` that were given, and its target's settings.

    ``name`` is the target that was asked for now; a flag beats it, and it beats the recipe.
    """
    section = dict(options)
    if name is not None and name != target.NONE:
        unit = recipe.prune.granularity if recipe.prune is not None else None
        section = target.fill(section, target.find(name).target, ExportSection.model_fields, unit)
    return {f"export.{key}": value for key, value in {**section, "target": name}.items()}


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


def foreign_recipe(
    opened: OnnxFile,
    folder: Path,
    *,
    data: str | None,
    eps: str | None,
    norm: str | None,
    seed: int | None,
) -> Recipe | None:
    """The recipe for a file from elsewhere, or None for one that the run in ``folder`` exported.

    What the file says of itself is completed by the options. Raises UsageError for what is then missing.
    """
    if _exported_by(folder, opened.sha256):
        return None
    if (folder / FILE_NAME).is_file() and Manifest.load(folder).stages.keys() - {"artifact", "gate"}:
        raise UsageError(
            f"{opened.path} is not the file that the run in {folder} exported",
            hint="name a folder of its own with --run",
        )
    data = data or opened.metadata.get("s2ap.data")
    if data is None:
        raise UsageError(
            f"{opened.path} does not say which data it was trained on",
            hint="add --data: digits, mnist, cifar10, cifar100, svhn or imagefolder:PATH",
        )
    stated = _THREAT.fullmatch(opened.metadata.get("s2ap.threat_model", ""))
    if eps is None and stated is None:
        raise UsageError(
            f"{opened.path} does not say which attack it should withstand",
            hint="add --eps, for example --eps 8/255 for CIFAR-10 in L-infinity",
        )
    content = {
        "name": "certify-artifact",
        "model": {},
        "data": {"name": data, "size": opened.input_size if data.startswith("imagefolder:") else None},
        "threat": {
            "norm": norm or (stated[1] if stated is not None else "Linf"),
            "eps": eps or (stated[2] if stated is not None else None),
        },
    }
    return resolve(content, {"seed": seed})


def _exported_by(folder: Path, sha256: str) -> bool:
    """Whether the run in ``folder`` exported the file with that hash. Raises RunFolderError when damaged."""
    if not (folder / FILE_NAME).is_file():
        return False
    record = Manifest.load(folder).stages.get("export")
    return record is not None and any(output.sha256 == sha256 for output in record.outputs)
