"""``s2ap-deploy compare``: a table for people, one object with --json, exit code 2 for what does not fit."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from s2ap_deploy.cli import tables, verdict_commands
from s2ap_deploy.pruning.masks import save_tensors
from s2ap_deploy.runs.folder import Run

EPOCH = {"clean_accuracy": 0.912, "robust_accuracy": 0.634, "replaced": 0.02, "flip_rate": 0.0123}


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder of three run folders that a search left, of which ``other`` prunes another network."""
    found = {"one": ("a", [0, 1]), "[two]": ("a", [1, 2]), "other": ("b", [0])}
    for name, (layer, ones) in found.items():
        mask = torch.zeros(2, 4, dtype=torch.bool)
        mask.view(-1)[ones] = True
        with Run.open(tmp_path / name, create=True, command="test") as run:
            inputs = {"seed": 0, "prune": {"s2ap": name == "one"}}
            stage = run.stage("search", inputs=inputs, resume=False, overwrite=False)
            save_tensors(stage.folder / "masks.safetensors", {layer: mask})
            last = EPOCH if name == "one" else None
            stage.finish([stage.folder / "masks.safetensors"], {"method": "hydra", "last": last})
    return tmp_path


def test_a_finished_run_beside_itself(s2ap, finished_run) -> None:
    done = s2ap("compare", finished_run, finished_run, "--json")
    assert (done.code, done.err) == (0, "")
    found = done.answer
    assert found["pairs"][0]["hamming"] == 0
    assert found["pairs"][0]["by_chance"] > 0
    run = found["runs"][0]
    assert (run["method"], run["s2ap"], run["kept"]) == ("harp", True, 15_107)
    assert 0 <= run["search"]["robust_accuracy"] <= run["search"]["clean_accuracy"] <= 1
    assert 0 <= run["finetune"]["robust_accuracy"] <= 1
    assert found["note"] in s2ap("compare", finished_run, finished_run).out


def test_the_tables(s2ap, runs) -> None:
    done = s2ap("compare", "one", "[two]", "one", cwd=runs)
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.replace("│", " ").split()) for line in done.out.splitlines()]
    for line in (
        "1 one",
        "2 [two]",
        "1 hydra + S2AP 0 75.00% 91.2% 63.4% 1.23% n/a n/a",
        "2 hydra 0 75.00% n/a n/a n/a n/a n/a",
        "1, 2 25.00% 37.50% 50.0% 0.333",
        "1, 3 0.00% 37.50% 0.0% 1.000",
        "mean 16.67% 37.50% 33.3% 0.556",
    ):
        assert line in lines


def test_a_terminal_of_eighty_columns_clips_nothing(runs, s2ap, monkeypatch) -> None:
    stream = io.StringIO()
    narrow = Console(file=stream, width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(tables, "console", lambda: narrow)
    found = json.loads(s2ap("compare", "one", "one", "--json", cwd=runs).out)
    found["runs"][0]["run"] = "/a/long/path/" + "x" * 100
    found["runs"][0] |= {"method": "magnitude", "finetune": {"clean_accuracy": 1.0, "robust_accuracy": 1.0}}
    verdict_commands.show_comparison(found)
    text = stream.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert "100.0%" in text
    assert "x" * 100 in "".join(line.strip() for line in text.splitlines())


def test_what_cannot_be_compared(s2ap, runs) -> None:
    s2ap.refused("masks-differ", "compare", "one", "other", cwd=runs)
    with Run.open(runs / "begun", create=True, command="test") as run:
        run.stage("search", inputs={}, resume=False, overwrite=False)
    s2ap.refused("stage-unfinished", "compare", "one", "begun", cwd=runs)
