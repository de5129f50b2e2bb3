"""Certificates of attacks that stopped early: no reader can take them for full ones."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import ClassInterval, ClassRow, EarlyDecision, Interval, Share

Make = Callable[..., Certificate]


@pytest.fixture
def early(make_certificate) -> Certificate:
    """Ten samples: two settled, five undecided, three broken."""
    decision = EarlyDecision(
        decided="fail", policy={"min_robust": 0.8}, rule="point", undecided=(2, 3, 4, 5, 6)
    )
    return make_certificate([None] * 7 + ["apgd-t"] * 3, decision=decision)


def test_it_claims_an_interval_and_no_value(early) -> None:
    assert early.robust == Interval.of(2, 7, 10)
    assert str(early.robust) == "between 20.0% and 70.0%"
    assert early.survivors == (2, 7)
    assert early.robustness == (True,) * 2 + (None,) * 5 + (False,) * 3
    assert [type(row) for row in early.per_class] == [ClassInterval] * 2
    written = json.loads(early.text())
    assert not {"value", "k", "interval"} & written["robust"].keys()
    assert not any("robust" in row for row in written["per_class"])
    assert [sample["broken_by"] for sample in written["samples"]].count(None) == 2


def test_it_is_read_as_it_was_written(early, tmp_path) -> None:
    early.save(tmp_path / "early.json")
    again = Certificate.load(tmp_path / "early.json")
    assert again == early
    assert again.sha256 == early.sha256


def test_full_certificates_keep_their_text(make_certificate) -> None:
    full = make_certificate([None] * 7 + ["apgd-t"] * 3)
    assert isinstance(full.robust, Share)
    assert isinstance(full.per_class[0], ClassRow)
    assert (full.survivors, full.robustness.count(None)) == ((7, 7), 0)
    assert json.loads(full.text())["decision"] is None
    assert "undecided" not in full.text()


def without_decision(content: dict[str, Any]) -> None:
    del content["decision"]


def with_a_figure(content: dict[str, Any]) -> None:
    content["robust"] = Share.of(7, 10).model_dump(mode="json")


def with_class_figures(content: dict[str, Any]) -> None:
    for row in content["per_class"]:
        row["robust"] = row.pop("possible")
        del row["settled"]


def with_more_settled(content: dict[str, Any]) -> None:
    content["robust"] |= {"settled": 3, "low": 0.3}


def with_fewer_undecided(content: dict[str, Any]) -> None:
    content["decision"]["undecided"] = content["decision"]["undecided"][:-1]


def with_a_sample_settled(content: dict[str, Any]) -> None:
    content["samples"][2]["broken_by"] = None


def with_none_undecided(content: dict[str, Any]) -> None:
    content["decision"]["undecided"] = []


def turned_around(content: dict[str, Any]) -> None:
    content["robust"] = {"settled": 7, "possible": 2, "n": 10, "low": 0.7, "high": 0.2}


@pytest.mark.parametrize(
    "change",
    [
        without_decision, with_a_figure, with_class_figures, with_more_settled, with_fewer_undecided,
        with_a_sample_settled, with_none_undecided, turned_around,
    ],
)  # fmt: skip
def test_what_contradicts_the_samples_is_refused(early, tmp_path, change) -> None:
    content = json.loads(early.text())
    change(content)
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(InputError):
        Certificate.load(tmp_path / "changed.json")


def test_a_full_certificate_cannot_be_dressed_as_an_early_one(make_certificate) -> None:
    content = json.loads(make_certificate([None] * 10).text())
    content["decision"] = {"decided": "pass", "policy": {}, "rule": "point", "undecided": [0]}
    with pytest.raises(ValidationError, match="decision, robust, per_class does not follow"):
        Certificate.model_validate(content)


@pytest.mark.parametrize("index", [-1, 10])
def test_undecided_samples_exist(make_certificate, index) -> None:
    decision = EarlyDecision(decided="pass", policy={}, rule="point", undecided=(index,))
    with pytest.raises(ValidationError, match="decision does not follow"):
        make_certificate([None] * 10, decision=decision)
