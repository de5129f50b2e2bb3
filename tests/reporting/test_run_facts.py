"""The facts of a run: complete, or with a sentence for what is not there, and never changed by reading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.reporting import run_facts
from s2ap_deploy.reporting.report import page
from s2ap_deploy.reporting.run_facts import collect, number
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.runs.manifest import Manifest


def test_a_real_run(finished_run, files_in) -> None:
    before = files_in(finished_run)
    facts = collect(finished_run)
    assert files_in(finished_run) == before
    assert set(facts.missing) == {"verdict", "curve"}
    assert set(facts.certificates) == set(facts.hashes) == {"dense", "pruned"}
    assert sum(layer.kept for layer in facts.layers) == 15_107
    assert len(facts.histories["search"]) == 1
    assert facts.pairs is not None
    assert list(facts.exports) == ["export"]
    assert len(facts.shown) == 12
    assert all(set(shown.answers) == {"dense", "pruned"} for shown in facts.shown)
    assert facts.problems == facts.doubts == ()
    assert collect(finished_run, images=0).shown == ()


def test_a_folder_without_a_run(tmp_path) -> None:
    with pytest.raises(RunFolderError, check=lambda error: error.code == "run-missing"):
        collect(tmp_path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "certify/pruned.json": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "certify/pruned-points.safetensors": lambda path: path.unlink(),
    "search/history.json": lambda path: path.write_text("[1]"),
    "export/report.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_is_not_the_recorded_one_is_left_out_and_named(name, own_run) -> None:
    DAMAGES[name](own_run / name)
    facts = collect(own_run)
    assert [problem for problem in facts.problems if problem.startswith(name)]
    assert name in page.render_page(facts)
    assert "therefore omitted" in page.render_card(facts)


def rewritten(path: Path) -> None:
    """Turn a verdict into a pass, and let the manifest list its new hash."""
    manifest = path.parents[1] / "manifest.json"
    before, verdict = files.sha256(path), json.loads(path.read_text())
    for check in verdict["checks"]:
        check["status"] = "pass"
    path.write_text(json.dumps({**verdict, "status": "pass", "exit_code": 0}))
    manifest.write_text(manifest.read_text().replace(before, files.sha256(path)))


TAMPERINGS: dict[str, Callable[[Path], Any]] = {
    "search/masks.safetensors": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "certify/recipe.yaml": lambda path: path.unlink(),
    "export/model.onnx": lambda path: path.unlink(),
    "old/model.onnx.bak": lambda path: (path.parent.mkdir(), path.write_bytes(b"x")),
    "gate/verdict.json": rewritten,
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_folder_has_no_clean_report(name, own_run, s2ap) -> None:
    """What gate and verify find across files, the report says as well, and it shows no pass."""
    floor = 1 if name == "gate/verdict.json" else 0
    s2ap("gate", "--min-clean", floor, "--rule", "point", "--run", own_run)
    assert collect(own_run).doubts == ()
    TAMPERINGS[name](own_run / name)
    facts = collect(own_run)
    assert [doubt for doubt in facts.doubts if name in doubt]
    assert facts.verdict is None
    for text in (page.render_page(facts), page.render_card(facts)):
        assert "Not confirmed by the files as they are now" in text


def test_a_stage_cut_out_of_the_manifest_is_in_the_report(own_run) -> None:
    content = json.loads((own_run / "manifest.json").read_text())
    del content["stages"]["export"]
    (own_run / "manifest.json").write_text(json.dumps(content))
    assert any("stage export" in doubt for doubt in collect(own_run).doubts)


@pytest.mark.parametrize(
    "content", ["[1]", "{}", "nonsense", '[{"loss": NaN}]', '[{"loss": [], "epoch": "x"}]']
)
def test_a_recorded_file_of_nonsense(content, tmp_path) -> None:
    with Run.open(tmp_path / "run", create=True, command="test") as run:
        stage = run.stage("search", inputs={"prune": 3, "threat": []}, resume=False, overwrite=False)
        (stage.folder / "history.json").write_text(content)
        layers = [{"name": "a", "kept": 3, "weights": 0}, 7, {"kept": "1", "weights": 2}]
        stage.finish([stage.folder / "history.json"], {"layers": layers})
    facts = collect(tmp_path / "run")
    assert facts.layers == ()
    assert page.render_page(facts)
    if "epoch" in content:
        assert facts.histories["search"] == ({"loss": None, "epoch": None},)
    else:
        assert any("history" in problem for problem in facts.problems)


def test_an_unfinished_stage_counts_for_nothing(tmp_path) -> None:
    with Run.open(tmp_path / "run", create=True, command="test") as run:
        run.stage("search", inputs={}, resume=False, overwrite=False)
    assert "This folder has no finished mask search" in collect(tmp_path / "run").missing["density"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.5, 0.5), (True, None), ("1", None), (None, None), (float("nan"), None), (10**400, None)],
)
def test_number(value, expected) -> None:
    assert number(value) == expected
    assert json.dumps(number(value))


@pytest.mark.parametrize(
    ("environment", "rows"),
    [
        ({}, {}),
        ({"GITHUB_ACTIONS": "true"}, {}),
        (
            {
                "GITHUB_ACTIONS": "true",
                "GITHUB_SHA": "abc",
                "GITHUB_SERVER_URL": "https://host",
                "GITHUB_REPOSITORY": "me/mine",
                "GITHUB_RUN_ID": "7",
            },
            {"Commit": "abc", "CI run": "https://host/me/mine/actions/runs/7"},
        ),
        (
            {"GITLAB_CI": "true", "CI_COMMIT_SHA": "abc", "CI_JOB_URL": "https://host/job/7"},
            {"Commit": "abc", "CI run": "https://host/job/7"},
        ),
    ],
)
def test_a_report_says_when_and_where_it_was_made(finished_run, environment, rows) -> None:
    contents = Manifest.load(finished_run)
    found = run_facts._origin(contents, environment)
    assert found.pop("s2ap-deploy") == contents.tool_version
    assert "T" not in found.pop("Finished", "").replace("UTC", "")
    assert found == rows
