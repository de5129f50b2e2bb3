"""``export`` with other ways to store weights, and with a fixed batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from s2ap_deploy.codecs.registry import CODECS


def exported(s2ap: Any, run: Path, *options: object) -> dict[str, Any]:
    report: dict[str, Any] = s2ap.json("export", *options, "--run", run, "--overwrite", "--threads", 1)
    return report


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("encoding", [each.name for each in CODECS.values() if each.sparse])
def test_every_encoding_from_the_command_line(s2ap, own_run, encoding) -> None:
    report = exported(s2ap, own_run, "--encoding", encoding)
    assert report["encoding"] == encoding
    assert {row["encoding"] for row in report["tensors"] if len(row["shape"]) > 1} == {encoding}
    assert "s2ap.certificate_sha256" in metadata(own_run / "export" / "model.onnx")
    assert CODECS[encoding].statement in report["statement"]
    assert s2ap("gate", "--min-clean", 0, "--rule", "point", "--run", own_run).code == 0
    assert s2ap("report", own_run, "--output", own_run.parent / "page.html").code == 0


def test_float16_values_are_another_network(s2ap, own_run) -> None:
    done = s2ap.ok("export", "--values", "float16", "--run", own_run, "--overwrite", "--threads", 1)
    folder = own_run / "export-float16-weights"
    file = folder / "model-float16-weights.onnx"
    assert "does not cover weights in float16" in done.err
    assert f"certify --artifact {file} --run {own_run}" in done.err
    assert "rounded" in done.out
    facts = metadata(file)
    assert facts["s2ap.values"] == "float16"
    assert "s2ap.certificate_sha256" not in facts
    report = json.loads((folder / "report.json").read_text())
    assert report["rounding"]["values"] == "float16"
    assert report["agreement"]["argmax_agree"] <= report["agreement"]["n"] == 40
    assert any("does not cover" in warning for warning in report["warnings"])
    gate = s2ap("gate", "--min-clean", 0, "--rule", "point", "--run", own_run)
    assert gate.code == 3
    assert "certify the file itself" in gate.out
    s2ap.ok("certify", "--artifact", file, "--run", own_run, "--threads", 1, "--workers", 1)
    gate = s2ap.ok("gate", "--min-clean", 0, "--rule", "point", "--run", own_run)
    assert "file export-float16-weights/model-float16-weights.onnx is the attacked file" in gate.out


def test_int8_values_keep_a_name_of_their_own(s2ap, own_run) -> None:
    report = exported(s2ap, own_run, "--values", "int8")
    assert report["file"] == "model-int8-weights.onnx"
    assert report["rounding"]["flushed"] >= 0
    assert report["quantization"] is None


def test_a_fixed_batch(s2ap, own_run) -> None:
    report = exported(s2ap, own_run, "--batch", 4)
    file = own_run / "export" / "model.onnx"
    assert (report["batch"], metadata(file)["s2ap.batch"]) == (4, "4")
    running = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert running.get_inputs()[0].shape == [4, 1, 8, 8]
    assert running.run(None, {"image": np.zeros((4, 1, 8, 8), np.float32)})[0].shape == (4, 10)
    s2ap.ok("certify", "--artifact", file, "--run", own_run, "--threads", 1, "--workers", 1)
    decoded = s2ap("decode", file, "--output", own_run.parent / "dense.onnx", "--json")
    assert decoded.answer["max_logit_difference"] == 0


def test_the_usual_settings_leave_a_finished_export_alone(s2ap, own_run) -> None:
    before = (own_run / "manifest.json").read_text()
    s2ap.ok("export", "--values", "float32", "--batch", "dynamic", "--run", own_run)
    stages = json.loads((own_run / "manifest.json").read_text())["stages"]
    assert stages["export"] == json.loads(before)["stages"]["export"]


def test_float16_values_and_int8_arithmetic_exclude_each_other(s2ap, own_run) -> None:
    s2ap.refused(
        "values-with-int8", "export", "--values", "float16", "--int8", "--overwrite", "--run", own_run
    )
