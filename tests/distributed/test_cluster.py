"""The seam to a cluster: what is asked for, what nodes must have in common, how losses are named."""

import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.distributed import cluster
from s2ap_deploy.distributed.cluster import RayTasks, Resources, answer, check_nodes, connected, facts
from s2ap_deploy.errors import DeployError, InconclusiveError, RunFolderError, StorageError, UsageError

INVALID = ["", "cpus", "cpus=x", "cpus=0", "cpus=1,cpus=2", "gpus=1GiB", "memory=0", "disk=3", "cpus=-1"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cpus=4", Resources(4)),
        ("gpus=1", Resources(1, 1)),
        ("cpus=2, gpus=1, memory=8GiB", Resources(2, 1, 8 << 30)),
        ("memory=500MB", Resources(memory=500_000_000)),
        ("memory=1024", Resources(memory=1024)),
    ],
)
def test_resources_are_read(text, wanted) -> None:
    assert Resources.parse(text) == wanted


@pytest.mark.parametrize("text", INVALID)
def test_resources_that_say_nothing_are_refused(text) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "per-task-invalid"):
        Resources.parse(text)


@pytest.mark.parametrize(
    ("node", "fits"),
    [
        ({"CPU": 2.0, "GPU": 1.0, "memory": 100.0}, True),
        ({"CPU": 1.0, "GPU": 1.0, "memory": 100.0}, False),
        ({"CPU": 2.0, "memory": 100.0}, False),
        ({"CPU": 2.0, "GPU": 1.0, "memory": 99.0}, False),
    ],
)
def test_a_node_holds_a_task_or_does_not(node, fits) -> None:
    assert Resources(2, 1, 100).fits(node) == fits


def everywhere(change: Callable[[dict[str, str], str | None], Any]) -> Callable[..., Iterator[Any]]:
    """Nodes of which the second answers with ``change`` to what this machine answers."""

    def ask(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        yield "10.0.0.1", function(*arguments)
        yield "10.0.0.2", change(*function(*arguments))

    return ask


def test_nodes_that_are_alike_pass_and_the_probe_is_gone(tmp_path) -> None:
    check_nodes(everywhere(lambda found, seen: (found, seen)), tmp_path)
    check_nodes(everywhere(lambda found, seen: (found, seen)), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        (lambda found, _: (found, None), StorageError, "storage-not-shared"),
        (lambda found, _: (found, "another"), StorageError, "storage-not-shared"),
        (lambda found, seen: ({**found, "torch": "1.0"}, seen), UsageError, "cluster-version-differs"),
        (lambda _, seen: ({}, seen), UsageError, "cluster-version-differs"),
    ],
)
def test_a_node_that_differs_is_named_and_the_probe_is_gone(tmp_path, change, kind, code) -> None:
    with pytest.raises(kind, match=r"10\.0\.0\.2", check=lambda error: error.code == code):
        check_nodes(everywhere(change), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_node_answers_with_its_versions_and_what_it_sees(tmp_path) -> None:
    (tmp_path / "probe").write_text("token")
    assert answer(str(tmp_path / "probe")) == (facts(), "token")
    assert answer(str(tmp_path / "nothing")) == (facts(), None)
    assert {"python", "torch"} <= facts().keys()


class Errors(types.SimpleNamespace):
    """The errors of Ray that matter, in its own hierarchy."""

    RayError = type("RayError", (Exception,), {})
    OutOfMemoryError = type("OutOfMemoryError", (RayError,), {})
    RayTaskError = type("RayTaskError", (RayError,), {})
    GetTimeoutError = type("GetTimeoutError", (RayError, TimeoutError), {})
    NodeDiedError = type("NodeDiedError", (RayError,), {})


def of_task(cause: Exception) -> Exception:
    error: Any = Errors.RayTaskError("remote traceback")
    error.cause = cause
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("raised", "kind", "code"),
    [
        (Errors.OutOfMemoryError("killed\nmore"), InconclusiveError, "cluster-out-of-memory"),
        (Errors.NodeDiedError(""), InconclusiveError, "cluster-task-lost"),
        (Errors.GetTimeoutError(""), InconclusiveError, "cluster-silent"),
        (of_task(RunFolderError("x", code="own-code")), RunFolderError, "own-code"),
        (of_task(ModuleNotFoundError("no s2ap_deploy")), UsageError, "cluster-package-missing"),
        (of_task(ZeroDivisionError("by zero")), DeployError, "cluster-task-failed"),
    ],
)
def test_losses_and_errors_of_tasks_are_named(raised, kind, code) -> None:
    def get(_ticket: Any, timeout: float | None) -> Any:
        raise raised

    tasks = RayTasks(types.SimpleNamespace(get=get, exceptions=Errors), Resources())
    with pytest.raises(kind, check=lambda error: error.code == code and "\n" not in error.message):
        tasks.result("ticket", 3.0)


@pytest.mark.parametrize(
    ("resources", "slots"), [(Resources(1), 6), (Resources(4), 1), (Resources(1, 1), 2), (Resources(8), 1)]
)
def test_slots_are_what_the_cluster_holds_at_once(resources, slots) -> None:
    ray = types.SimpleNamespace(cluster_resources=lambda: {"CPU": 6.0, "GPU": 2.0})
    assert RayTasks(ray, resources).slots == slots


class FakeRay(types.ModuleType):
    """A Ray that is reached, with one node of two cores, or refuses with ``problem``."""

    exceptions = Errors

    def __init__(self, problem: Exception | None = None) -> None:
        super().__init__("ray")
        self.problem, self.calls = problem, list[str]()

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.calls.append(f"init {options['address']}")
        if self.problem is not None:
            raise self.problem

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def nodes(self) -> list[dict[str, Any]]:
        common = {"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}}
        return [{"NodeID": "a", "Alive": True, **common}, {"NodeID": "b", "Alive": False, **common}]


@pytest.fixture
def fake(monkeypatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setattr(cluster, "_library", lambda: ray)
    monkeypatch.setattr(cluster, "check_nodes", lambda *_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return ray


def test_a_connection_is_closed_whatever_happens(fake) -> None:
    with connected("ray", Resources()) as tasks:
        assert [node["NodeID"] for node in tasks.nodes()] == ["a"]
    with pytest.raises(ZeroDivisionError), connected("ray", Resources()):
        raise ZeroDivisionError
    assert fake.calls == ["init None", "shutdown"] * 2


def test_a_task_that_no_node_can_hold_is_refused(fake) -> None:
    with (
        pytest.raises(UsageError, check=lambda error: error.code == "cluster-too-small"),
        connected("ray", Resources(3)),
    ):
        pass
    assert fake.calls[-1] == "shutdown"


@pytest.mark.parametrize(
    ("problem", "kind", "code"),
    [
        (ConnectionError("nobody"), InconclusiveError, "cluster-unreachable"),
        (RuntimeError("Version mismatch: Ray"), UsageError, "cluster-version-differs"),
    ],
)
def test_a_cluster_that_refuses_is_named(fake, problem, kind, code) -> None:
    fake.problem = problem
    with pytest.raises(kind, check=lambda error: error.code == code), connected("ray", Resources()):
        pass


@pytest.mark.parametrize("target", ["rays", "ray://", "ray://host", "http://host:1", "ray://host:port"])
def test_an_address_that_is_none_is_refused(fake, target) -> None:
    with (
        pytest.raises(UsageError, check=lambda error: error.code == "cluster-invalid"),
        connected(target, Resources()),
    ):
        pass


@pytest.mark.parametrize("where", ["option", "environment"])
def test_nobody_at_an_address_is_found_out_before_ray_is_asked(fake, monkeypatch, where) -> None:
    with socket.socket() as taken:  # bound and not listening: refused at once
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        if where == "environment":
            monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(InconclusiveError, check=lambda error: error.code == "cluster-unreachable"),
            connected("ray" if where == "environment" else f"ray://{address}", Resources()),
        ):
            pass
    assert fake.calls == []


def test_without_ray_the_command_says_what_to_install(s2ap, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = s2ap.refused("ray-missing", "sweep", "demo", "--sparsity", "0.9", "--on", "ray", cwd=tmp_path)
    assert "pip install" in done.answer["hint"]
    assert "ray" in done.answer["hint"]
    s2ap.refused("per-task-alone", "sweep", "demo", "--per-task", "cpus=1", cwd=tmp_path)
    s2ap.refused("per-task-invalid", "sweep", "demo", "--on", "ray", "--per-task", "x", cwd=tmp_path)
    assert not Path(tmp_path / "s2ap-sweep" / "sweep.json").exists()
