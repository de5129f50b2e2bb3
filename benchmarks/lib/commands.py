"""Commands of the tool and benchmarks in processes of their own, and what they leave in a run folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")


def deploy(*arguments: Any) -> list[str]:
    """The command line ``s2ap-deploy ARGUMENTS`` of this checkout."""
    return [sys.executable, "-m", "s2ap_deploy", *map(str, arguments)]


def run(*arguments: Any, check: bool = True) -> int:
    """Run ``s2ap-deploy ARGUMENTS`` without its output on stdout; the exit code."""
    return subprocess.run(deploy(*arguments), check=check, stdout=subprocess.DEVNULL).returncode


def child(name: str, *arguments: Any, ranks: int = 1) -> Any:
    """Run a benchmark in a process of its own, or in ``ranks`` of them; the JSON of its last line."""
    module = ["-m", *TORCHRUN, str(ranks), "-m", "benchmarks"] if ranks > 1 else ["-m", "benchmarks"]
    command = [sys.executable, *module, name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def stages(run: Path) -> dict[str, Any]:
    """The records of a run folder's stages."""
    found: dict[str, Any] = read(run / "manifest.json")["stages"]
    return found
