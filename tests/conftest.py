"""Fixtures shared by all tests."""

import contextlib
import copy
import functools
import inspect
import io
import json
import os
import pickle
import platform
import shutil
import signal
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch loads, and for every process that a test starts: pytest's workers share the cores already, and
# small tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from s2ap_deploy.data.splits import Augmentation, MemorySplit
from s2ap_deploy.distributed.cluster import Resources, Tasks
from s2ap_deploy.distributed.collectives import Ranks
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.certificate import Certificate, Subject
from s2ap_deploy.evaluation.samples import rows
from s2ap_deploy.records import AttackRow
from s2ap_deploy.spec import ThreatModel

# Started in the background of a shell, this process ignores Ctrl-C, and so would every process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"
MOST_WORKERS = 4

# A busy machine fails no property.
settings.register_profile("busy", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """For ``-n auto``: one worker per core, four at most.

    None on one core, and none where single files are named: workers take seconds to start.
    """
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    asked = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
    if asked and all(Path(name.partition("::")[0]).suffix == ".py" for name in asked):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores > 1 else 0


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and foreign checkpoints beside a developer's checkout."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip("needs ../shared (real MNIST and a robust checkpoint), which is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from threads, and sums stay in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Skip fsync: it protects from power cuts, which no test makes, and is slow on a busy disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def one_operator_table() -> Iterator[None]:
    """Build torch's table of ONNX operators once; exports only read it, and it is half of a small one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        shared = functools.cache(ONNXRegistry.from_torchlib)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(shared))
        yield


def striped(n: int) -> MemorySplit:
    """``n`` 8x8 images of three classes that differ in where the light falls."""
    noise = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 100, (n, 1, 8, 8), generator=noise)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, :, 2 * label : 2 * label + 3] += 150
    return MemorySplit(
        images.to(torch.uint8), labels, [f"image/{i}" for i in range(n)], Augmentation(padding=0, flip=False)
    )


class MemorySnapshots:
    """Snapshots in memory that interrupt the loop after ``lives`` of them."""

    def __init__(self, lives: int = -1) -> None:
        self.lives = lives
        self.kept: tuple[dict[str, Any], dict[str, Any]] | None = None

    def load_snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        return self.kept

    def save_snapshot(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.kept = {name: tensor.clone() for name, tensor in tensors.items()}, dict(state)
        self.lives -= 1
        if self.lives == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def stripes() -> Callable[[int], MemorySplit]:
    """A factory of small data sets that a small network learns in seconds."""
    return striped


@pytest.fixture(scope="session")
def memory_snapshots() -> type[MemorySnapshots]:
    """Snapshots for loops that are to be interrupted after a given epoch."""
    return MemorySnapshots


class ThreadRanks(Ranks):
    """One of several ranks that are threads of this process: strict about order, and quick to start."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self.meeting, self.table = rank, size, meeting, table

    def _exchange(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.meeting.wait(timeout=120)
        found = list(self.table)
        self.meeting.wait(timeout=120)
        return found

    def reduce(self, flat: torch.Tensor) -> None:
        flat.copy_(torch.stack(self._exchange(flat.clone())).sum(dim=0))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor.clone()))

    def broadcast(self, content: Any) -> Any:
        return copy.deepcopy(self._exchange(content)[0]) if self.rank else self._exchange(content)[0]

    def scatter(self, contents: Any) -> Any:
        return copy.deepcopy(self._exchange(contents)[0][self.rank])

    def collect(self, content: Any) -> list[Any]:
        found = copy.deepcopy(self._exchange(content))
        return found if self.first else []

    def copy_from_first_(self, tensors: Any) -> None:
        for tensor in tensors:
            tensor.data.copy_(self._exchange(tensor.detach().clone())[0])


def run_on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return what ``work`` returns on each of ``size`` ranks; the first error of any of them is raised."""
    meeting, table = threading.Barrier(size), [None] * size

    def one(rank: int) -> Any:
        torch.set_num_threads(1)
        try:
            return work(ThreadRanks(rank, size, meeting, table))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [future.exception() for future in futures]
    for error in sorted(
        (e for e in errors if e is not None), key=lambda e: isinstance(e, threading.BrokenBarrierError)
    ):
        raise error
    return [future.result() for future in futures]


class LocalTasks(Tasks):
    """A cluster that is this process: a task runs once its result is asked for, the latest first.

    Functions, arguments and results are pickled as on their way to another machine. ``lose`` names calls, by
    their number, that end with an error of the cluster's.
    """

    def __init__(self, slots: int = 3, lose: Mapping[int, Exception] | None = None) -> None:
        self._slots, self.lose = slots, dict(lose or {})
        self.resources = Resources()
        self.calls: list[str] = []
        self.dropped: list[Any] = []
        self._work: list[tuple[Callable[..., Any], bytes]] = []
        self._found: dict[int, bytes] = {}

    @property
    def slots(self) -> int:
        return self._slots

    def put(self, value: object) -> Any:
        return self.submit(copy.copy, value)

    def submit(self, function: Callable[..., Any], *arguments: object) -> Any:
        self._work.append((function, pickle.dumps(arguments)))
        return TaskTicket(len(self._work) - 1)

    def first(self, tickets: Sequence[Any]) -> Any:
        return tickets[-1]

    def result(self, ticket: Any) -> Any:
        number = ticket.number
        if number in self.lose:
            raise self.lose[number]
        if number not in self._found:
            function, packed = self._work[number]
            arguments = [
                self.result(each) if isinstance(each, TaskTicket) else each for each in pickle.loads(packed)
            ]
            self.calls.append(function.__name__)
            self._found[number] = pickle.dumps(function(*arguments))
        return pickle.loads(self._found[number])

    def cancel(self, tickets: Sequence[Any]) -> None:
        self.dropped += tickets


@dataclass(frozen=True)
class TaskTicket:
    """A task of :class:`LocalTasks` by its number."""

    number: int


@pytest.fixture(scope="session")
def local_tasks() -> type[LocalTasks]:
    """A cluster that is this process: ``local_tasks(slots=2)``."""
    return LocalTasks


@pytest.fixture(scope="session")
def on_ranks() -> Callable[[int, Callable[[Ranks], Any]], list[Any]]:
    """Run a function on several ranks: ``on_ranks(2, lambda ranks: ...)``."""
    return run_on_ranks


@dataclass(frozen=True)
class Outcome:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, Any]:
        """The object that --json prints."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def command_line(*arguments: object, cwd: Path | None = None) -> Outcome:
    """Run the command line inside this process, in ``cwd``, as ``main`` does but for leaving it."""
    from s2ap_deploy.cli.main import run_cli

    texts = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path.cwd()),
        unittest.mock.patch.object(sys, "argv", ["s2ap-deploy", *texts]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run_cli(texts)
    return Outcome(code, out.getvalue(), err.getvalue())


class CommandLine:
    """The command line, in this process: ``s2ap("gate", "--json", cwd=folder)``."""

    def __call__(self, *arguments: object, cwd: Path | None = None) -> Outcome:
        return command_line(*arguments, cwd=cwd)

    def ok(self, *arguments: object, cwd: Path | None = None) -> Outcome:
        """Run a command that has to succeed."""
        done = command_line(*arguments, cwd=cwd)
        assert done.code == 0, done.out + done.err
        return done

    def json(self, *arguments: object, cwd: Path | None = None) -> dict[str, Any]:
        """Run a command that has to succeed with --json and return its object."""
        return self.ok(*arguments, "--json", cwd=cwd).answer

    def refused(self, code: str, *arguments: object, cwd: Path | None = None) -> Outcome:
        """Run a command that has to be refused with this error code: one object, one error, no traceback."""
        done = command_line(*arguments, "--json", cwd=cwd)
        assert done.code == 2, done.out + done.err
        assert (done.answer["code"], done.answer["exit_code"]) == (code, 2)
        assert done.answer["error"]
        assert done.err.count("error: ") == 1
        assert "Traceback" not in done.err
        return done


@pytest.fixture(scope="session")
def s2ap() -> CommandLine:
    """The command line, in this process."""
    return CommandLine()


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory) -> Path:
    """A checkpoint of this tool: a small network after three epochs on the embedded digits."""
    folder = tmp_path_factory.mktemp("digits")
    network = ["--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--loss", "at"]
    short = ["--epochs", 3, "--batch-size", 64, "--learning-rate", 0.05]
    done = command_line("pretrain", *network, *short, "--output", "model.pt", cwd=folder)
    assert done.code == 0, done.err
    return folder / "model.pt"


@pytest.fixture(scope="session")
def finished_run(digits_model, tmp_path_factory, one_operator_table) -> Path:
    """A run folder after prune, certify and export; copy it before changing anything in it.

    At this radius every image falls to the first attack, so that certifying takes a second, not minutes.
    """
    run = tmp_path_factory.mktemp("finished") / "s2ap-run"
    short = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--eps", "0.5"]
    for command in (
        ["prune", digits_model, "--sparsity", 0.9, *short],
        ["certify", "--n", 40],
        ["export", "--onnx"],
    ):
        done = command_line(*command, "--run", run, "--threads", 1)
        assert done.code == 0, done.err
    return run


@pytest.fixture
def own_run(finished_run, tmp_path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "s2ap-run"))


def forget(run: Path, *stages: str) -> Path:
    """Undo stages of a run and return its folder."""
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in stages:
        del manifest["stages"][stage]
        shutil.rmtree(run / stage)
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture(scope="session")
def without_stages() -> Callable[..., Path]:
    """Undo stages of a run: ``without_stages(run, "certify", "export")`` returns its folder."""
    return forget


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative name; two equal answers mean that nothing changed."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="session")
def files_in() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes."""
    return contents


def issue(**facts: Any) -> Certificate:
    """Build a certificate from columns of samples and the other fields."""
    columns = [facts.pop(name) for name in inspect.signature(rows).parameters]
    return Certificate.of(rows(*columns), **facts)


def attack_rows(
    protocol: str, num_classes: int, broken_by: Sequence[str | None], proven: int = 0
) -> tuple[AttackRow, ...]:
    """The rows of a protocol's attacks that broke these samples, each after the ones before."""
    left, rows = sum(by != "clean" for by in broken_by) - proven, []
    for name in protocols.names(protocols.version(protocol), num_classes):
        rows.append(AttackRow(name=name, n_in=left, n_broken=list(broken_by).count(name), seconds=1.0))
        left -= rows[-1].n_broken
    return tuple(rows)


@pytest.fixture(scope="session")
def make_certificate() -> Callable[..., Certificate]:
    """``make_certificate(broken_by, **changes)``: labels alternate 0, 1; the rest follows."""

    def make(broken_by: Sequence[str | None], **changes: Any) -> Certificate:
        labels = [index % 2 for index in range(len(broken_by))]
        protocol = changes.get("protocol", "standard")
        classes = 2 if protocols.is_adapted(protocol) else 10
        proven = changes["proven"].count if changes.get("proven") else 0
        broken = changes.get("broken_by", broken_by)
        facts: dict[str, Any] = {
            "subject": Subject(
                arch="digits-conv", num_classes=classes, weights_sha256="a" * 64, checkpoint_sha256="c" * 64
            ),
            "threat": ThreatModel(eps="0.1"),
            "data": "digits",
            "split": "test",
            "sample_ids": [f"test/{index}" for index in range(len(broken_by))],
            "labels": labels,
            "class_names": ("zero", "one"),
            "clean_prediction": [
                1 - y if by == "clean" else y for y, by in zip(labels, broken_by, strict=True)
            ],
            "adversarial_prediction": [
                y if by is None else 1 - y for y, by in zip(labels, broken_by, strict=True)
            ],
            "broken_by": broken_by,
            "attacks": attack_rows(protocol, classes, broken, proven),
            "protocol": "standard",
            "flags": (),
            "attack_seed": 0,
            "sample_seed": None,
            "block_size": 100,
            "points": None,
            "versions": {"torch": "2"},
            "environment": {"device": "cpu"},
            "seconds": 1.0,
        }
        facts |= changes
        raised = {"adapted_protocol": protocols.is_adapted(protocol), "quick": protocol.startswith("quick")}
        facts["flags"] = (*facts["flags"], *(flag for flag, holds in raised.items() if holds))
        return issue(**facts)

    return make


@pytest.fixture(scope="session")
def emulated() -> Callable[[str], list[str]]:
    """Return a command that starts Python on a processor: ``emulated("cortex-a53")``; skip without it.

    S2AP_ARM64_ROOT is a folder with the Python of ARM64 and what it needs, made by .ci/arm64.
    """

    def command(processor: str) -> list[str]:
        if processor.startswith("cortex"):
            if (root := os.environ.get("S2AP_ARM64_ROOT")) is None:
                pytest.skip("S2AP_ARM64_ROOT names no folder with Python for ARM64")
            words = ["qemu-aarch64", "-cpu", processor, "-L", root, f"{root}/usr/bin/python3"]
        else:
            if platform.machine() != "x86_64":
                pytest.skip("needs an x86-64 processor")
            words = ["qemu-x86_64", "-cpu", processor, sys.executable]
        if shutil.which(words[0]) is None:
            pytest.skip(f"{words[0]} is not installed")
        return words

    return command
