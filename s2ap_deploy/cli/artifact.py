"""``--artifact``: the file it names, and the recipe of a run folder for one that comes from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from s2ap_deploy.cli import session
from s2ap_deploy.errors import UsageError
from s2ap_deploy.exporting.opened import OnnxFile, read
from s2ap_deploy.pipeline.artefact import exported_by
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.run.manifest import FILE_NAME, Manifest

_THREAT = re.compile(r"(Linf|L2|L1) eps (\S+)")


def open_artifact(path: Path, folder: Path, *, unfit: Mapping[str, object]) -> OnnxFile:
    """The file at ``path``, also where that is its path inside the run folder.

    ``unfit`` are options that belong to networks in PyTorch. Raises UsageError when one of them is given,
    and CheckpointError for a file that cannot be certified.
    """
    given = [option for option, value in unfit.items() if value is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)}: not together with --artifact, which certifies the file as it is",
            hint="leave one of them out",
        )
    return read(path if path.exists() or not (folder / path).exists() else folder / path)


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
    if exported_by(folder, opened.sha256):
        return None
    if (folder / FILE_NAME).is_file() and Manifest.load(folder).stages.keys() - {"artefact", "gate"}:
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
    return session.resolve(content, {"seed": seed})
