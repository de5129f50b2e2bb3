"""SARIF: valid against the OASIS schema, with paths that are relative and escaped."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.reporting.ci_formats import sarif

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "sarif-2.1.0-rtm.5.json").read_text())


def validated(verdict: Verdict, folder: Path) -> dict[str, Any]:
    log = json.loads(sarif(verdict, folder))
    jsonschema.Draft4Validator(SCHEMA, format_checker=jsonschema.FormatChecker()).validate(log)
    (run,) = log["runs"]
    found: dict[str, Any] = run
    return found


def uris(run: dict[str, Any]) -> list[str]:
    return [
        result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in run["results"]
    ]


def test_what_did_not_pass_becomes_a_result(verdict, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = validated(verdict, Path("s2ap-run"))
    assert [result["level"] for result in run["results"]] == ["error", "warning", "warning"]
    assert [result["ruleId"] for result in run["results"]] == ["robust-accuracy", "file", "class-drop"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    assert run["invocations"] == [{"executionSuccessful": True, "exitCode": 1}]
    assert run["results"][0]["properties"] == {"threshold": 0.4, "observed": 0.05, "bound": 0.03}
    assert uris(run)[0] == uris(run)[2] == "s2ap-run/gate/verdict.json"
    assert uris(run)[1].startswith("s2ap-run/x%5D%5D%3E")
    assert uris(run)[1].isascii()


def test_a_run_folder_elsewhere_leaves_no_machine_path(verdict, tmp_path) -> None:
    text = sarif(verdict, tmp_path)
    assert str(tmp_path) not in text
    assert uris(validated(verdict, tmp_path))[0] == "gate/verdict.json"


def test_a_check_of_a_file_points_at_it(tmp_path) -> None:
    paths = ["export/model.onnx", "export/a b.onnx", "export/of.onnx", None]
    checks = [
        Check(rule="size", name=f"size {path}", status="fail", message="too large", path=path)
        for path in paths
    ]
    assert uris(validated(Verdict.of(checks), tmp_path)) == [
        "export/model.onnx", "export/a%20b.onnx", "export/of.onnx", "gate/verdict.json"
    ]  # fmt: skip


def test_fingerprints_stay_the_same_from_run_to_run_and_differ_from_check_to_check(verdict, tmp_path) -> None:
    better = verdict.checks[1].model_copy(update={"message": "20 of 200"})
    prints = [
        [result["partialFingerprints"]["check/v1"] for result in validated(each, tmp_path)["results"]]
        for each in (verdict, Verdict.of([better, *verdict.checks[2:]]))
    ]
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == 3


def test_an_input_that_cannot_be_used_is_a_run_that_failed(tmp_path) -> None:
    check = Check(rule="gate", name="gate", status="inconclusive", message="there is no run")
    run = validated(Verdict(status="inconclusive", exit_code=2, checks=(check,)), tmp_path)
    assert run["invocations"] == [{"executionSuccessful": False, "exitCode": 2}]
    assert run["results"][0]["ruleId"] == "gate"


def test_a_pass_has_no_results(tmp_path) -> None:
    passed = Verdict.of([Check(rule="size", name="size", status="pass", message="small")])
    assert validated(passed, tmp_path)["results"] == []
