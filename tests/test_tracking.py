"""Trackers beside the recorder that a person watches: fakes, and the real ones where they are installed."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from s2ap_deploy import tracking
from s2ap_deploy.errors import UsageError
from s2ap_deploy.recorder import Silent

ORDER = ["begin", "advance", "log", "log", "log", "note", "warn", "end"]
EPOCH: dict[str, float | int | str] = {"epoch": 3, "epochs": 5, "loss": 0.5, "robust_accuracy": 0.8}


class Heard(Silent):
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.calls.append(("begin", stage, total, unit))

    def advance(self, steps: int = 1) -> None:
        self.calls.append(("advance", steps))

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        self.calls.append(("log", stage, values))

    def note(self, message: str) -> None:
        self.calls.append(("note", message))

    def warn(self, message: str) -> None:
        self.calls.append(("warn", message))

    def end(self) -> None:
        self.calls.append(("end",))


class Fake:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.rows: list[tuple[str, dict[str, float], int]] = []
        self.closed = 0

    def facts(self, values: Mapping[str, str]) -> None:
        self.known = dict(values)

    def figures(self, stage: str, values: Mapping[str, float], step: int) -> None:
        self.rows.append((stage, dict(values), step))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def fake(monkeypatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(tracking, "_tracker", lambda name, folder: made)
    return made


def test_everything_reaches_the_person_and_figures_the_tracker(fake, tmp_path) -> None:
    heard = Heard()
    attack = {"attack": "apgd-ce", "block": 1, "broken": 2, "seconds": 0.5}
    with tracking.tracked(heard, ["tensorboard"], tmp_path, {"seed": 1, "prune": {"s": 0.9}}) as recorder:
        recorder.begin("search", 10, "step")
        recorder.advance(2)
        recorder.log("search", EPOCH)
        recorder.log("certify", dict(attack))
        recorder.log("certify", dict(attack))
        recorder.note("a note")
        recorder.warn("a warning")
        recorder.end()
        assert fake.closed == 0
    assert [call[0] for call in heard.calls] == ORDER
    assert heard.calls[2] == ("log", "search", EPOCH)
    assert fake.known == {"seed": "1", "prune.s": "0.9"}
    told = {"block": 1.0, "broken": 2.0, "seconds": 0.5}
    assert fake.rows == [
        ("search", {"loss": 0.5, "robust_accuracy": 0.8}, 3),
        ("certify/apgd-ce", told, 1),
        ("certify/apgd-ce", told, 2),
    ]
    assert fake.closed == 1


def test_an_error_closes_the_tracker(fake, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.tracked(Silent(), ["mlflow"], tmp_path, {}):
        raise KeyboardInterrupt
    assert fake.closed == 1


def test_without_trackers_the_recorder_is_the_very_same(tmp_path) -> None:
    heard = Heard()
    with tracking.tracked(heard, [], tmp_path, {}) as recorder:
        assert recorder is heard
    assert list(tmp_path.iterdir()) == []


def test_one_that_nobody_knows_is_refused(tmp_path) -> None:
    with (
        pytest.raises(UsageError, check=lambda error: error.code == "tracker-unknown"),
        tracking.tracked(Silent(), ["aim"], tmp_path, {}),
    ):
        pass


@pytest.mark.parametrize("name", tracking.NAMES)
def test_one_that_is_missing_names_the_extra(name, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(UsageError, check=lambda error: error.code == "tracker-not-installed") as caught,
        tracking.tracked(Silent(), [name], tmp_path, {}),
    ):
        pass
    assert "s2ap-deploy[tracking]" in (caught.value.hint or "")


class Client:
    """What MLflow's client is asked for, without MLflow."""

    made: ClassVar[list[Client]] = []

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri
        self.calls: list[tuple[Any, ...]] = []
        Client.made.append(self)

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("run", experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

    def log_param(self, run: str, key: str, value: str) -> None:
        self.calls.append(("param", run, key, value))

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.calls.append(("metric", run, key, value, step))

    def set_terminated(self, run: str) -> None:
        self.calls.append(("end", run))


def test_mlflow_is_told_the_recipe_and_the_figures(tmp_path, monkeypatch) -> None:
    library = types.ModuleType("mlflow")
    library.utils = types.SimpleNamespace(  # type: ignore[attr-defined]
        validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=5)
    )
    client = types.ModuleType("mlflow.tracking")
    client.MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", library)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", client)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "s2ap-run"
    run.mkdir()
    with tracking.tracked(Silent(), ["mlflow"], run, {"name": "a long name"}) as recorder:
        recorder.log("search", dict(EPOCH))
    (made,) = Client.made
    assert made.uri == (run / "tracking" / "mlflow").as_uri()
    assert made.calls == [
        ("run", "7", "s2ap-run"),
        ("param", "r", "name", "a lon"),
        ("metric", "r", "search/loss", 0.5, 3),
        ("metric", "r", "search/robust_accuracy", 0.8, 3),
        ("end", "r"),
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///elsewhere")
    with tracking.tracked(Silent(), ["mlflow"], run, {}):
        assert Client.made[-1].uri == "file:///elsewhere"


def test_tensorboard_writes_below_the_run_folder(tmp_path) -> None:
    if not _present("tensorboard"):
        pytest.skip("needs tensorboard: pip install 's2ap-deploy[tracking]'")
    with tracking.tracked(Silent(), ["tensorboard"], tmp_path, {"seed": 0}) as recorder:
        recorder.log("search", dict(EPOCH))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tracking" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["search/loss", "search/robust_accuracy"]
    assert [(each.step, each.value) for each in events.Scalars("search/loss")] == [(3, 0.5)]


def test_mlflow_itself_keeps_what_it_is_told(tmp_path, monkeypatch) -> None:
    if not _present("mlflow"):
        pytest.skip("needs mlflow: pip install 's2ap-deploy[tracking]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracking.tracked(Silent(), ["mlflow"], tmp_path, {"seed": 0}) as recorder:
        recorder.log("search", dict(EPOCH))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "tracking" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("s2ap-deploy")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["search/loss"] == 0.5
    assert run.data.params == {"seed": "0"}
    assert run.info.status == "FINISHED"


def test_weights_and_biases_keeps_every_stage_and_stays_offline(tmp_path, monkeypatch) -> None:
    if not _present("wandb"):
        pytest.skip("needs wandb: pip install 's2ap-deploy[tracking]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with tracking.tracked(Silent(), ["wandb"], tmp_path, {"prune": {"s": 0.875}}) as recorder:
        for stage in ("search", "finetune"):
            recorder.log(stage, {**EPOCH, "loss": 0.40625})
    kept = [path for path in (tmp_path / "tracking").rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in (tmp_path / "tracking").rglob("*"))
    (written,) = [path for path in kept if path.suffix == ".wandb"]
    assert written.parent.name.startswith("offline-run-")
    deadline = time.monotonic() + 20
    while b"0.875" not in (content := written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)  # the library's own process may still be writing
    for word in (b"search/loss", b"finetune/loss", b"finetune/step", b"prune.s", b"0.40625", b"0.875"):
        assert word in content


def _present(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
