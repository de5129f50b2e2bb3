from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from s2ap_deploy import records
from s2ap_deploy.errors import InputError, RunFolderError
from s2ap_deploy.records import Agreement, PointsCheck
from s2ap_deploy.spec import Record


class Sheet(Record):
    schema_version: Literal[2] = 2
    kind: Literal["sheet"] = "sheet"
    count: int = Field(ge=0)

    @model_validator(mode="after")
    def _even(self) -> Sheet:
        if self.count % 2:
            raise ValueError("an odd count")
        return self


def test_a_saved_record_is_read_back(tmp_path: Path) -> None:
    records.save(tmp_path / "a.json", Sheet(count=4))
    assert records.load(tmp_path / "a.json", Sheet, InputError) == Sheet(count=4)
    assert (tmp_path / "a.json").read_text() == records.text(Sheet(count=4))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "record-not-json"),
        ('{"schema_version": NaN}', "record-not-json"),
        ("[1]", "record-kind-wrong"),
        ('{"kind": "other", "schema_version": 2}', "record-kind-wrong"),
        ('{"kind": "sheet"}', "record-version-unknown"),
        ('{"kind": "sheet", "schema_version": 3, "count": 4}', "record-version-unknown"),
        ('{"kind": "sheet", "schema_version": 2}', "record-invalid"),
        ('{"kind": "sheet", "schema_version": 2, "count": 4, "more": 1}', "record-invalid"),
        ('{"kind": "sheet", "schema_version": 2, "count": 3}', "record-invalid"),
    ],
)
@pytest.mark.parametrize("error", [InputError, RunFolderError])
def test_other_content_is_refused(tmp_path: Path, text: str, code: str, error: type[InputError]) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(error) as caught:
        records.load(tmp_path / "a.json", Sheet, error, hint="create it again")
    assert (type(caught.value), caught.value.code, caught.value.hint) == (error, code, "create it again")
    assert str(tmp_path / "a.json") in caught.value.message


@pytest.mark.parametrize(
    ("content", "whole", "expected"),
    [
        ({"count": "x"}, "", "count: "),
        ({"count": 3}, "the sheet", "the sheet: an odd count"),
        ({"count": 3}, "", "an odd count"),
    ],
)
def test_a_validation_error_names_the_key(content: dict[str, object], whole: str, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Sheet.model_validate_json(json.dumps(content))
    assert records.explain(caught.value, whole).startswith(expected)


def points(**changes: int) -> PointsCheck:
    facts = {"n": 4, "clean_correct": 4, "survived": 2, "clean_disagreements": 0}
    return PointsCheck(**{"certificate_sha256": "a", **facts, "adversarial_disagreements": 0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "same", "explained"),
    [
        ({}, True, True),
        ({"adversarial_disagreements": 1}, False, False),
        ({"clean_disagreements": 1, "ties": 1}, False, True),
        ({"clean_disagreements": 1, "adversarial_disagreements": 1, "ties": 1}, False, False),
    ],
)
def test_ties_explain_disagreements(changes: dict[str, int], same: bool, explained: bool) -> None:
    check = points(**changes)
    assert (check.same_predictions, check.explained) == (same, explained)


@pytest.mark.parametrize(
    ("difference", "tolerance", "agree", "passed"),
    [
        (0.1, 0.2, 10, True),
        (0.3, 0.2, 10, False),
        (float("nan"), None, 10, False),
        (0.1, float("inf"), 10, False),
        (9.0, None, 8, True),
        (9.0, None, 7, False),
    ],
)
def test_agreement(difference: float, tolerance: float | None, agree: int, passed: bool) -> None:
    agreement = Agreement(
        n=10,
        max_logit_difference=difference,
        largest_logit=1.0,
        tolerance=tolerance,
        argmax_agree=agree,
        ties=2,
    )
    assert agreement.passed is passed
