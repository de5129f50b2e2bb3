"""An entry for the Adversarial Pruning Benchmark from a run, and runs that it has no place for."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.evaluation.security_curve import security_curve
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.spec import Normalization
from s2ap_deploy.stages import benchmark_entry
from s2ap_deploy.stages.benchmark_entry import (
    BenchmarkModel,
    Submission,
    Taxonomy,
    ap_benchmark_entry,
    check_entry,
    write_entry,
)

SUBMISSION = Submission("S2AP_Piras2025S2AP", "https://arxiv.org/abs/2510.18381")


@pytest.fixture
def make_job(own_run, monkeypatch) -> Callable[..., Any]:
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


def test_the_entry_of_a_run(make_job, own_run, tmp_path) -> None:
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
    ("prune", "threat", "code"),
    [
        (None, None, "pruned-network-missing"),
        ({"sparsity": 0.8}, None, "benchmark-model-unknown"),
        ({"granularity": "2:4"}, None, "benchmark-model-unknown"),
        ({"method": "rst", "sparsity": 0.9}, None, "benchmark-taxonomy-unknown"),
        ({"sparsity": 0.9}, {"norm": "L2", "eps": "0.5"}, "benchmark-norm-unsupported"),
    ],
)
def test_runs_that_it_has_no_place_for(prune, threat, code, make_job) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == code):
        check_entry(make_job(prune, threat), SUBMISSION)


def test_channels_count_what_is_removed(make_job) -> None:
    check_entry(make_job({"granularity": "channel", "keep_ratio": 0.5}), SUBMISSION)


CURVE = security_curve([0.0, 0.02, 0.04, math.inf] * 32, norm="Linf")
MODEL = BenchmarkModel("S2AP_Piras2025S2AP", "resnet18", "cifar10", "US", 0.95)
TRADES = "Adversarial Training (AT) TRADES"
TAXONOMY = Taxonomy("https://arxiv.org/abs/2510.18381", pretraining=TRADES, finetuning=TRADES)


def entry_of(**changes: Any) -> dict[str, Any]:
    """An entry, with changes to its model, its taxonomy or its results."""
    results = {"clean": Share.of(8000, 10_000), "autoattack": Share.of(4567, 10_000), "curve": CURVE}
    results |= {"autoattack_eps": "0.031"}
    model = {name: changes.pop(name) for name in vars(MODEL).keys() & changes.keys()}
    taxonomy = {name: changes.pop(name) for name in vars(TAXONOMY).keys() & changes.keys()}
    return ap_benchmark_entry(replace(MODEL, **model), replace(TAXONOMY, **taxonomy), **results | changes)


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        (
            ("HARP_Zhao2023Holistic", "resnet18", "cifar10", "US", 0.99),
            "HARP_Zhao2023Holistic_R18_CIFAR10_US_99",
        ),
        (("PwoA_Jian2022Pruning", "vgg16", "svhn", "S", 0.5), "PwoA_Jian2022Pruning_V16_SVHN_S_50"),
        (
            ("BCSP_Özdenizc2021Training", "vgg16", "svhn", "US", 0.90004),
            "BCSP_Özdenizc2021Training_V16_SVHN_US_90",
        ),
    ],
)
def test_keys(facts, key) -> None:
    assert BenchmarkModel(*facts).key == key


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "HARP"}, "benchmark-method-invalid"),
        ({"method": "a_b2020c_d"}, "benchmark-method-invalid"),
        ({"arch": "wrn28"}, "benchmark-model-unknown"),
        ({"data": "mnist"}, "benchmark-model-unknown"),
        ({"structure": "weights"}, "benchmark-model-unknown"),
        ({"sparsity": 0.5}, "benchmark-model-unknown"),
        ({"sparsity": math.nan}, "benchmark-model-unknown"),
        ({"criterion": "magnitude"}, "benchmark-taxonomy-unknown"),
        ({"locality": "L"}, "benchmark-taxonomy-unknown"),
        ({"curve": security_curve([0.1], norm="L2")}, "benchmark-norm-unsupported"),
        ({"autoattack_eps": "eight"}, "eps-invalid"),
        ({"autoattack_eps": "1/0"}, "eps-invalid"),
    ],
)
def test_what_the_benchmark_does_not_take(change, code) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == code):
        entry_of(**change)


def test_an_entry_has_the_benchmarks_own_field_names() -> None:
    entry = entry_of()
    assert entry["key"] == "S2AP_Piras2025S2AP_R18_CIFAR10_US_95"
    assert list(entry["taxonomy"]) == [
        "link_to_paper",
        "ap_key",
        "Type of Pipeline:",
        "A: Pretraining ",
        "A: Finetuning",
        "A: OneShot (1S) vs Iterative (IT)",
        "Pruning structure",
        "Pruning locality",
        "Pruning criterion",
    ]
    assert entry["taxonomy"]["Pruning criterion"] == "Least Importance Score (LIS)"
    accuracies = [
        entry[f"{name}"] for name in ("clean_accuracy", "robust_accuracy_autoattack", "robust_accuracy_fmn")
    ]
    assert accuracies == ["80.00", "45.67", "50.00"]
    assert entry["distances"][:4] == [0.0, 0.02, 0.04, None]
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_an_entry_admits_where_it_differs_from_the_benchmarks_evaluation() -> None:
    same = entry_of()["deviations"]
    assert same == ["FMN of s2ap-deploy instead of HO-FMN", "distance null where nothing was found, not 0"]
    assert entry_of(autoattack_eps="31/1000")["deviations"] == same
    few = Share.of(40, 100)
    other = {
        "autoattack_eps": "8/255",
        "autoattack": few,
        "clean": few,
        "curve": security_curve([0.1], norm="Linf"),
    }
    assert entry_of(**other)["deviations"][2:] == [
        "AutoAttack at eps 8/255 instead of 0.031",
        "AutoAttack on 100 images instead of 10,000",
        "clean accuracy on 100 images instead of 10,000",
        "FMN on 1 images instead of 128",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HARP_Zhao2023Holistic_R18_CIFAR10_US_99.pt", ("resnet18", "cifar10", "US", 0.99)),
        ("FlyingBird+_Chen2022Sparsity_V16_SVHN_US_90_best.pth.tar", ("vgg16", "svhn", "US", 0.9)),
        ("PwoA_Jian2022Pruning_R18_CIFAR10_S_50", ("resnet18", "cifar10", "S", 0.5)),
        ("HARP_Zhao2023Holistic_R18_CIFAR10_US_990.pt", None),
        ("model.pt", None),
        ("Wong2020Fast_R18_CIFAR10_US_90.pt", None),
    ],
)
def test_the_names_of_published_files_are_read(name, expected) -> None:
    found = BenchmarkModel.of_file(name)
    if expected is None:
        assert found is None
        return
    assert (found.arch, found.data, found.structure, found.sparsity) == expected
    if "+" not in name:
        assert name.startswith(found.key)
