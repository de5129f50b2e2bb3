"""A run in one object."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.reporting.ci_formats import summarize
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.stages.gate import gate


def summary(folder: Path, policy: Thresholds | None = None) -> dict[str, Any]:
    with Run.open(folder, create=False, command="test") as run:
        return summarize(run, gate(run, policy) if policy is not None else None)


def test_everything_of_a_finished_run(own_run) -> None:
    found = summary(own_run, Thresholds(min_robust=0.4))
    assert json.loads(json.dumps(found)) == found
    assert found["formal_guarantee"] is False
    assert "upper bound" in found["statement"]
    assert found["threat"] == "Linf eps 0.5"
    assert found["gate"]["status"] == "fail"
    assert found["dense"]["sparsity"] == 0.0
    assert found["pruned"]["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert found["dense"]["n"] == found["pruned"]["n"] == 40
    assert found["pruned"]["bytes"] == (own_run / "export" / "model.onnx").stat().st_size
    assert found["dense"]["bytes"] > 4 * 151_072
    assert found["search"]["kept"] == 15_107
    assert set(found["seconds"]) >= {"pretrain", "search", "finetune", "certify", "export"}


def test_what_was_not_run_is_absent(own_run, without_stages) -> None:
    found = summary(without_stages(own_run, "certify", "export"))
    assert found.keys() == {"run", "seconds", "search"}


def test_a_file_that_changed_is_not_summed_up(own_run) -> None:
    (own_run / "export" / "report.json").write_text("{}")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "output-damaged"):
        summary(own_run)
