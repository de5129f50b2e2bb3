"""Results of the Python interface as tables, on a terminal and in a notebook."""

from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.cli import tables
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.formatting import html_table
from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.stages.results import Certificates, Trained

STAGES: dict[str, Any] = {
    "pretrain": {"best": {"clean_accuracy": 0.97, "robust_accuracy": 0.9}, "validation_images": 130},
    "search": {"kept": 1511, "weights": {"counted": 151_072}},
    "finetune": {"validation_images": 130, "num_classes": 10},
}


@pytest.fixture(scope="module")
def certified(finished_run) -> Certificate:
    return Certificate.load(finished_run / "certify" / "pruned.json")


def trained(clean: float, robust: float, **changes: Any) -> Trained:
    facts: dict[str, Any] = {
        "sparsity": 0.99,
        "stages": STAGES,
        "epochs": {"search": 20, "finetune": 100},
        "seconds": {"pretrain": 65.4, "search": 57.6, "finetune": 7200},
        "threat": "Linf eps 0.1",
        "num_classes": 10,
    }
    return Trained(Path("run"), Path("model.safetensors"), clean, robust, **{**facts, **changes})


def test_the_pruned_network_stands_beside_the_dense_one() -> None:
    assert trained(0.96, 0.88).rows == [
        ("", "dense", "pruned"),
        ("weights", "151,072", "1,511"),
        ("sparsity", "", "99.00%"),
        ("clean accuracy", "97.0%", "96.0%"),
        ("robust accuracy", "90.0%", "88.0%"),
        ("epochs", "", "20 + 100"),
        ("time", "65 s", "58 s + 2.0 h"),
    ]


def test_a_dense_network_has_one_column() -> None:
    dense = trained(
        0.97, 0.9, sparsity=None, stages={"pretrain": STAGES["pretrain"]}, epochs={"pretrain": 40}
    )
    assert dense.rows[0] == ("", "dense")
    assert ("epochs", "40") in dense.rows
    assert not {"sparsity", "weights"} & {row[0] for row in dense.rows}


@pytest.mark.parametrize(
    ("clean", "robust", "words"),
    [
        (0.96, 0.88, []),
        (0.92, 0.849, ["robust accuracy fell by 5.1 points"]),
        (
            0.19,
            0.1,
            ["clean accuracy fell by 78.0", "robust accuracy fell by 80.0", "19.0% clean, where 10.0%"],
        ),
    ],
)
def test_a_large_fall_and_a_guess_are_said_in_words(clean, robust, words, capsys) -> None:
    found = trained(clean, robust)
    assert found.measured.startswith("accuracies on 130 validation images")
    assert len(found.warnings) == len(words)
    for warning, word in zip(found.warnings, words, strict=True):
        assert word in warning
    tables.show_trained(found)
    out = capsys.readouterr().out
    assert all(f"warning: {warning}" in out for warning in found.warnings)
    assert found.measured in out
    assert "20 + 100" in out


def test_a_notebook_shows_tables_of_text_alone(certified) -> None:
    assert html_table([("", "a<b"), ("x", "1")], ["&"]) == (
        "<table><tr><th></th><th>a&lt;b</th></tr><tr><th>x</th><td>1</td></tr></table><p>&amp;</p>"
    )
    assert "<th>pruned</th>" in trained(0.96, 0.88)._repr_html_()
    verdict = Verdict.of([Check(rule="drop", name="drop", status="fail", message="<b>lost</b>")])
    assert "<td>fail</td><td>&lt;b&gt;lost&lt;/b&gt;</td>" in verdict._repr_html_()
    assert "nothing was certified" in Certificates(Path("run"))._repr_html_()
    both = Certificates(Path("run"), dense=certified, pruned=certified)._repr_html_()
    assert f"<tr><th>clean accuracy</th><td>{certified.clean}</td><td>{certified.clean}</td></tr>" in both


def test_a_certificate_prints_on_one_line(certified) -> None:
    assert repr(certified).startswith("Certificate(network: ")
    assert len(repr(certified)) < 400
    assert certified.statement in certified._repr_html_()
