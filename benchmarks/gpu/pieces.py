"""Pieces of the GPU benchmark that are done in any number of calls: their folder, budget and result file."""

import argparse
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.lib import commands, results

ROOT = Path(__file__).resolve().parents[2]
PART = 15 * 2**20
RESERVE = 25.0  # seconds that a stopped command may take to save its state
LEAST = 20.0  # seconds under which nothing is started


class OutOfTime(Exception):
    """The budget is used up; the next call continues."""


class Failed(Exception):
    """A command of a piece ended with an error, which it has told on stderr."""


class Bench:
    """Folders, the budget, and the pieces that are done; ``summarize`` condenses them for the result file."""

    def __init__(self, args: argparse.Namespace, summarize: "Callable[[Bench], dict[str, Any]]") -> None:
        self.args, self.summarize = args, summarize
        scales = tomllib.loads(Path(__file__).with_name("scales.toml").read_text(encoding="utf-8"))
        self.scale = SimpleNamespace(**scales["smoke" if args.smoke else "full"])
        self.end = time.monotonic() + 60 * args.budget
        self.work: Path = args.work.resolve() / ("smoke" if args.smoke else "full")
        self.pieces = self.work / "pieces"
        self.pieces.mkdir(parents=True, exist_ok=True)
        self.data = self.work / "cifar10"
        self.dense = self.work / "dense.safetensors"
        self.parts = self.work / "parts"
        self.name = "gpu-smoke" if args.smoke else "gpu"
        self.device = device_facts(args.device)

    @property
    def left(self) -> float:
        """Seconds that work may still take."""
        return self.end - time.monotonic() - RESERVE

    def piece(self, name: str, make: Callable[[], Any], least: float = LEAST) -> Any:
        """The piece from an earlier call, or made now where ``least`` seconds are left. Raises OutOfTime."""
        path = self.pieces / f"{name}.json"
        if path.exists():
            return commands.read(path)["figures"]
        never = least > 60 * self.args.budget - 2 * RESERVE
        if self.left < (LEAST if self.args.smoke or never else least):
            raise OutOfTime
        print(f"{name} ({self.left / 60:.1f} minutes left)", flush=True)
        started = time.monotonic()
        try:
            if never and not self.args.smoke:
                raise Failed(f"it may take {least:.0f} seconds, more than a call has")
            content = {"figures": make()}
        except Failed as error:
            print(f"{name}: {error}", flush=True)
            content = {"figures": None, "failed": str(error)}
        content["seconds"] = round(time.monotonic() - started, 1)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.rename(path)
        self.write()
        return content["figures"]

    def done(self, *prefixes: str) -> dict[str, Any]:
        """Figures of the pieces with such names that there are."""
        paths = [path for path in sorted(self.pieces.glob("*.json")) if path.stem.startswith(prefixes)]
        found = {path.stem: commands.read(path)["figures"] for path in paths}
        return {name: figures for name, figures in found.items() if figures is not None}

    def write(self) -> None:
        """All pieces so far as one JSON, in ``results`` and in ``--out``."""
        paths = sorted(self.pieces.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        content = {"smoke": self.args.smoke, "scale": vars(self.scale), "device": self.device}
        content |= {
            "summary": self.summarize(self),
            "pieces": {path.stem: commands.read(path) for path in paths},
        }
        path = results.write(self.name, content)
        if self.args.out is not None:
            self.args.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.args.out / path.name)
            for part in self.parts.glob("*"):
                if not (self.args.out / part.name).exists():
                    shutil.copy(part, self.args.out / part.name)

    def tool(self, *arguments: Any, run: str, device: bool = True) -> dict[str, Any]:
        """A command of the tool in a run folder of ours; what it prints as JSON."""
        options = ["--run", self.work / run, "--resume", "--json", "--quiet"]
        options += ["--device", self.args.device] if device else []
        return json.loads(self.process(commands.deploy(*arguments, *options)))  # type: ignore[no-any-return]

    def benchmark(self, name: str, *arguments: Any, accepted: tuple[int, ...] = (0,)) -> dict[str, Any]:
        """Run another benchmark; its figures, whose own result file is removed."""
        path = results.FOLDER / f"{self.name}-piece.json"
        path.unlink(missing_ok=True)
        words = map(str, [*arguments, "--name", path.stem])
        self.process([sys.executable, "-m", "benchmarks", name, *words], accepted)
        found: dict[str, Any] = commands.read(path)
        path.unlink()
        return found

    def process(self, command: list[str], accepted: tuple[int, ...] = (0,)) -> str:
        """Standard output of a process, which is stopped in time to save its state.

        Raises OutOfTime, and Failed for an exit code that is not ``accepted``.
        """
        if self.left < LEAST:
            raise OutOfTime
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            try:
                output, _ = child.communicate(timeout=self.left)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGTERM)
                try:
                    child.communicate(timeout=RESERVE)
                except subprocess.TimeoutExpired:
                    child.kill()
                raise OutOfTime from None
        if child.returncode not in accepted:
            raise Failed(f"{' '.join(command[1:5])} ended with {child.returncode}")
        return output


def device_facts(name: str) -> dict[str, Any]:
    """Name and memory of the device."""
    if not name.startswith("cuda"):
        return {"name": name}
    properties = torch.cuda.get_device_properties(torch.device(name))
    return {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}


def divide(path: Path, folder: Path) -> None:
    """Write a file as compressed parts."""
    folder.mkdir(parents=True, exist_ok=True)
    data = lzma.compress(path.read_bytes(), preset=1)
    for index, start in enumerate(range(0, len(data), PART)):
        (folder / f"{path.name}.xz.{index}").write_bytes(data[start : start + PART])


def restore(bench: Bench, folder: Path) -> None:
    """Restore the pieces and the dense network of an earlier machine, where this one has none.

    Pieces without their dense network are useless: those to come would belong to another one.
    """
    parts = sorted(folder.glob(f"{bench.dense.name}.xz.*"), key=lambda path: int(path.suffix[1:]))
    if parts and not bench.dense.exists():
        bench.dense.write_bytes(lzma.decompress(b"".join(part.read_bytes() for part in parts)))
        bench.parts.mkdir(exist_ok=True)
        for part in parts:
            shutil.copy(part, bench.parts / part.name)
    kept = folder / f"{bench.name}.json"
    if not kept.exists() or not bench.dense.exists():
        return
    for name, piece in commands.read(kept)["pieces"].items():
        path = bench.pieces / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(piece), encoding="utf-8")
