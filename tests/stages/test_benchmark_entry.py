"""An entry for the Adversarial Pruning Benchmark from a run, and runs that it has no place for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.minimum_norm.security_curve import security_curve
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.spec import Normalization
from s2ap_deploy.stages import benchmark_entry
from s2ap_deploy.stages.benchmark_entry import Submission, check_entry, write_entry

SUBMISSION = Submission("S2AP_Piras2025S2AP", "https://arxiv.org/abs/2510.18381")
ASKED = ["--ap-benchmark-entry", "e.json", "--ap-method", SUBMISSION.method, "--ap-paper", SUBMISSION.paper]


@pytest.fixture
def make_job(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``make_job(prune, threat)``: a job on a finished run that says it is of CIFAR-10 and a ResNet-18."""
    curve = security_curve([0.0, 0.01, 0.05, 0.2], norm="Linf", facts={"autoattack_eps": "0.5"})
    curve.save(own_run / "certify" / "pruned-curve.json")
    content = json.loads((own_run / "manifest.json").read_text())
    path = own_run / "certify" / "pruned-curve.json"
    content["stages"]["certify"]["outputs"].append(
        {"path": "certify/pruned-curve.json", "sha256": files.sha256(path), "bytes": path.stat().st_size}
    )
    (own_run / "manifest.json").write_text(json.dumps(content))
    info = SimpleNamespace(
        arch="cifar-resnet18", sparsity=0.9, normalization=Normalization(mean=(0.5,), std=(0.25,))
    )
    monkeypatch.setattr(benchmark_entry, "_pruned", lambda job: info)

    def output(stage: str, name: str) -> Path:
        return own_run / stage / name

    def make(prune: dict[str, Any] | None, threat: dict[str, Any] | None = None) -> Any:
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "model": {"arch": "cifar-resnet18"},
                "data": {"name": "cifar10"},
                "threat": threat or {"eps": "8/255"},
                "pretrain": {"objective": {"loss": "trades"}},
                "prune": prune,
            }
        )
        return SimpleNamespace(recipe=recipe, run=SimpleNamespace(output=output))

    return make


def test_the_entry_of_a_run(make_job: Callable[..., Any], own_run: Path, tmp_path: Path) -> None:
    job = make_job({"sparsity": 0.9, "steps": [0.5], "budget": "global"})
    check_entry(job, SUBMISSION)
    entry = write_entry(job, SUBMISSION, tmp_path / "entry.json")
    assert json.loads((tmp_path / "entry.json").read_text()) == entry
    assert entry["key"] == "S2AP_Piras2025S2AP_R18_CIFAR10_US_90"
    certificate = Certificate.load(own_run / "certify" / "pruned.json")
    assert entry["clean_accuracy"] == f"{100 * certificate.clean.value:.2f}"
    assert entry["robust_accuracy_fmn"] == "50.00"
    assert entry["distances"] == [0.0, 0.01, 0.05, 0.2]
    assert entry["normalization"] == "mean (0.5), std (0.25), inside the model"
    assert "distance at most AutoAttack's eps where AutoAttack broke the image" in entry["deviations"]
    taxonomy = entry["taxonomy"]
    assert taxonomy["A: Pretraining "] == "Adversarial Training (AT) TRADES"
    assert taxonomy["A: OneShot (1S) vs Iterative (IT)"] == "IT"
    assert taxonomy["Pruning locality"] == "Global Pruning (G)"
    told = Submission(SUBMISSION.method, SUBMISSION.paper, "Natural")
    assert write_entry(job, told, tmp_path / "e.json")["taxonomy"]["A: Pretraining "] == "Natural"


@pytest.mark.parametrize(
    ("prune", "threat", "message"),
    [
        (None, None, "needs a pruned network"),
        ({"sparsity": 0.8}, None, "no sparsity 0.8 for US"),
        ({"granularity": "2:4"}, None, "no structure '2:4'"),
        ({"method": "rst", "sparsity": 0.9}, None, "no criterion for rst"),
        ({"sparsity": 0.9}, {"norm": "L2", "eps": "0.5"}, "attacks in Linf, not in L2"),
    ],
)
def test_runs_that_it_has_no_place_for(
    prune: Any, threat: Any, message: str, make_job: Callable[..., Any]
) -> None:
    with pytest.raises(UsageError, match=message):
        check_entry(make_job(prune, threat), SUBMISSION)


def test_channels_count_what_is_removed(make_job: Callable[..., Any]) -> None:
    check_entry(make_job({"granularity": "channel", "keep_ratio": 0.5}), SUBMISSION)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ap-method", "HARP_Zhao2023Holistic"], "--ap-method: only for an entry"),
        (["--ap-benchmark-entry", "e.json"], "needs --ap-method and --ap-paper"),
        (["model.pt", *ASKED], "is for a pruned run"),
        ([*ASKED[:1], "no/e.json", *ASKED[2:]], "there is no folder no"),
        (ASKED, "the benchmark has no architecture 'digits-conv'"),
    ],
)
def test_the_command_refuses_before_any_attack(
    arguments: list[str], message: str, s2ap: Callable[..., Any], own_run: Path
) -> None:
    done = s2ap("certify", *arguments, cwd=own_run.parent)
    assert done.code == 2, done.out
    assert message in done.err
    assert not (own_run.parent / "e.json").exists()
