"""Resolve recipes from keyword arguments, options, and the facts in a model file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from s2ap_deploy.codecs.values import FLOAT32
from s2ap_deploy.data import datasets
from s2ap_deploy.errors import ArchitectureError, DeployError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.checkpoints.match import match_architecture
from s2ap_deploy.recipe import diagnosis, keys, methods, target
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.runs.manifest import FILE_NAME, Manifest, kind_of
from s2ap_deploy.spec import Normalization, Preprocessing

if TYPE_CHECKING:
    from s2ap_deploy.onnx_export.onnx_file import OnnxFile

_THREAT = re.compile(r"(Linf|L2|L1) eps (\S+)")


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return ``recipe`` with the dotted keys of ``changes`` set. Raises UsageError."""
    return resolve(recipe.model_dump(), changes)


def resolve(content: dict[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """Set the dotted keys of ``changes`` in ``content``, in order, and validate the result once.

    Raises UsageError, which names the key that the value does not fit.
    """
    for key, value in changes.items():
        keys.assign(content, key, value)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise diagnosis.refused(error, Recipe) from None


def export_changes(changes: Mapping[str, Any], recipe: Recipe, *, onnx: bool = False) -> dict[str, Any]:
    """Return ``changes`` completed by the target that they name, without settings left by another form.

    Explicit values take precedence over the target, and the target over the recipe. ``onnx`` selects the
    float32 file, whatever the recipe says.
    """
    changes = _of_one_form(changes, recipe.export, onnx=onnx)
    name = changes.get("export.target")
    if name in (None, target.NONE):
        return dict(changes)
    section = {key: changes.get(f"export.{key}") for key in ExportSection.model_fields if key != "target"}
    unit = recipe.prune.granularity if recipe.prune is not None else None
    filled = target.fill(section, target.find(name).target, ExportSection.model_fields, unit)
    return {**{f"export.{k}": value for k, value in filled.items() if value is not None}, **changes}


def _of_one_form(changes: Mapping[str, Any], remembered: ExportSection, *, onnx: bool) -> dict[str, Any]:
    """Return ``changes`` that undo the remembered form of a file if they select another one."""
    int8, values = changes.get("export.int8"), changes.get("export.values", FLOAT32)
    found = dict(changes)
    if not (onnx or int8 or values != FLOAT32 or changes.get("export.target")):
        return found
    found = {"export.name": None, **found}
    if onnx or int8:
        found.setdefault("export.values", FLOAT32)
    if not int8 and not changes.get("export.target"):
        found.setdefault("export.int8", False)
    if remembered.target is not None and "export.target" not in changes:
        defaults = {f"export.{key}": each.default for key, each in ExportSection.model_fields.items()}
        found = {**defaults, **found}
    return found


def plan_sections(given: Mapping[str, Any]) -> tuple[PruneSection, ExportSection, target.Found | None]:
    """Return the sections on pruning and export for ``plan``, and the target.

    Raises UsageError.
    """
    pruning, exporting = keys.changes(keys.PRUNE, given), keys.changes(keys.EXPORT, given)
    section = {key.removeprefix("prune."): value for key, value in pruning.items()}
    exporting.pop("export.keep_ratio", None)  # here it is the one of pruning
    wanted = {key.removeprefix("export."): value for key, value in exporting.items()}
    try:
        prune = PruneSection.model_validate(section)
        if wanted.get("align") is not None and prune.granularity != "channel":
            raise UsageError(
                "--align is for channels",
                code="align-unused",
                hint="add --granularity channel, or leave it out",
            )
        name = wanted.get("target")
        found = target.find(name) if name is not None and name != target.NONE else None
        if found is not None:
            fields = ExportSection.model_fields
            wanted = target.fill({**dict.fromkeys(fields), **wanted}, found.target, fields, prune.granularity)
        given_keys = {key: value for key, value in wanted.items() if value is not None}
        return prune, ExportSection.model_validate(given_keys), found
    except ValidationError as error:
        schema = PruneSection if error.title == "PruneSection" else ExportSection
        raise diagnosis.refused(error, schema) from None


def from_checkpoint(
    path: Path, name: str, arch: str | None, changes: Mapping[str, Any], *, trust_pickle: bool = False
) -> dict[str, Any]:
    """Return the start of a recipe from what a checkpoint states, completed by ``changes``.

    A checkpoint of this tool states its data and threat model; for any other, UsageError names all missing
    arguments.
    """
    info = checkpoint.read_info(path, trust_pickle=trust_pickle)
    missing = _missing_sparsity(changes)
    if info is None and (missing or {"data.name", "threat.eps"} - changes.keys()):
        missing += _missing_in_file(path, arch, changes, trust_pickle=trust_pickle)
    return {
        "name": name,
        "model": {
            "checkpoint": str(path),
            "arch": arch if arch is not None and not registry.is_import_path(arch) else None,
        },
        **completed(str(path), stated(info), changes, missing),
    }


def stated(info: CheckpointInfo | None) -> dict[str, str | None]:
    """Return the data set, norm and radius that a checkpoint states."""
    threat = info.threat if info is not None else None
    return {
        "data": info.data if info is not None else None,
        "norm": threat.norm if threat is not None else None,
        "eps": threat.eps if threat is not None else None,
    }


def completed(
    subject: str,
    found: Mapping[str, str | None],
    changes: Mapping[str, Any],
    missing: Sequence[DeployError] = (),
) -> dict[str, Any]:
    """Return the sections on data and threat model that ``subject`` states, completed by ``changes``.

    Raises UsageError that lists every missing fact: the data and the radius if neither defines them, and
    those of ``missing``, of which one alone is left to those who need it.
    """
    data = changes.get("data.name") or found.get("data")
    eps = changes.get("threat.eps") or found.get("eps")
    facts = list(missing)
    if eps is None:
        facts.insert(
            0,
            UsageError(
                f"{subject} does not record its threat model",
                code="eps-missing",
                hint="add --eps (eps=): 8/255, for example, for CIFAR-10 in Linf",
            ),
        )
    if data is None:
        facts.insert(
            0,
            UsageError(
                f"{subject} does not record its training data",
                code="data-missing",
                hint="add --data (data=): digits, mnist, cifar10, cifar100, svhn or imagefolder:PATH",
            ),
        )
    if len(facts) > 1:
        raise UsageError(
            f"{len(facts)} facts are missing: {'; '.join(each.message.splitlines()[0] for each in facts)}",
            code="facts-missing",
            hint="\n    ".join(each.hint or each.code for each in facts),
        )
    if data is None or eps is None:
        raise facts[0]
    norm = changes.get("threat.norm") or found.get("norm") or "Linf"
    return {"data": {"name": data}, "threat": {"norm": norm, "eps": eps}}


def _missing_sparsity(changes: Mapping[str, Any]) -> list[DeployError]:
    """Return an error if ``changes`` prune by weights or channels without a sparsity."""
    pruning = {key: value for key, value in changes.items() if key.split(".")[0] == "prune"}
    fixed = methods.n_of_m(pruning.get("prune.granularity", "weight")) is not None
    if fixed or not pruning or {"prune.sparsity", "prune.keep_ratio"} & pruning.keys():
        return []
    hint = "add --sparsity (sparsity=): 0.9, for example"
    return [UsageError("no sparsity is given", code="sparsity-missing", hint=hint)]


def _missing_in_file(
    path: Path, arch: str | None, changes: Mapping[str, Any], *, trust_pickle: bool
) -> list[DeployError]:
    """Return the error of a file without a known architecture, or without the fraction that masks keep."""
    raw = checkpoint.read_tensors(path, trust_pickle=trust_pickle, key=changes.get("model.key"))
    keep, alpha = changes.get("model.keep"), changes.get("model.alpha")
    try:
        match_architecture(raw, arch=arch, keep=keep, alpha=alpha)
    except (ArchitectureError, UsageError) as error:
        return [error] if arch is None or isinstance(error, UsageError) else []
    return []


def normalization(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Normalization | None:
    """Return the normalization of ``mean`` and ``std``. Raises UsageError for one without the other."""
    if mean is None and std is None:
        return None
    if mean is None or std is None or len(mean) != len(std):
        raise UsageError(
            "--mean and --std (mean=, std=) must be given together, one number per channel each",
            code="normalization-incomplete",
        )
    try:
        return Normalization(mean=tuple(mean), std=tuple(std))
    except ValidationError as error:
        raise diagnosis.refused(error, Normalization) from None


def foreign_recipe(opened: OnnxFile, folder: Path, changes: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe for an ONNX file from elsewhere, or None for one that the run in ``folder`` exported.

    The file's facts are completed by ``changes``. Raises UsageError for facts that are still missing.
    """
    if _exported_by(folder, opened.sha256):
        return None
    stages = Manifest.load(folder).stages if (folder / FILE_NAME).is_file() else {}
    if any(kind_of(name) not in ("artifact", "gate") for name in stages):
        raise UsageError(
            f"{opened.path} is not the file that the run in {folder} exported",
            code="artifact-of-another-run",
            hint="choose another folder with --run",
        )
    found = {"data": opened.metadata.get("s2ap.data")}
    if (threat := _THREAT.fullmatch(opened.metadata.get("s2ap.threat_model", ""))) is not None:
        found |= {"norm": threat[1], "eps": threat[2]}
    sections = completed(str(opened.path), found, changes)
    if str(sections["data"]["name"]).startswith("imagefolder:"):
        sections["data"]["size"] = opened.input_size
    return resolve({"name": "certify-artifact", "model": {}, **sections}, changes)


def _exported_by(folder: Path, sha256: str) -> bool:
    """Return whether the run in ``folder`` exported the file with that hash. Raises RunFolderError."""
    if not (folder / FILE_NAME).is_file():
        return False
    exports = Manifest.load(folder).of_kind("export").values()
    return any(output.sha256 == sha256 for record in exports for output in record.outputs)


def preprocessing(
    path: Path,
    arch: str | None,
    data: str,
    *,
    size: tuple[int, int, int] | None = None,
    root: Path | None = None,
    trust_pickle: bool = False,
) -> Preprocessing | None:
    """Return the preprocessing of ``data`` for a foreign checkpoint of user code without an ``input_size``.

    None if the file or the architecture ``arch`` defines the input. ``size`` (C, H, W) applies to an image
    folder. Reads no images, at most the listing of a folder. Raises the errors of ``datasets.spec`` and
    ``registry.resolve``.
    """
    if not input_unsaid(path, arch, trust_pickle=trust_pickle):
        return None
    return datasets.spec(data, root=root, size=size).preprocessing


def input_unsaid(path: Path, arch: str | None, *, trust_pickle: bool = False) -> bool:
    """Return whether neither the file at ``path`` nor the code of ``arch`` defines the input."""
    if arch is None or not registry.is_import_path(arch) or registry.resolve(arch).input_size is not None:
        return False
    return checkpoint.read_info(path, trust_pickle=trust_pickle) is None
