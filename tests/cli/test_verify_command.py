"""verify: its exit codes, its one object, its statement, and what it refuses."""

import json

CERT = "s2ap-run/certify/pruned.json"


def test_confirmed_with_a_statement_to_sign(s2ap, own_run) -> None:
    done = s2ap.ok("verify", CERT, "--k", 2, "--seed", 5, "--in-toto", "st.json", cwd=own_run.parent)
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


def test_contradicted_writes_no_statement(s2ap, own_run) -> None:
    masks = own_run / "search" / "masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:-1] + b"\x01")
    done = s2ap("verify", CERT, "--in-toto", "st.json", cwd=own_run.parent)
    assert done.code == 1
    assert (
        "✗ file search/masks.safetensors is not the one recorded in manifest.json and the certificate"
        in done.out
    )
    assert "certificate: CONTRADICTED" in done.out
    assert "no in-toto statement was written" in done.err
    assert not (own_run.parent / "st.json").exists()


def test_one_object_with_the_seed_that_was_drawn(s2ap, own_run) -> None:
    first, second = (json.loads(s2ap("verify", CERT, "--json", cwd=own_run.parent).out) for _ in range(2))
    assert first["status"] == "pass"
    assert first["exit_code"] == 0
    assert first["seed"] != second["seed"], "nobody can prepare for the choice"
    assert {check["status"] for check in first["checks"]} == {"pass"}
    (own_run / "finetune" / "model.safetensors").unlink()
    open_answer = s2ap("verify", CERT, "--json", cwd=own_run.parent)
    assert open_answer.code == open_answer.answer["exit_code"] == 3


def test_verbose_tells_the_seed_the_machine_and_hashes(s2ap, own_run) -> None:
    done = s2ap.ok("verify", CERT, "--k", 0, "--seed", 5, "--verbose", "--json", cwd=own_run.parent)
    found = done.answer
    lines = [line for line in done.err.splitlines() if line.startswith("debug: ")]
    assert lines[0].startswith(f"debug: run folder {own_run}; device cpu")
    assert "debug: seed 5" in lines
    assert any(found["certificate_sha256"] in line for line in lines)
    assert found["subjects"]
    for subject in found["subjects"]:
        assert f"debug: {subject['name']}: SHA-256 {subject['sha256']}" in lines
    quiet = s2ap("verify", CERT, "--k", 0, "--verbose", "--quiet", cwd=own_run.parent)
    assert (quiet.out, quiet.err) == ("", "")


def test_a_copy_needs_the_name_of_its_run(s2ap, own_run) -> None:
    (own_run.parent / "mine.json").write_bytes((own_run / "certify" / "pruned.json").read_bytes())
    s2ap.refused("run-folder-missing", "verify", "mine.json", cwd=own_run.parent)
    s2ap.ok("verify", "mine.json", "--run", "s2ap-run", cwd=own_run.parent)
