"""Run folders made of records alone: what the gate reads, without a network that somebody trained."""

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy import files
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.certificate import Certificate, PointsFile, Subject
from s2ap_deploy.evaluation.samples import rows
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.records import Agreement, AttackRow, PointsCheck
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.spec import ThreatModel


@pytest.fixture(scope="session")
def channel_run(s2ap, digits_model, tmp_path_factory) -> Path:
    """A run that kept half of its channels, exported with the pair for PyTorch."""
    folder = tmp_path_factory.mktemp("channels")
    short = ["--preset", "quick", "--search-epochs", 1, "--finetune-epochs", 1, "--batch-size", 512]
    prune = ["--granularity", "channel", "--keep-ratio", 0.5, "--eps", "0.5", *short]
    for command in (["prune", digits_model, *prune], ["certify", "--n", 20], ["export", "--torch"]):
        s2ap.ok(*command, "--threads", 1, cwd=folder)
    return folder / "s2ap-run"


@pytest.fixture
def own_channel_run(channel_run, tmp_path) -> Path:
    """A copy of the run on channels that a test may spoil."""
    return Path(shutil.copytree(channel_run, tmp_path / "s2ap-run"))


@pytest.fixture(autouse=True)
def _no_ci_around(monkeypatch) -> None:
    """These tests say themselves when they run on GitHub; the real one shall not get their summaries."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)


def issue(**facts: Any) -> Certificate:
    """Build a certificate from columns of samples and the other fields."""
    columns = [facts.pop(name) for name in inspect.signature(rows).parameters]
    return Certificate.of(rows(*columns), **facts)


def certificate_of(survived: int, n: int, checkpoint: Path, beside: Path, /, **changes: Any) -> Certificate:
    """The first ``survived`` of ``n`` samples stand, the rest fall to APGD-CE; labels alternate."""
    broken_by: list[str | None] = [None] * survived + ["apgd-ce"] * (n - survived)
    labels = [index % 2 for index in range(n)]
    proven = changes["proven"].count if "proven" in changes else 0
    protocol = changes.get("protocol", "standard")
    classes = 2 if protocols.is_adapted(protocol) else 10
    facts: dict[str, Any] = {
        "subject": Subject(
            arch="digits-conv",
            num_classes=classes,
            weights_sha256="a" * 64,
            checkpoint_sha256=files.sha256(checkpoint),
        ),
        "threat": ThreatModel(eps="8/255"),
        "data": "digits",
        "split": "test",
        "sample_ids": [f"test/{index}" for index in range(n)],
        "labels": labels,
        "class_names": ("zero", "one"),
        "clean_prediction": labels,
        "adversarial_prediction": [
            y if by is None else 1 - y for y, by in zip(labels, broken_by, strict=True)
        ],
        "broken_by": broken_by,
        "attacks": [
            AttackRow(
                name=name,
                n_in=(survived if done else n) - proven,
                n_broken=0 if done else n - survived,
                seconds=1.0,
            )
            for done, name in enumerate(protocols.names(protocols.version(protocol), classes))
        ],
        "protocol": "standard",
        "flags": ("adapted_protocol",) if classes == 2 else (),
        "attack_seed": 0,
        "sample_seed": None,
        "block_size": 100,
        "points": PointsFile(name=beside.name, sha256=files.sha256(beside)),
        "versions": {},
        "environment": {},
        "seconds": 1.0,
    }
    return issue(**{**facts, **changes})


def report_of(onnx: Path, certificate: Certificate, **changes: Any) -> ExportReport:
    """A file of 1,000 weights, 100 of them not zero, that answers as the certificate says."""
    facts: dict[str, Any] = {
        "file": onnx.name,
        "sha256": files.sha256(onnx),
        "bytes": onnx.stat().st_size,
        "dense_bytes": 4000,
        "opset": 20,
        "encoding": "auto",
        "tensors": (),
        "weights": 1000,
        "nonzeros": 100,
        "sparsity": 0.9,
        "agreement": Agreement(
            n=1, max_logit_difference=0.0, largest_logit=1.0, tolerance=1.0, argmax_agree=1, ties=0
        ),
        "points_checks": (
            PointsCheck(
                certificate_sha256=certificate.sha256,
                n=certificate.n,
                clean_correct=certificate.clean.k,
                survived=certificate.robust.k,
                clean_disagreements=0,
                adversarial_disagreements=0,
            ),
        ),
        "source_weights_sha256": "a" * 64,
        "latency_ratio": 1.04,
        "versions": {},
    }
    return ExportReport(**{**facts, **changes})


def points_of(n: int, note: str) -> bytes:
    """A safetensors file of ``n`` clean and ``n`` attacked points of one pixel; ``note`` makes it another."""
    offsets = {"clean": [0, 4 * n], "attacked": [4 * n, 8 * n]}
    tensors = {
        name: {"dtype": "F32", "shape": [n, 1, 1, 1], "data_offsets": where}
        for name, where in offsets.items()
    }
    header = json.dumps({"__metadata__": {"note": note}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8 * n)


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """``make_run(dense=900, pruned=890, n=1000)``: a run folder after certify and export."""

    def make(
        dense: int = 900,
        pruned: int = 890,
        n: int = 1000,
        *,
        name: str = "s2ap-run",
        changes: dict[str, Any] | None = None,
        dense_changes: dict[str, Any] | None = None,
        report_changes: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        with Run.open(folder, create=True, command="test") as run:
            networks = {
                stage: _stage(run, stage, {"model.safetensors": stage.encode()})[0]
                for stage in ("pretrain", "finetune")
            }
            stage = run.stage("certify", inputs={}, resume=False, overwrite=True)
            outputs, certificates = [], {}
            for role, survived, network, more in (
                ("dense", dense, networks["pretrain"], dense_changes),
                ("pruned", pruned, networks["finetune"], changes),
            ):
                points, path = stage.folder / f"{role}-points.safetensors", stage.folder / f"{role}.json"
                points.write_bytes(points_of(n, role))
                certificates[role] = certificate_of(survived, n, network, points, **(more or {}))
                certificates[role].save(path)
                outputs += [points, path]
            stage.finish(outputs, {})
            stage = run.stage("export", inputs={}, resume=False, overwrite=True)
            onnx, report = stage.folder / "model.onnx", stage.folder / "report.json"
            onnx.write_bytes(b"x" * 1000)
            report_of(onnx, certificates["pruned"], **(report_changes or {})).save(report)
            stage.finish([onnx, report], {})
        return folder

    return make


def _stage(run: Run, name: Any, contents: dict[str, bytes]) -> Sequence[Path]:
    stage = run.stage(name, inputs={}, resume=False, overwrite=True)
    paths = []
    for file_name, data in contents.items():
        paths.append(stage.folder / file_name)
        paths[-1].write_bytes(data)
    stage.finish(paths, {})
    return paths
