"""Log metrics to TensorBoard, MLflow or Weights & Biases, in addition to the recorder on screen.

All are optional (``pip install 's2ap-deploy[tracking]'``) and imported only on request. Nothing leaves the
machine: files are written below the run folder, unless MLFLOW_TRACKING_URI names another place for MLflow,
or WANDB_MODE is ``online``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from s2ap_deploy.errors import StorageError, UsageError
from s2ap_deploy.recorder import Recorder

Name = Literal["tensorboard", "mlflow", "wandb"]
NAMES: tuple[Name, ...] = get_args(Name)
FOLDER = "tracking"

Figures = Mapping[str, float | int | str]


class Tracker(Protocol):
    """Interface of a tracker. The tag of a metric is its stage and name: ``search/loss``."""

    def facts(self, values: Mapping[str, str]) -> None:
        """Log the recipe's keys and values."""

    def figures(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of one row; ``step`` is the epoch, or the row's number if there are no epochs."""

    def close(self) -> None:
        """Flush and close the tracker."""


class TensorBoard:
    """Event files in ``folder``, for ``tensorboard --logdir``."""

    def __init__(self, folder: Path) -> None:
        _require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(log_dir=str(folder))

    def facts(self, values: Mapping[str, str]) -> None:
        rows = "\n".join(f"| {key} | {value} |" for key, value in values.items())
        self.writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", 0)

    def figures(self, stage: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """One MLflow run called ``name``, stored in ``folder`` unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, folder: Path, name: str) -> None:
        # Figures are only for the user, and a folder needs no database.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        _require("mlflow", "mlflow")
        import mlflow
        from mlflow.tracking import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or folder.resolve().as_uri()
        self.client: Any = MlflowClient(tracking_uri=place)
        found = self.client.get_experiment_by_name("s2ap-deploy")
        experiment = found.experiment_id if found else self.client.create_experiment("s2ap-deploy")
        self.run: str = self.client.create_run(experiment, run_name=name).info.run_id
        self.longest: int = getattr(mlflow.utils.validation, "MAX_PARAM_VAL_LENGTH", 500)

    def facts(self, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            self.client.log_param(self.run, key, value[: self.longest])

    def figures(self, stage: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, f"{stage}/{name}", value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


class WeightsAndBiases:
    """One offline run called ``name`` in ``folder``, for ``wandb sync``; WANDB_MODE may name another mode.

    Every stage has a step of its own, because the library drops rows whose step is not larger than the last.
    """

    def __init__(self, folder: Path, name: str) -> None:
        _require("wandb", "wandb")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Only what is logged is stored: no output, code, packages, hardware, and no link in the run folder.
        settings = wandb.Settings(
            console="off",
            silent=True,
            symlink=False,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self.run: Any = wandb.init(
            project="s2ap-deploy",
            name=name,
            dir=str(folder),
            mode=mode,
            reinit="create_new",
            settings=settings,
        )
        self.stages: set[str] = set()

    def facts(self, values: Mapping[str, str]) -> None:
        self.run.config.update(dict(values))

    def figures(self, stage: str, values: Mapping[str, float], step: int) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self.run.finish()
        # wandb 0.31 links to the log of its service in the user's cache, which a signed folder must not.
        for path in self.folder.rglob("*.log"):
            if path.is_symlink():
                path.unlink()


class Tracked:
    """A recorder that forwards everything to another one, and metrics to trackers."""

    def __init__(self, inner: Recorder, trackers: Sequence[Tracker]) -> None:
        self.inner = inner
        self.trackers = tuple(trackers)
        self.rows: dict[str, int] = {}

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.inner.begin(stage, total, unit)

    def advance(self, steps: int = 1) -> None:
        self.inner.advance(steps)

    def log(self, stage: str, values: dict[str, float | int | str]) -> None:
        self.inner.log(stage, values)
        self.rows[stage] = self.rows.get(stage, 0) + 1
        epoch = values.get("epoch")
        step = epoch if isinstance(epoch, int) else self.rows[stage]
        told = {
            name: float(value)
            for name, value in values.items()
            if name not in ("epoch", "epochs") and isinstance(value, int | float)
        }
        for tracker in self.trackers:
            tracker.figures(_tag(stage, values), told, step)

    def note(self, message: str) -> None:
        self.inner.note(message)

    def warn(self, message: str) -> None:
        self.inner.warn(message)

    def end(self) -> None:
        self.inner.end()


@contextmanager
def tracked(
    inner: Recorder, names: Sequence[str], folder: Path, facts: Mapping[str, Any]
) -> Iterator[Recorder]:
    """Return ``inner``, or with ``names`` a recorder that also logs to those trackers, below ``folder``.

    ``facts`` are nested settings. Raises UsageError for a tracker that is not installed or unknown, and
    StorageError when it cannot write.
    """
    if not names:
        yield inner
        return
    trackers: list[Tracker] = []
    try:
        for name in dict.fromkeys(names):
            trackers.append(_tracker(name, folder))
            trackers[-1].facts(flat(facts))
        yield Tracked(inner, trackers)
    finally:
        for tracker in trackers:
            tracker.close()


def require(names: Sequence[str]) -> None:
    """Raise UsageError, which names the extra, when one of these trackers is not installed."""
    for name in names:
        _require(name, name)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted names and text, without those that are None."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = str(value)
    return found


def _tracker(name: str, folder: Path) -> Tracker:
    place = folder / FOLDER / name
    try:
        if name == "tensorboard":
            return TensorBoard(place)
        if name == "mlflow":
            return MLflow(place, folder.resolve().name)
        if name == "wandb":
            return WeightsAndBiases(place, folder.resolve().name)
    except OSError as error:
        raise StorageError(
            f"{name} cannot write below {place}: {error}", code="tracker-not-writable"
        ) from error
    raise UsageError(
        f"there is no tracker {name!r}", code="tracker-unknown", hint=f"there are {', '.join(NAMES)}"
    )


def _require(module: str, name: str) -> None:
    """Raise UsageError, which names the extra, when a tracker is not installed."""
    import importlib

    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{name} is not installed: {error}",
            code="tracker-not-installed",
            hint="pip install 's2ap-deploy[tracking]', or leave --track out",
        ) from None


def _tag(stage: str, values: Figures) -> str:
    """Return the tag prefix of a stage, one per attack."""
    return f"{stage}/{values['attack']}" if "attack" in values else stage
