"""Entries for the Adversarial Pruning Benchmark: its keys, its field names, and what an entry must admit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.minimum_norm.ap_benchmark import ap_benchmark_entry, model_key
from s2ap_deploy.evaluation.minimum_norm.security_curve import security_curve
from s2ap_deploy.evaluation.samples import Share

CURVE = security_curve([0.0, 0.02, 0.04, math.inf] * 32, norm="Linf")
FACTS: dict[str, Any] = {
    "method": "S2AP_Piras2025S2AP",
    "arch": "resnet18",
    "data": "cifar10",
    "structure": "US",
    "sparsity": 0.95,
    "clean": Share.of(8000, 10_000),
    "autoattack": Share.of(4567, 10_000),
    "autoattack_eps": "0.031",
    "curve": CURVE,
    "paper": "https://arxiv.org/abs/2510.18381",
    "pretraining": "Adversarial Training (AT) TRADES",
    "finetuning": "Adversarial Training (AT) TRADES",
}


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
def test_keys(facts: tuple[str, str, str, str, float], key: str) -> None:
    method, arch, data, structure, sparsity = facts
    assert model_key(method, arch=arch, data=data, structure=structure, sparsity=sparsity) == key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "HARP"}, "HARP_Zhao2023Holistic"),
        ({"method": "a_b2020c_d"}, "no method"),
        ({"arch": "wrn28"}, "architecture"),
        ({"data": "mnist"}, "data set"),
        ({"structure": "weights"}, "structure"),
        ({"sparsity": 0.5}, "sparsity 0.5 for US"),
        ({"sparsity": math.nan}, "sparsity nan"),
        ({"criterion": "magnitude"}, "criterion"),
        ({"locality": "L"}, "locality"),
        ({"curve": security_curve([0.1], norm="L2")}, "Linf"),
        ({"autoattack_eps": "eight"}, "eps"),
        ({"autoattack_eps": "1/0"}, "eps"),
    ],
)
def test_what_the_benchmark_has_no_place_for(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ap_benchmark_entry(**{**FACTS, **change})
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_an_entry_has_the_benchmarks_own_field_names() -> None:
    entry = ap_benchmark_entry(**FACTS)
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
    same = ap_benchmark_entry(**FACTS)["deviations"]
    assert same == ["FMN of s2ap-deploy instead of HO-FMN", "distance null where nothing was found, not 0"]
    assert ap_benchmark_entry(**{**FACTS, "autoattack_eps": "31/1000"})["deviations"] == same
    few = Share.of(40, 100)
    other = {
        "autoattack_eps": "8/255",
        "autoattack": few,
        "clean": few,
        "curve": security_curve([0.1], norm="Linf"),
    }
    assert ap_benchmark_entry(**{**FACTS, **other})["deviations"][2:] == [
        "AutoAttack at eps 8/255 instead of 0.031",
        "AutoAttack on 100 images instead of 10,000",
        "clean accuracy on 100 images instead of 10,000",
        "FMN on 1 images instead of 128",
    ]
