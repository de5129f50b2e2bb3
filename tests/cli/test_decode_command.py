"""``decode``: any file of ours to a dense one, and what it says to anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

Command = Callable[..., Any]


def test_a_real_process_decodes_an_exported_file(finished_run: Path, tmp_path: Path) -> None:
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


def test_people_are_told_what_was_checked(s2ap: Command, finished_run: Path, tmp_path: Path) -> None:
    done = s2ap("decode", finished_run / "export" / "model.onnx", "--output", tmp_path / "dense.onnx")
    assert done.code == 0, done.err
    assert "decode them to the same bits" in done.out
    again = s2ap("decode", tmp_path / "dense.onnx", "--output", tmp_path / "same.onnx")
    assert "none was coded" in again.out
    assert (tmp_path / "same.onnx").read_bytes() == (tmp_path / "dense.onnx").read_bytes()


def test_an_existing_output_is_kept_unless_asked(s2ap: Command, finished_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "dense.onnx"
    output.write_bytes(b"precious")
    arguments = ["decode", finished_run / "export" / "model.onnx", "--output", output]
    refused = s2ap(*arguments)
    assert (refused.code, output.read_bytes()) == (2, b"precious")
    assert "--overwrite" in refused.err
    assert s2ap(*arguments, "--overwrite").code == 0
    assert output.read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "none.onnx", "--output", "d.onnx"], "none.onnx"),
        (["decode", "garbage.onnx", "--output", "d.onnx"], "garbage.onnx is not an ONNX file"),
        (["decode", "empty.onnx", "--output", "d.onnx"], "empty.onnx is not an ONNX file"),
        (["decode", "folder", "--output", "d.onnx"], "cannot read folder"),
        (["decode", "torn.onnx", "--output", "d.onnx"], "torn.onnx"),
        (["decode", "garbage.onnx", "--output", "d.pt"], "cannot tell the format of d.pt"),
        (["decode", "garbage.onnx", "--output", "no/d.onnx"], "there is no folder no"),
        (["decode", "garbage.onnx", "--output", "empty.onnx/d.onnx"], "there is no folder empty.onnx"),
        (["decode", "garbage.onnx"], "Missing option '--output'"),
        (["decode"], "Missing argument"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_cannot_be_decoded(
    arguments: list[str], message: str, as_json: bool, s2ap: Command, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"\x89PNG and more of it")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "torn.onnx").write_bytes((finished_run / "export" / "model.onnx").read_bytes()[:-3000])
    before = sorted(tmp_path.iterdir())
    done = s2ap(*arguments, *(["--json"] if as_json else []), cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    if as_json:
        assert message in json.loads(done.out)["error"]
    assert sorted(tmp_path.iterdir()) == before
