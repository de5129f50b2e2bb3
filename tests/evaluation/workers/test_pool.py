"""Worker processes: the same answers, typed errors, and no process left behind."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from s2ap_deploy.errors import CheckpointError, DeployError, InconclusiveError
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, attack
from s2ap_deploy.evaluation.autoattack.frozen_model import Attacker, FrozenModel, Unit
from s2ap_deploy.evaluation.workers.pool import InProcess, WorkerPool, count
from s2ap_deploy.evaluation.workers.worker import NotPicklable, PickledAttacker, import_file
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


def attacker_of(network: nn.Module, n: int = 8) -> Attacker:
    torch.manual_seed(0)
    images = torch.rand(n, 1, 8, 8)
    labels = network(images).argmax(1)
    return Attacker(FrozenModel(network, CPU), images, labels, ThreatModel(eps="0.05"), 10, CPU)


def children(parent: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(ppid) == parent and state != "Z":
                found.add(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def module_from(path: Path, source: str) -> ModuleType:
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_two_workers_answer_as_one_process_does_and_leave_nothing_behind(make_network) -> None:
    attacker = attacker_of(make_network())
    units = [Unit(0, "apgd-ce", 11, (0, 1, 2, 3)), Unit(1, "apgd-ce", 12, (4, 5, 6, 7))]
    expected = {}
    with InProcess(attacker) as here:
        for unit in units:
            here.submit(unit)
            expected[unit] = here.next()
    before = children(os.getpid())
    with WorkerPool(attacker, 2) as there:
        mine = children(os.getpid()) - before
        assert len(mine) == 2
        for unit in units:
            there.submit(unit)
        assert not there.idle
        found = {result.unit: result for result in (there.next(), there.next())}
        assert there.idle
        assert not there.busy
        there.submit(Unit(0, "square", 13, tuple(range(8))))  # still running when the block ends
    assert children(os.getpid()) == before
    for unit in units:
        assert found[unit].broken == expected[unit].broken != ()
        assert found[unit].predictions == expected[unit].predictions
        assert np.array_equal(found[unit].points, expected[unit].points)


def test_a_worker_that_is_killed_is_an_error_that_says_so(make_network) -> None:
    before = children(os.getpid())
    with WorkerPool(attacker_of(make_network()), 1) as workers:
        (pid,) = children(os.getpid()) - before
        workers.submit(Unit(0, "square", 1, tuple(range(8))))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InconclusiveError, check=lambda error: error.code == "worker-killed") as error:
            workers.next()
        assert "SIGKILL" in error.value.message


def test_errors_come_back_typed_and_prints_do_no_harm(tmp_path) -> None:
    module = module_from(
        tmp_path / "strange_network.py",
        """
        from torch import nn

        class Strange(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(64, 10)

            def forward(self, x):
                print("noise on the standard output")
                logits = self.linear(x.flatten(1))
                mark = x[:, 0, 0, 0]
                if ((mark > 0.4) & (mark < 0.6)).any():
                    logits = logits / 0
                if (mark > 0.9).any():
                    raise ZeroDivisionError("own fault")
                return logits
        """,
    )
    attacker = attacker_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    attacker.images[:, 0, 0, 0] = torch.tensor([0, 0, 0, 0.5, 0, 1, 0, 0])
    attacker = dataclasses.replace(attacker, judge=FrozenModel(module.Strange(), CPU))
    with WorkerPool(attacker, 2) as workers:
        workers.submit(Unit(0, "apgd-ce", 1, (0, 1, 2)))
        assert workers.next().unit.indices == (0, 1, 2)
        workers.submit(Unit(0, "apgd-ce", 1, (2, 3)))
        with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
            workers.next()
        workers.submit(Unit(0, "apgd-ce", 1, (4, 5)))
        with pytest.raises(DeployError, check=lambda error: error.code == "worker-failed") as error:
            workers.next()
        assert "strange_network.py" in error.value.__notes__[0]
        assert error.value.exit_code == 70


def test_a_classifier_that_cannot_travel_is_attacked_here(make_network) -> None:
    class Local(nn.Sequential):
        pass

    network = Local(make_network())
    with pytest.raises(NotPicklable, match="cannot be sent"):
        PickledAttacker.pack(attacker_of(network))

    class Warned(Silent):
        said = ""

        def warn(self, message: str) -> None:
            self.said = message

    recorder = Warned()
    images = torch.rand(4, 1, 8, 8)
    outcome = attack(
        network, images, network(images).argmax(1),
        AttackConfig(threat=ThreatModel(eps="0.5"), seed=0, device=CPU, block_size=2),
        workers=2, recorder=recorder,
    )  # fmt: skip
    assert outcome.complete
    assert "in this process instead" in recorder.said


def test_a_class_of_the_main_program_cannot_be_rebuilt_elsewhere() -> None:
    shipment = PickledAttacker(b"no checkpoint", {})
    with pytest.raises(NotPicklable, match="cannot be rebuilt in another process"):
        shipment.unpack()


def test_a_module_that_is_there_is_not_imported_again(tmp_path) -> None:
    import_file("torch.nn", str(tmp_path / "absent.py"))
    assert sys.modules["torch.nn"] is nn


def test_no_more_workers_than_work(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [count(None, 100), count(None, 3), count(2, 100), count(64, 5)] == [8, 3, 2, 5]


# Without `if __name__ == "__main__"`: concurrent.futures would run it again in every worker, and fail.
SCRIPT = """
import sys, torch
from pathlib import Path
from torch import nn
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig, attack
from s2ap_deploy.spec import ThreatModel
torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
images = torch.rand(6, 1, 8, 8)
config = AttackConfig(
    threat=ThreatModel(eps="0.025"), seed=0, device=torch.device("cpu"), block_size=3,
    record=Path(sys.argv[1]),
)
outcome = attack(network, images, network(images).argmax(1), config, workers=2)
print(outcome.broken_by, outcome.adversarial.double().sum().item(), outcome.adversarial_prediction)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT)
    return subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True)


def wait_until_gone(pids: set[int], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGINT])
def test_workers_die_with_their_parent(tmp_path, deed) -> None:
    process = start(tmp_path)
    end = time.monotonic() + 240
    while len(children(process.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(deed)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert wait_until_gone(workers)


def lines(record: Path) -> int:
    """Whole lines of the record: its header, and one per finished unit."""
    path = record / "attack.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_the_outcome_is_the_same(tmp_path) -> None:
    """Each kill waits for progress rather than for a time: machines differ in speed."""
    expected, _ = start(tmp_path / "whole").communicate(timeout=300)
    assert "None" in expected
    assert "apgd" in expected
    record = tmp_path / "killed"
    generator = torch.Generator().manual_seed(0)
    for kill in range(3):
        before = lines(record)
        process = start(record)
        end = time.monotonic() + 120
        while lines(record) <= before:
            assert process.poll() is None, f"it ended before kill {kill + 1}"
            assert time.monotonic() < end, "no unit was finished"
            time.sleep(0.002)
        time.sleep(0.1 * torch.rand(1, generator=generator).item())
        workers = children(process.pid)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert wait_until_gone(workers)
    found, _ = start(record).communicate(timeout=300)
    assert found == expected
