"""The manifest is read back as written, and a damaged one is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.manifest import Manifest, Output, Session, StageRecord

INPUTS = {"checkpoint": "ab" * 32, "prune": {"sparsity": 0.9, "layers": [1, 2]}}


def example() -> Manifest:
    record = StageRecord(
        status="finished",
        inputs=manifest.as_json(INPUTS),
        inputs_sha256=manifest.digest(INPUTS),
        sessions=(Session(started=manifest.now(), environment={"threads": 1}),),
        outputs=(Output(path="search/mask.safetensors", sha256="0" * 64, bytes=3),),
        results={"flip_rate": 0.01},
    )
    return (
        Manifest(tool_version="1", created=manifest.now())
        .with_stage("search", record)
        .with_command("prune x")
    )


def test_round_trip_and_canonical_form(tmp_path) -> None:
    example().save(tmp_path)
    assert Manifest.load(tmp_path) == example()
    text = (tmp_path / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2) + "\n"


def test_copies_leave_the_original_alone() -> None:
    original = example()
    assert original.without(("search",)).stages == {}
    assert "search" in original.stages
    assert original.with_command("gate").commands == ("prune x", "gate")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_schema_version_is_refused_by_name(tmp_path, version) -> None:
    content = {**example().model_dump(mode="json"), "schema_version": version}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "record-version-unknown"):
        Manifest.load(tmp_path)


def spoil(change: dict[str, Any]) -> str:
    return json.dumps({**example().model_dump(mode="json"), **change})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "record-not-json"),
        ('{"schema_version": 1', "record-not-json"),
        ("[]", "record-version-unknown"),
        ("[" * 100_000, "record-not-json"),
        ('{"schema_version": NaN}', "record-not-json"),
        (spoil({"stages": {"../../home": {}}}), "record-invalid"),
        (spoil({"stages": {"search": {"status": "finished"}}}), "record-invalid"),
        (spoil({"surprise": 1}), "record-invalid"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, text, code) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunFolderError, check=lambda error: error.code == code) as caught:
        Manifest.load(tmp_path)
    assert "manifest.json" in caught.value.message
    assert caught.value.hint is not None


def test_digest_depends_on_values_only() -> None:
    assert manifest.digest({"a": 1, "b": (2, 3)}) == manifest.digest({"b": [2, 3], "a": 1})
    assert manifest.digest({"a": 1}) != manifest.digest({"a": 1.0})
    assert manifest.digest({"a": {"b": 1}}) != manifest.digest({"a.b": 1})


def test_inputs_must_be_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        manifest.as_json({"x": float("nan")})
    with pytest.raises(TypeError, match="PosixPath"):
        manifest.as_json({"x": Path("a")})


def test_differences_name_the_key_and_both_values() -> None:
    new = {"checkpoint": "ab" * 32, "prune": {"sparsity": 0.95, "layers": [1, 2]}, "seed": 0}
    assert manifest.differences(INPUTS, new) == ["prune.sparsity: 0.9 → 0.95", "seed: absent → 0"]
    assert manifest.differences(INPUTS, INPUTS) == []
    asked_for_nothing = {**INPUTS, "prune": {**INPUTS["prune"], "qat": None}}
    assert manifest.differences(INPUTS, asked_for_nothing) == []
    assert manifest.differences(asked_for_nothing, INPUTS) == []
