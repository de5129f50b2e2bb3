"""A run folder made of records alone, in which every name tries to become markup."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from s2ap_deploy import files
from s2ap_deploy.evaluation.certificate import Certificate, PointsFile, Subject
from s2ap_deploy.evaluation.samples import rows
from s2ap_deploy.evaluation.security_curve import security_curve
from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.onnx_export.export_report import EncodedTensor, ExportReport
from s2ap_deploy.records import Agreement, AttackRow
from s2ap_deploy.runs.folder import RECIPE_FILE, Run
from s2ap_deploy.spec import ThreatModel

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}<img src=http://evil.example/x>\u202e|`![a](http://b)"
N = 12
LATER = ("apgd-t", "fab-t", "square")
VALUES = {"clean_accuracy": 0.9, "robust_accuracy": 0.6, "loss": 0.5, "hamming": 0.1, "replaced": 0.2}
EPOCHS = [{"epoch": e, **VALUES, "sharpness": 0.1 * e, "eigenvalue": 1.0 / e} for e in (1, 2, 3)]


@pytest.fixture(scope="session")
def hostile_text() -> str:
    return HOSTILE


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """``make_folder("certify", "export")``: a run folder in which these stages are finished."""

    def make(*stages: str, roles: tuple[str, ...] = ("dense", "pruned"), channels: int = 1) -> Path:
        folder = tmp_path / "run <b>"
        with Run.open(folder, create=True, command=f"s2ap-deploy {HOSTILE}") as run:
            for name in stages:
                inputs = {
                    "seed": 3,
                    "threat": {"norm": "Linf", "eps": "8/255"},
                    "data": {"name": HOSTILE},
                    "prune": {"method": HOSTILE, "s2ap": True, "gamma": 0.01, "sparsity": 0.9},
                    "policy": {"min_robust": 0.4, "max_drop": None},
                }
                stage = run.stage(name, inputs=inputs, resume=False, overwrite=True)  # type: ignore[arg-type]
                outputs = WRITERS[name](stage.folder, roles, channels)
                layers = [{"name": HOSTILE, "kept": 1, "weights": 10}]
                stage.finish(outputs, {"layers": layers, "sparsity": 0.9})
        (folder / RECIPE_FILE).write_text(f"name: {HOSTILE}\n", encoding="utf-8")
        return folder

    return make


def _history(folder: Path, *_: Any) -> list[Path]:
    (folder / "history.json").write_text(json.dumps(EPOCHS))
    return [folder / "history.json"]


def _certificates(folder: Path, roles: tuple[str, ...], channels: int) -> list[Path]:
    outputs = []
    for role in roles:
        points, path, curve = (
            folder / f"{role}{end}" for end in ("-points.safetensors", ".json", "-curve.json")
        )
        clean = np.linspace(0, 1, N * channels * 16, dtype=np.float32).reshape(N, channels, 4, 4)
        save_file({"clean": clean, "attacked": 1 - clean}, points)
        labels = [index % 2 for index in range(N)]
        standing = 8 if role == "dense" else 5
        broken = ["clean" if i == N - 1 else None if i < standing else "apgd-ce" for i in range(N)]
        Certificate.of(
            rows(
                [f"{HOSTILE}/{index}" for index in range(N)],
                labels,
                [1 - y if by == "clean" else y for y, by in zip(labels, broken, strict=True)],
                [1 - y if by else y for y, by in zip(labels, broken, strict=True)],
                broken,
            ),
            subject=Subject(arch=HOSTILE, num_classes=10, weights_sha256="a" * 64, sparsity=0.9),
            threat=ThreatModel(eps="8/255"),
            data=HOSTILE,
            split="test",
            class_names=(HOSTILE, "one"),
            attacks=[
                AttackRow(name=name, n_in=seen, n_broken=seen - standing, seconds=1.0)
                for name, seen in (("apgd-ce", N - 1), *((name, standing) for name in LATER))
            ],
            protocol="standard",
            flags=(),
            attack_seed=0,
            sample_seed=0,
            block_size=100,
            points=PointsFile(name=points.name, sha256=files.sha256(points)),
            versions={"torch": HOSTILE},
            environment={},
            seconds=1.0,
        ).save(path)
        security_curve([0.01 * i for i in range(N)], norm="Linf").save(curve)
        outputs += [points, path, curve]
    return outputs


def _export(folder: Path, *_: Any) -> list[Path]:
    (folder / "model.onnx").write_bytes(b"x" * 500)
    facts = {"entries": 1000, "nonzeros": 100, "dense_bytes": 4020}
    ExportReport(
        file=HOSTILE,
        sha256=files.sha256(folder / "model.onnx"),
        bytes=500,
        dense_bytes=4000,
        opset=20,
        encoding="auto",
        tensors=(EncodedTensor(name=HOSTILE, shape=(10, 100), encoding="ef", bytes=490, **facts),),
        weights=1000,
        nonzeros=100,
        sparsity=0.9,
        agreement=Agreement(
            n=1, max_logit_difference=0.0, largest_logit=1.0, tolerance=1.0, argmax_agree=1, ties=0
        ),
        source_weights_sha256="a" * 64,
        latency_ratio=1.04,
        latency_ms=0.5,
        warnings=(HOSTILE,),
        versions={},
    ).save(folder / "report.json")
    return [folder / "report.json", folder / "model.onnx"]


def _verdict(folder: Path, *_: Any) -> list[Path]:
    check = Check(rule="file", name="file", status="fail", message=f"file {HOSTILE} is not covered")
    files.write_json(folder / "verdict.json", Verdict.of([check]).model_dump(mode="json"))
    return [folder / "verdict.json"]


WRITERS: dict[str, Callable[..., list[Path]]] = {
    "pretrain": _history,
    "search": _history,
    "finetune": _history,
    "certify": _certificates,
    "export": _export,
    "gate": _verdict,
}
