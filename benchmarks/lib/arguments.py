"""Options that several benchmarks take."""

import argparse
from pathlib import Path
from typing import Any

STANDARD: dict[str, dict[str, Any]] = {
    "shared": {"type": Path, "required": True, "help": "folder with the shared checkpoints and data"},
    "work": {"type": Path, "required": True, "help": "folder for runs; finished ones are not run again"},
    "run": {"type": Path, "required": True, "help": "a finished run folder"},
    "seed": {"type": int, "default": 0},
    "threads": {"type": int, "default": 1},
    "jobs": {"type": int, "default": 2, "help": "runs side by side, one thread each"},
}


def parser(description: str | None, name: str, *standard: str) -> argparse.ArgumentParser:
    """Make a parser with ``--name`` (of the result file) and some options of ``STANDARD``."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in standard:
        made.add_argument(f"--{option}", **STANDARD[option])
    made.add_argument("--name", default=name, help=f"of the result file [default: {name}]")
    return made
