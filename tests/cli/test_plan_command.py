"""``plan`` and ``targets`` as they are typed, and ``export --target`` on a real run."""

import json
import re

import yaml

from s2ap_deploy.codecs.registry import ENCODINGS
from s2ap_deploy.recipe import target

CHANNELS = ["plan", "--arch", "digits-conv", "--granularity", "channel"]


def test_a_plan_for_a_name(s2ap) -> None:
    done = s2ap("plan", "--arch", "digits-conv", "--sparsity", 0.9, "--budget", "erk")
    assert (done.code, done.err) == (0, "")
    for words in ("15,107 of 151,072", "445,696", "none: zeros shrink the file", "Elias-Fano", "int8"):
        assert words in done.out


def test_a_plan_for_a_file_is_that_of_its_architecture(s2ap, digits_model) -> None:
    asked = ["--sparsity", 0.9, "--json"]
    one = json.loads(s2ap("plan", digits_model, *asked).out)
    two = json.loads(s2ap("plan", "--arch", "digits-conv", *asked).out)
    assert one == two
    assert {row["encoding"] for row in one["files"]} == set(ENCODINGS)
    assert one["nonzeros"] == 15_107


def test_budgets_are_told_and_a_miss_is_no_failure(s2ap) -> None:
    words = ["--keep-ratio", 0.5, "--align", 8, "--target", "microcontroller"]
    done = s2ap.ok(*CHANNELS, *words, "--max-bytes", 60_000, "--max-macs", 1, "--max-latency-ms", 3)
    assert "✓ bytes: at most 60,000" in done.out
    assert "✗ multiply-accumulates: at most 1" in done.out
    assert "? milliseconds: at most 3.0, measured when it is exported" in done.out
    assert "compact and int8" in done.out


def test_targets_are_listed_and_shown(s2ap, tmp_path) -> None:
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


def test_export_for_a_target_and_what_the_run_remembers(s2ap, own_run, without_stages) -> None:
    run = without_stages(own_run, "export")
    answer = s2ap.json("export", "--target", "opencv", "--opset", 21, "--max-bytes", 10**6, "--run", run)
    assert (answer["opset"], answer["encoding"], answer["batch"]) == (21, "dense", 1)
    assert answer["target"] == {"name": "opencv", "sha256": target.find("opencv").sha256}
    assert answer["budgets"] == [{"what": "bytes", "asked": 10**6, "found": answer["bytes"]}]
    assert answer["predicted"]["bytes"] > 0
    kept = yaml.safe_load((run / "recipe.yaml").read_text())["export"]
    assert (kept["target"], kept["opset"], kept["batch"]) == ("opencv", 21, 1)
    same = s2ap.ok("export", "--run", run)
    assert "already done with the same inputs" in same.err
    assert re.search(r"^target +opencv\b", same.out, re.M)
    assert re.search(r"^budget +bytes: at most 1,000,000, found \d", same.out, re.M)


def test_a_missed_budget_is_exit_code_1_and_leaves_no_file(s2ap, own_run, tmp_path, without_stages) -> None:
    copy = tmp_path / "copy.onnx"
    done = s2ap(
        "export", "--max-bytes", 1000, "--output", copy, "--run", without_stages(own_run, "export"), "--json"
    )
    assert done.code == 1
    assert "at most 1,000 allowed, found" in done.answer["error"]
    assert not copy.exists()
    assert not list((own_run / "export").glob("*.onnx"))
    assert not (own_run / "export" / "report.json").exists()
    s2ap.ok("export", "--max-bytes", 10**6, "--overwrite", "--run", own_run)


def test_none_takes_the_target_back(s2ap, own_run) -> None:
    assert s2ap("export", "--target", "openvino", "--overwrite", "--run", own_run).code == 0
    done = s2ap.ok("export", "--target", "none", "--overwrite", "--json", "--run", own_run)
    assert done.answer["target"] is None
    assert yaml.safe_load((own_run / "recipe.yaml").read_text())["export"]["target"] is None
