"""Result files: one JSON file per measurement, with what is needed to read it later."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from s2ap_deploy import files, runtime

FOLDER = Path(__file__).parents[1] / "results"


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write ``figures`` to ``results/NAME.json`` with versions, cores and the command."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    # Only the last part of an absolute path: the rest says nothing on another machine.
    arguments = [Path(each).name if each.startswith("/") else each for each in sys.argv[1:]]
    machine = {"cores": os.cpu_count(), "processor": processor(), "system": platform.system()}
    head = {
        "command": " ".join([sys.argv[0], *arguments]),
        "machine": machine,
        "versions": runtime.versions(),
    }
    files.write_json(path, {**head, **figures})
    print(f"wrote {path.relative_to(FOLDER.parents[1])}")
    return path


def processor() -> str:
    """The model name of the processor, if the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
