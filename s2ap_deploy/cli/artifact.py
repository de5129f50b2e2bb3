"""``--artifact``: the file it names, and the recipe of a run folder for one that comes from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from s2ap_deploy.errors import UsageError
from s2ap_deploy.onnx_export.onnx_file import OnnxFile, load
from s2ap_deploy.stages.resolve import foreign_recipe as foreign_recipe


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
    return load(path if path.exists() or not (folder / path).exists() else folder / path)
