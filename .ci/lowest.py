"""Print the lowest versions that pyproject.toml allows, as requirements that pin them: ``torch==2.9.*``."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest(requirement: str) -> str | None:
    """``torch>=2.9,<3`` gives ``torch==2.9.*``, ``safetensors>=0.4.5,<1`` gives ``safetensors==0.4.5``."""
    found = re.match(r"([\w.-]+)>=([\d.]+)", requirement)
    if found is None:
        return None
    name, version = found.groups()
    return f"{name}=={version}" + (".*" if version.count(".") < 2 else "")


def main(extras: list[str]) -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    listed = [
        *project["dependencies"],
        *(r for name in extras for r in project["optional-dependencies"][name]),
    ]
    print("\n".join(filter(None, map(lowest, listed))))


if __name__ == "__main__":
    main(sys.argv[1:])
