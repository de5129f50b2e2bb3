"""Result files: one JSON file per measurement, with what is needed to read it later."""

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2ap_deploy import files, runtime
from s2ap_deploy.onnx_export.benchmark import processor_name

FOLDER = Path(__file__).parents[1] / "results"


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write ``figures`` to ``results/NAME.json`` with versions, cores and the command."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    # Only the last part of an absolute path: the rest says nothing on another machine.
    arguments = [Path(each).name if each.startswith("/") else each for each in sys.argv[1:]]
    machine = {"cores": os.cpu_count(), "processor": processor_name(), "system": platform.system()}
    head = {
        "command": " ".join([sys.argv[0], *arguments]),
        "machine": machine,
        "versions": runtime.versions(),
    }
    files.write_json(path, {**head, **figures})
    print(f"wrote {path.relative_to(FOLDER.parents[1])}")
    return path


def mean_and_deviation(figures: dict[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Mean and standard deviation (``NAME_sd``) of each figure over runs, without what was not measured."""
    found: dict[str, float | None] = {}
    for name, values in figures.items():
        measured = [value for value in values if value is not None]
        if measured:
            found[name] = statistics.mean(measured)
            found[f"{name}_sd"] = statistics.stdev(measured) if len(measured) > 1 else None
    return found
