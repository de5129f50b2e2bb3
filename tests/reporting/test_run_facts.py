"""The facts of a run: complete, or with a sentence for what is not there, and never changed by reading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.reporting.report import page
from s2ap_deploy.reporting.run_facts import collect, number
from s2ap_deploy.runs.folder import Run


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
    assert facts.problems == ()
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
