"""``plan`` and ``targets`` as they are typed, and ``export --target`` on a real run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2ap_deploy.recipe import target

CHANNELS = ["plan", "--arch", "digits-conv", "--granularity", "channel"]


def test_a_plan_for_a_name(s2ap: Callable[..., Any]) -> None:
    done = s2ap("plan", "--arch", "digits-conv", "--sparsity", 0.9, "--budget", "erk")
    assert (done.code, done.err) == (0, "")
    for words in ("15,107 of 151,072", "445,696", "none: zeros shrink the file", "Elias-Fano", "int8"):
        assert words in done.out


def test_a_plan_for_a_file_is_that_of_its_architecture(s2ap: Callable[..., Any], digits_model: Path) -> None:
    asked = ["--sparsity", 0.9, "--json"]
    one = json.loads(s2ap("plan", digits_model, *asked).out)
    two = json.loads(s2ap("plan", "--arch", "digits-conv", *asked).out)
    assert one == two
    assert {row["encoding"] for row in one["files"]} == {"auto", "dense", "ef", "gaps", "mask", "coo"}
    assert one["nonzeros"] == 15_107


def test_a_plan_in_a_process_of_its_own_prints_one_object() -> None:
    words = ["plan", "--arch", "digits-conv", "--sparsity", "0.9", "--target", "openvino", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "s2ap_deploy", *words], capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["target"] == {"name": "openvino", "sha256": target.find("openvino").sha256}
    assert answer["chosen"]["encoding"] == "auto"


def test_budgets_are_told_and_a_miss_is_no_failure(s2ap: Callable[..., Any]) -> None:
    words = ["--keep-ratio", 0.5, "--align", 8, "--target", "microcontroller"]
    done = s2ap(*CHANNELS, *words, "--max-bytes", 60_000, "--max-macs", 1, "--max-latency-ms", 3)
    assert done.code == 0
    assert "✓ bytes: at most 60,000" in done.out
    assert "✗ multiply-accumulates: at most 1" in done.out
    assert "? milliseconds: at most 3.0, measured when it is exported" in done.out
    assert "compact and int8" in done.out


def test_targets_are_listed_and_shown(s2ap: Callable[..., Any], tmp_path: Path) -> None:
    plain, listed = s2ap("targets"), s2ap("targets", "list")
    assert plain == listed
    assert plain.code == 0
    assert json.loads(s2ap("targets", "list", "--json").out) == json.loads(s2ap("targets", "--json").out)
    shown = s2ap("targets", "show", "openvino")
    assert yaml.safe_load(shown.out)["name"] == "openvino"
    (tmp_path / "board.yaml").write_text(shown.out)  # what is printed can be edited and used
    answer = json.loads(s2ap("targets", "show", "board.yaml", "--json", cwd=tmp_path).out)
    assert answer["sha256"] == target.find("openvino").sha256
    for name in target.names():
        assert f"{name} " in listed.out


def again(run: Path) -> Path:
    """The run, as if export had not been called."""
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["export"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(run / "export")
    return run


def test_export_for_a_target_and_what_the_run_remembers(s2ap: Callable[..., Any], own_run: Path) -> None:
    run = again(own_run)
    done = s2ap("export", "--target", "coreml", "--opset", 21, "--max-bytes", 10**6, "--json", "--run", run)
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert (answer["opset"], answer["encoding"], answer["batch"]) == (21, "dense", 1)
    assert answer["target"] == {"name": "coreml", "sha256": target.find("coreml").sha256}
    assert answer["budgets"] == [{"what": "bytes", "asked": 10**6, "found": answer["bytes"]}]
    assert answer["predicted"]["bytes"] > 0
    kept = yaml.safe_load((run / "recipe.yaml").read_text())["export"]
    assert (kept["target"], kept["opset"], kept["batch"]) == ("coreml", 21, 1)
    same = s2ap("export", "--run", run)
    assert same.code == 0
    assert "already done with the same inputs" in same.err
    assert re.search(r"^target +coreml\b", same.out, re.M)
    assert re.search(r"^budget +bytes: at most 1,000,000, found \d", same.out, re.M)


def test_a_missed_budget_is_exit_code_1_and_leaves_no_file(
    s2ap: Callable[..., Any], own_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.onnx"
    done = s2ap("export", "--max-bytes", 1000, "--output", copy, "--run", again(own_run), "--json")
    assert done.code == 1
    assert "at most 1,000 allowed, found" in json.loads(done.out)["error"]
    assert not copy.exists()
    assert not list((own_run / "export").glob("*.onnx"))
    assert not (own_run / "export" / "report.json").exists()
    more = s2ap("export", "--max-bytes", 10**6, "--overwrite", "--run", own_run)
    assert more.code == 0, more.err


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--target", "tensorrt-2-4"], "needs weights of the pattern 2:4", "prune --granularity 2:4"),
        (["--target", "microcontroller"], "needs a limit on the bytes", "--max-bytes"),
        (["--target", "microcontroller", "--values", "float16"], "takes int8, not float16", "--int8"),
        (["--target", "openvino", "--encoding", "coo"], "not coo", "leave --encoding out"),
        (["--target", "opnvino"], "did you mean openvino?", "your own file"),
    ],
)
def test_what_a_target_cannot_take_leaves_the_run_as_it_was(
    s2ap: Callable[..., Any],
    own_run: Path,
    files_in: Callable[[Path], dict[str, bytes]],
    words: list[str],
    message: str,
    hint: str,
) -> None:
    before = files_in(own_run)
    done = s2ap("export", *words, "--overwrite", "--run", own_run)
    assert done.code == 2
    assert message in done.err
    assert hint in done.err
    after = files_in(own_run)
    assert {name for name in before if before[name] != after.get(name)} <= {"manifest.json", ".lock"}


def test_none_takes_the_target_back(s2ap: Callable[..., Any], own_run: Path) -> None:
    assert s2ap("export", "--target", "openvino", "--overwrite", "--run", own_run).code == 0
    done = s2ap("export", "--target", "none", "--overwrite", "--json", "--run", own_run)
    assert done.code == 0, done.err
    assert json.loads(done.out)["target"] is None
    assert yaml.safe_load((own_run / "recipe.yaml").read_text())["export"]["target"] is None
