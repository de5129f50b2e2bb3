"""Where figures go: one JSON file per benchmark, with what is needed to read them later."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from s2ap_deploy import files, runtime

FOLDER = Path(__file__).parent / "results"


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write ``figures`` to ``results/NAME.json`` with versions, cores and the command."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    # Folders by their last name: where they lie on this machine tells nobody anything.
    arguments = [Path(each).name if each.startswith("/") else each for each in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    machine = {"cores": os.cpu_count(), "processor": processor(), "system": platform.system()}
    files.write_json(
        path, {"command": command, "machine": machine, "versions": runtime.versions(), **figures}
    )
    print(f"wrote {path.relative_to(FOLDER.parents[1])}")
    return path


def processor() -> str:
    """The model name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
