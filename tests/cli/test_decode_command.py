"""``decode``: any file of ours to a dense one, and what it says to anything else."""

import json
import os
import subprocess
import sys

import onnx
from onnx import numpy_helper


def test_a_real_process_decodes_an_exported_file(finished_run, tmp_path) -> None:
    sparse, dense = finished_run / "export" / "model.onnx", tmp_path / "dense.onnx"
    command = [sys.executable, "-m", "s2ap_deploy", "decode", str(sparse), "--output", str(dense), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["bit_equal"], told["max_logit_difference"]) == (True, 0.0)
    assert told["tensors"] > 0
    assert told["bytes"] == dense.stat().st_size > told["source_bytes"] == sparse.stat().st_size
    model = onnx.load(dense)
    onnx.checker.check_model(model, full_check=True)
    assert model.metadata_props == onnx.load(sparse).metadata_props
    zeros = sum(int((numpy_helper.to_array(tensor) == 0).sum()) for tensor in model.graph.initializer)
    assert zeros >= told["entries"] - told["nonzeros"] > 0


def test_people_are_told_what_was_checked(s2ap, finished_run, tmp_path) -> None:
    (tmp_path / "dense.onnx").write_text("old")
    output = ["--output", tmp_path / "dense.onnx", "--overwrite"]
    assert (
        "decode them to the same bits" in s2ap.ok("decode", finished_run / "export/model.onnx", *output).out
    )
    again = s2ap.ok("decode", tmp_path / "dense.onnx", "--output", tmp_path / "same.onnx")
    assert "none was encoded" in again.out
    assert (tmp_path / "same.onnx").read_bytes() == (tmp_path / "dense.onnx").read_bytes()
