"""verify: its exit codes, its one object, its statement, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CERT = "s2ap-run/certify/pruned.json"


def test_confirmed_with_a_statement_to_sign(s2ap: Callable[..., Any], own_run: Path) -> None:
    done = s2ap("verify", CERT, "--k", 2, "--seed", 5, "--in-toto", "st.json", cwd=own_run.parent)
    assert done.code == 0, done.err
    assert "certificate: CONFIRMED" in done.out
    assert "in-toto statement, not yet signed: st.json" in done.out
    statement = json.loads((own_run.parent / "st.json").read_text())
    report = json.loads((own_run / "export" / "report.json").read_text())
    digests = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert digests["export/model.onnx"] == report["sha256"]
    assert statement["predicate"]["verification"]["seed"] == 5
    assert statement["predicate"]["verification"]["status"] == "pass"
    again = s2ap("verify", CERT, "--k", 0, "--in-toto", "st.json", "-q", cwd=own_run.parent)
    assert (again.code, again.out, again.err) == (0, "", ""), "the statement is simply replaced"


def test_contradicted_writes_no_statement(s2ap: Callable[..., Any], own_run: Path) -> None:
    masks = own_run / "search" / "masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:-1] + b"\x01")
    done = s2ap("verify", CERT, "--in-toto", "st.json", cwd=own_run.parent)
    assert done.code == 1
    assert "✗ file search/masks.safetensors is not the one that the certificate names" in done.out
    assert "certificate: CONTRADICTED" in done.out
    assert "no in-toto statement was written" in done.err
    assert not (own_run.parent / "st.json").exists()


def test_one_object_with_the_seed_that_was_drawn(s2ap: Callable[..., Any], own_run: Path) -> None:
    first, second = (json.loads(s2ap("verify", CERT, "--json", cwd=own_run.parent).out) for _ in range(2))
    assert first["status"] == "pass"
    assert first["exit_code"] == 0
    assert first["seed"] != second["seed"], "nobody can prepare for the choice"
    assert {check["status"] for check in first["checks"]} == {"pass"}
    (own_run / "finetune" / "model.safetensors").unlink()
    open_answer = s2ap("verify", CERT, "--json", cwd=own_run.parent)
    assert open_answer.code == json.loads(open_answer.out)["exit_code"] == 3


def test_verbose_tells_the_seed_the_machine_and_hashes(s2ap: Callable[..., Any], own_run: Path) -> None:
    done = s2ap("verify", CERT, "--k", 0, "--seed", 5, "--verbose", "--json", cwd=own_run.parent)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    lines = [line for line in done.err.splitlines() if line.startswith("debug: ")]
    assert lines[0].startswith(f"debug: run folder {own_run}; device cpu")
    assert "debug: seed 5" in lines
    assert any(found["certificate_sha256"] in line for line in lines)
    assert found["subjects"]
    for subject in found["subjects"]:
        assert f"debug: {subject['name']}: SHA-256 {subject['sha256']}" in lines
    quiet = s2ap("verify", CERT, "--k", 0, "--verbose", "--quiet", cwd=own_run.parent)
    assert (quiet.out, quiet.err) == ("", "")


def test_a_copy_needs_the_name_of_its_run(s2ap: Callable[..., Any], own_run: Path) -> None:
    (own_run.parent / "mine.json").write_bytes((own_run / "certify" / "pruned.json").read_bytes())
    alone = s2ap("verify", "mine.json", cwd=own_run.parent)
    assert alone.code == 2
    assert "hint: name the run folder of the certificate with --run" in alone.err
    done = s2ap("verify", "mine.json", "--run", "s2ap-run", cwd=own_run.parent)
    assert done.code == 0, done.out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere.json"], "certificate-missing"),
        (["s2ap-run"], "certificate-missing"),
        ([CERT, "--run", "nowhere"], "run-folder-missing"),
        (["s2ap-run/manifest.json", "--run", "s2ap-run"], "record-kind-wrong"),
        (["s2ap-run/recipe.yaml", "--run", "s2ap-run"], "record-not-json"),
        (["old.json", "--run", "s2ap-run"], "record-version-unknown"),
        (["odd.json", "--run", "s2ap-run"], "record-invalid"),
        ([CERT, "--k", "-1"], "option-invalid"),
        ([CERT, "--in-toto", "no/st.json"], "folder-missing"),
        ([CERT, "--in-toto", "st.txt"], "output-format-unknown"),
        ([CERT, "--in-toto", f"{CERT}"], "output-inside-run"),
        ([CERT, "--files", "--k", "5"], "verify-files-excludes-attacks"),
        ([CERT, "--files", "--in-toto", "st.json"], "verify-files-excludes-attacks"),
        ([CERT, "--arch", "digits-conv"], "arch-already-decided"),
        ([CERT, "--device", "cuda:99"], None),
        ([], "option-missing"),
    ],
)
def test_what_it_refuses(
    arguments: list[str],
    code: str | None,
    s2ap: Callable[..., Any],
    own_run: Path,
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    content = json.loads((own_run / "certify" / "pruned.json").read_text())
    (own_run.parent / "old.json").write_text(json.dumps({**content, "schema_version": 0}))
    (own_run.parent / "odd.json").write_text(json.dumps({**content, "n": 41}))
    before = files_in(own_run)
    done = s2ap("verify", *arguments, "--json", cwd=own_run.parent)
    assert done.code == 2, done.out
    answer = json.loads(done.out)
    assert answer["code"] == code if code is not None else answer["code"] != "internal"
    assert "Traceback" not in done.err
    assert files_in(own_run) == before
