"""Compare the masks of finished searches, and list the results of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.errors import InputError, RunFolderError, UsageError
from s2ap_deploy.pruning.masks import Likeness, kept, layerwise, likeness, load_tensors, sparsity
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import MASKS, MODEL
from s2ap_deploy.runs.manifest import Manifest, StageName, StageRecord

ACCURACIES = ("clean_accuracy", "robust_accuracy")
NOTE = (
    "accuracies are on each run's own validation images, robust ones under PGD-10; neither is a certificate"
)


@dataclass(frozen=True, eq=False)
class Searched:
    """A finished search: its masks by parameter name, and ``figures`` as JSON values.

    ``tuned`` are the weights that are not zero after fine-tuning, None before.
    """

    folder: Path
    masks: dict[str, Tensor]
    figures: dict[str, Any]
    tuned: dict[str, Tensor] | None = None


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Compare two or more run folders: JSON values ``runs``, and ``pairs`` of their numbers.

    The folders are only read; later stages may be running in them. Runs are numbered from 1, in the order
    given. Raises UsageError for less than two folders, RunFolderError for a folder without a finished and
    intact search, InputError for masks of different networks.
    """
    if len(folders) < 2:
        raise UsageError(
            "a comparison needs at least two run folders",
            code="runs-too-few",
            hint="s2ap-deploy compare RUN RUN",
        )
    runs = [searched(folder) for folder in folders]
    pairs = []
    for (i, first), (j, second) in combinations(enumerate(runs, 1), 2):
        try:
            whole, layers = likeness(first.masks, second.masks), layerwise(first.masks, second.masks)
        except InputError as error:
            raise InputError(
                f"run {i} ({first.folder}) and run {j} ({second.folder}) cannot be compared: {error.message}",
                code="masks-differ",
                hint="compare runs on one architecture; s2ap-deploy inspect shows the layers of a checkpoint",
            ) from None
        tuned = first.tuned and second.tuned and asdict(likeness(first.tuned, second.tuned))
        pair = {"first": i, "second": j, **asdict(whole), "layers": by_layer(layers), "finetune": tuned}
        pairs.append(pair)
    return {"runs": [run.figures for run in runs], "pairs": pairs, "note": NOTE}


def searched(folder: Path) -> Searched:
    """Return the finished search of a run folder. Raises RunFolderError, which names the folder."""
    if not (folder / manifest.FILE_NAME).is_file():
        raise RunFolderError(
            f"there is no run in {folder}", code="run-missing", hint="give run folders, such as s2ap-run"
        )
    stages = Manifest.load(folder).stages
    record = stages.get("search")
    if record is None:
        raise RunFolderError(
            f"{folder} holds no search", code="search-missing", hint="run s2ap-deploy prune first"
        )
    if record.status != "finished":
        raise RunFolderError(
            f"the search in {folder} is not finished",
            code="stage-unfinished",
            hint="repeat its command with --resume",
        )
    # The file gives its tensors in any order; sorted, equal folders get equal answers.
    masks = {name: mask.bool() for name, mask in sorted(load_tensors(intact(folder, record, _MASKS)).items())}
    figures = {"run": str(folder), **described(record, masks), **tuned(stages)}
    return Searched(folder, masks, figures, remaining(folder, stages, masks))


def remaining(
    folder: Path, stages: Mapping[StageName, StageRecord], masks: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return which masked weights are not zero after fine-tuning, None where there is no such network.

    Raises RunFolderError for a file that is missing or has changed.
    """
    record = stages.get("finetune")
    if record is None or record.status != "finished" or _TUNED not in {each.path for each in record.outputs}:
        return None
    weights = load_tensors(intact(folder, record, _TUNED))
    return {name: weights[name] != 0 for name in masks} if masks.keys() <= weights.keys() else None


_MASKS, _TUNED = f"search/{MASKS}", f"finetune/{MODEL}"


def intact(folder: Path, record: StageRecord, name: str) -> Path:
    """Return the file ``name`` of a stage after checking its hash. Raises RunFolderError."""
    hint = "repeat s2ap-deploy prune with --resume, which creates it again"
    recorded = next((output for output in record.outputs if output.path == name), None)
    if recorded is None:
        raise RunFolderError(f"the search in {folder} wrote no {MASKS}", code="file-missing", hint=hint)
    path = files.within(folder, name)
    if not path.is_file():
        raise RunFolderError(f"{path} is missing", code="file-missing", hint=hint)
    if files.sha256(path) != recorded.sha256:
        raise RunFolderError(f"{path} has changed since its stage finished", code="file-changed", hint=hint)
    return path


def described(record: StageRecord, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings and final figures of a search; None for values that were not recorded."""
    results, asked = mapping(record.results), mapping(record.inputs.get("prune"))
    last = mapping(results.get("last"))
    return {
        "method": results.get("method", asked.get("method")),
        "s2ap": asked.get("s2ap"),
        "gamma": asked.get("gamma"),
        "seed": record.inputs.get("seed"),
        "sparsity": sparsity(masks),
        "kept": kept(masks),
        "prunable": sum(mask.numel() for mask in masks.values()),
        "search": {key: number(last.get(key)) for key in (*ACCURACIES, "replaced", "flip_rate")},
    }


def tuned(stages: Mapping[StageName, StageRecord]) -> dict[str, Any]:
    """Return the best epoch of a finished fine-tuning, or None."""
    record = stages.get("finetune")
    if record is None or record.status != "finished":
        return {"finetune": None}
    best = mapping(mapping(record.results).get("best"))
    return {"finetune": {key: number(best.get(key)) for key in ACCURACIES} if best else None}


def by_layer(layers: Mapping[str, Likeness]) -> dict[str, dict[str, float]]:
    """Return the likeness of every layer as JSON values."""
    return {name: asdict(found) for name, found in layers.items()}


def mapping(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """Return ``value`` if it is a number, else None."""
    return value if isinstance(value, int | float) else None
