"""``--dry-run``: the plan with what is done, times and bytes; not a byte is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.recipe import catalog

QUIET = ["--threads", 1, "--workers", 1, "--quiet"]
TINY = [
    "--set", "model.checkpoint=model.pt", "--set", "certify.n=4", "--set", "certify.version=quick",
    "--set", "prune.search.objective={loss: fast}", "--set", "prune.finetune.objective={loss: fast}",
]  # fmt: skip


def states(outlook: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in outlook["stages"]}


@pytest.fixture
def place(digits_model, tmp_path) -> Path:
    (tmp_path / "model.pt").write_bytes(digits_model.read_bytes())
    return tmp_path


def test_a_fresh_run(place, s2ap, files_in) -> None:
    before = files_in(place)
    done = s2ap("run", "demo", *TINY, *QUIET, "--dry-run", "--json", cwd=place)
    assert done.code == 0, done.err
    outlook = json.loads(done.out)
    assert set(states(outlook).values()) == {"to do"}
    assert list(states(outlook)) == ["pretrain", "search", "finetune", "certify", "export", "gate"]
    times = {stage["name"]: stage["seconds"] for stage in outlook["stages"]}
    assert times["search"] > 0
    assert times["finetune"] > 0
    assert times["certify"] > 0
    assert times["export"] is None
    assert outlook["seconds"] == pytest.approx(sum(each or 0 for each in times.values()))
    assert 0 < outlook["bytes"] < outlook["dense_bytes"]
    assert files_in(place) == before
    assert not (place / "s2ap-run").exists()


def test_the_demo_leaves_the_folder_of_the_other_commands_free(place, s2ap) -> None:
    done = s2ap("demo", *TINY, *QUIET, "--dry-run", "--json", cwd=place)
    assert done.code == 0, done.err
    assert json.loads(done.out)["run"] == "s2ap-demo"


def test_more_epochs_take_longer_in_proportion(place, s2ap) -> None:
    axes = ["--s2ap", "off", "--sparsity", "0.9"]

    def seconds(epochs: int) -> float:
        asked = ["--set", f"prune.finetune.epochs={epochs}", "--set", "prune.method=random"]
        done = s2ap("sweep", "demo", *TINY, *asked, *axes, *QUIET, "--dry-run", "--json", cwd=place)
        (only,) = json.loads(done.out)["combinations"]
        found: float = next(stage["seconds"] for stage in only["stages"] if stage["name"] == "finetune")
        return found

    assert seconds(500) > 5 * seconds(5)


def test_what_is_done_is_said_and_left_alone(own_run, s2ap, files_in, digits_model) -> None:
    before = files_in(own_run)
    asked = ["run", own_run / "recipe.yaml", "--run", own_run, *QUIET, "--dry-run"]
    done = s2ap(*asked, "--json")
    assert done.code == 0, done.err
    outlook = json.loads(done.out)
    assert set(states(outlook).values()) == {"done"}
    assert outlook["seconds"] == 0
    changed = json.loads(s2ap(*asked, "--set", "prune.finetune.epochs=2", "--json").out)
    assert states(changed) == {
        "pretrain": "done", "search": "done", "finetune": "refused", "certify": "to do", "export": "to do"
    }  # fmt: skip
    assert any("finetune.epochs: 1 → 2" in note and "--overwrite" in note for note in changed["notes"])
    (own_run / "export" / "model.onnx").write_bytes(b"x")
    damaged = json.loads(s2ap(*asked, "--json").out)
    assert states(damaged)["export"] == "to repeat"
    assert any("model.onnx has changed since" in note for note in damaged["notes"])
    (own_run / "export" / "model.onnx").write_bytes(before["export/model.onnx"])
    assert files_in(own_run) == before


def test_prune_tells_its_own_stages(place, s2ap) -> None:
    asked = ["model.pt", "--sparsity", 0.9, "--steps", "0.5", "--loss", "fast", "--search-epochs", 2]
    done = s2ap("prune", *asked, "--threads", 1, "--quiet", "--dry-run", cwd=place)
    assert done.code == 0, done.err
    assert "search" in done.out
    assert "certify" not in done.out
    assert "predicted from shapes" in done.out
    assert "nothing was written" in done.out
    assert not (place / "s2ap-run").exists()


def test_a_sweep_tells_every_combination(place, s2ap) -> None:
    axes = ["--method", "hydra,random", "--s2ap", "both", "--sparsity", "0.5,0.9"]
    done = s2ap("sweep", "demo", *TINY, *axes, *QUIET, "--dry-run", "--json", cwd=place)
    assert done.code == 0, done.err
    outlook = json.loads(done.out)
    assert [each["name"] for each in outlook["shared"]] == ["demo/dense-seed-0"]
    assert len(outlook["combinations"]) == 6
    assert sorted(outlook["skipped"]) == ["random-s2ap-0.5-seed-0", "random-s2ap-0.9-seed-0"]
    sizes = {each["name"]: each["bytes"] for each in outlook["combinations"]}
    assert sizes["hydra-s2ap-0.9-seed-0"] < sizes["hydra-s2ap-0.5-seed-0"]
    by_name = {each["name"]: each["seconds"] for each in outlook["combinations"]}
    assert by_name["random-plain-0.9-seed-0"] < by_name["hydra-s2ap-0.9-seed-0"]
    assert list(place.iterdir()) == [place / "model.pt"]


def test_absent_data_cost_the_times_and_not_the_plan(tmp_path, s2ap) -> None:
    done = s2ap(
        "run", "mnist", *QUIET, "--data-root", tmp_path / "none", "--download", "--dry-run", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "no times, as the data set is not available" in done.out
    assert "predicted from shapes" in done.out
    assert list(tmp_path.iterdir()) == []


def test_unknown_times_are_not_said_to_be_none(tmp_path, s2ap) -> None:
    done = s2ap("run", "mnist", "--data-root", tmp_path, "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "how long pretrain, search, finetune, certify would take is unknown" in " ".join(done.out.split())
    assert "0 s" not in done.out


def test_a_folder_that_the_run_could_not_use_is_refused(place, s2ap) -> None:
    done = s2ap("run", "demo", *TINY, *QUIET, "--run", place, "--dry-run")
    assert done.code == 2
    assert "has other files and is not a run folder" in done.err
    done = s2ap("run", "demo", *TINY, *QUIET, "--run", place / "model.pt", "--dry-run")
    assert done.code == 2
    assert "is a file, not a run folder" in done.err


def test_the_demo_takes_it_too(tmp_path, s2ap) -> None:
    done = s2ap(
        "demo",
        "--set",
        "certify.n=4",
        "--set",
        "certify.version=quick",
        *QUIET,
        "--dry-run",
        "--json",
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["name"] == catalog.load("demo").name
    assert list(tmp_path.iterdir()) == []
