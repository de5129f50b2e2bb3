"""Check the machine: list what it has, what will not work, and how to fix it. Uses no network.

Every check is guarded, because users run this command when something is broken.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from s2ap_deploy import plugins
from s2ap_deploy.errors import DeployError
from s2ap_deploy.plugins import KINDS, Kind
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.requirements import DISTRIBUTION, EXTRAS, MODULES
from s2ap_deploy.spec import Record

INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve"
)  # fmt: skip
INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
LITTLE_DISK = LITTLE_MEMORY = 2 << 30  # bytes


class Problem(Record):
    """Something that will not work. ``blocks`` is true if no command can run without it."""

    what: str
    why: str
    hint: str
    blocks: bool = False


class Computer(Record):
    """The hardware: cores, instruction sets, bytes of memory and disk (None if unknown)."""

    system: str
    machine: str
    device: str
    cores: int
    instructions: tuple[str, ...]
    memory_bytes: int | None
    memory_available_bytes: int | None
    disk_free_bytes: int | None


class DataSet(Record):
    """A data set by name, and the folder in which it was found; None if it was not."""

    name: str
    where: str | None


class PlugIn(Record):
    """A plug-in, and the reason why it cannot be used, or None."""

    kind: Kind
    name: str
    origin: str
    problem: str | None


class Health(Record):
    """The result of :func:`examine`. ``usable`` is false if a problem blocks every command."""

    versions: dict[str, str]
    computer: Computer
    data_root: str
    data: tuple[DataSet, ...]
    extras: dict[str, tuple[str, ...]]
    plugins: tuple[PlugIn, ...]
    problems: tuple[Problem, ...]
    usable: bool


def examine(folder: Path, recorder: Recorder, *, data_root: Path | None = None) -> Health:
    """Run all checks; ``folder`` is the place for run folders. A check that fails becomes a problem."""
    recorder.begin("doctor", len(MODULES) + 3, "check")
    problems = [*requirements()]
    for distribution, module in MODULES.items():
        problems += importable(distribution, module)
        recorder.advance()
    computer, more = look_around(folder)
    problems += more
    recorder.advance()
    root, data = data_sets(data_root)
    recorder.advance()
    offered = tuple(plug_in(each) for kind in KINDS for each in plugins.offered(kind))
    problems += [
        Problem(what=f"{each.kind} {each.name}", why=each.problem, hint=f"update or uninstall {each.origin}")
        for each in offered
        if each.problem is not None
    ]
    recorder.advance()
    recorder.end()
    return Health(
        versions=versions(),
        computer=computer,
        data_root=str(root),
        data=data,
        extras={name: tuple(filter(_installed, parts)) for name, parts in EXTRAS.items()},
        plugins=offered,
        problems=tuple(problems),
        usable=not any(problem.blocks for problem in problems),
    )


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and all its dependencies."""
    found = {"python": platform.python_version()}
    for name in (DISTRIBUTION, *MODULES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def requirements() -> Iterator[Problem]:
    """Yield a problem for each requirement that is missing or installed in an unsupported version."""
    try:
        asked = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        hint = "pip install . in the checkout"
        yield Problem(what="installation", why="the package is importable but not installed", hint=hint)
        return
    try:
        from packaging.requirements import Requirement
    except ImportError as error:
        hint = "pip install packaging"
        yield Problem(what="packaging", why=f"versions are not checked: {error}", hint=hint)
        return

    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            why, blocks = "it is not installed", True
        else:
            if requirement.specifier.contains(version, prereleases=True):
                continue
            why, blocks = f"version {version} is not {requirement.specifier}, which was tested", False
        hint = f"pip install '{requirement.name}{requirement.specifier}'"
        yield Problem(what=requirement.name, why=why, hint=hint, blocks=blocks)


def importable(distribution: str, module: str) -> Iterator[Problem]:
    """Yield a problem if the library is installed but cannot be imported."""
    if not _installed(distribution):
        return  # reported by requirements()
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a broken library may raise anything
        hint = f"pip install --force-reinstall --no-deps {distribution}"
        yield Problem(what=distribution, why=f"it fails: {plugins.reason(error)}", hint=hint, blocks=True)


def look_around(folder: Path) -> tuple[Computer, list[Problem]]:
    """Describe the machine and report insufficient resources."""
    problems: list[Problem] = []
    device = _device(problems)
    instructions = _instructions()
    total, available = _memory()
    disk = _free(folder)
    if instructions and not INT8 & set(instructions):
        why = "this processor has no int8 dot product (VNNI, AMX, dotprod)"
        hint = "measure on the device that will run the file"
        problems.append(Problem(what="speed of int8 files", why=why, hint=hint))
    if available is not None and available < LITTLE_MEMORY:
        why = f"{available / 2**30:.1f} GiB of memory are available"
        hint = "lower --batch-size or --workers"
        problems.append(Problem(what="large networks", why=why, hint=hint))
    if disk is not None and disk < LITTLE_DISK:
        why = f"{disk / 2**30:.1f} GiB are free in {folder.resolve()}"
        problems.append(Problem(what="large run folders", why=why, hint="name another place with --run"))
    if not os.access(folder, os.W_OK):
        why = f"{folder.resolve()} is not writable"
        problems.append(Problem(what="run folders here", why=why, hint="name another place with --run"))
    computer = Computer(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        device=device,
        cores=os.cpu_count() or 1,
        instructions=instructions,
        memory_bytes=total,
        memory_available_bytes=available,
        disk_free_bytes=disk,
    )
    return computer, problems


def data_sets(root: Path | None) -> tuple[Path, tuple[DataSet, ...]]:
    """Return the data root and the data sets found there; the digits are part of the package."""
    try:
        from s2ap_deploy.data.published import FOOTPRINTS, data_root
    except (Exception, SystemExit):  # torch may be what is broken
        return root or Path("data"), ()
    place = data_root(root)
    found = [DataSet(name="digits", where=DISTRIBUTION)]
    for name, traces in FOOTPRINTS.items():
        whole = all((place / trace).exists() for trace in traces)
        found.append(DataSet(name=name, where=str(place / traces[0]) if whole else None))
    return place, tuple(found)


def plug_in(offered: plugins.Plugin) -> PlugIn:
    """Import a plug-in and record the result."""
    problem = None
    try:
        if offered.kind == "methods":
            from s2ap_deploy.recipe.methods import OWN_NAMES, Method

            if offered.name in OWN_NAMES:
                problem = "a built-in method of that name takes precedence"
            plugins.load("methods", offered.name, Method)
        elif offered.kind == "losses":
            from s2ap_deploy.recipe.methods import OWN_LOSSES
            from s2ap_deploy.training.objective import RobustLoss

            if offered.name in OWN_LOSSES:
                problem = "a built-in loss of that name takes precedence"
            plugins.load("losses", offered.name, RobustLoss)
        elif offered.kind == "targets":
            from s2ap_deploy.recipe.target import Target, names

            if offered.name in names():
                problem = "a shipped target of that name takes precedence"
            plugins.load("targets", offered.name, Target)
        else:
            from s2ap_deploy.models.architectures.architecture import Architecture

            plugins.load("architectures", offered.name, Architecture)
    except DeployError as error:
        problem = error.message
    except Exception as error:  # torch may be what is broken
        problem = plugins.reason(error)
    return PlugIn(kind=offered.kind, name=offered.name, origin=offered.origin, problem=problem)


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return distribution == "mlflow" and _installed("mlflow-skinny")
    return True


def _device(problems: list[Problem]) -> Literal["cpu"] | str:
    """Return the device that ``--device auto`` selects."""
    try:
        import torch

        if torch.cuda.is_available():
            return f"cuda ({torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} of them)"
        build = torch.version.cuda
    except (Exception, SystemExit):
        return "unknown: torch cannot be imported"
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        why = "this torch is built without CUDA" if build is None else "torch finds no CUDA device it can use"
        hint = "install a torch with CUDA for this driver; until then the CPU is used"
        problems.append(Problem(what="the GPU", why=why, hint=hint))
    return "cpu"


def _instructions() -> tuple[str, ...]:
    """Return the relevant instruction sets by their Linux names; empty if unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            present = set(value.split())
            return tuple(name for name in INSTRUCTIONS if name in present)
    return ()


def _memory() -> tuple[int | None, int | None]:
    """Return the bytes of total and of available memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
        return sizes.get("MemTotal"), sizes.get("MemAvailable")
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, OSError, ValueError):
        return None, None


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
