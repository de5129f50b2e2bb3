"""``certify`` with a policy: it stops when the gate is decided, says so, and can be completed."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

HOPELESS = ["--min-robust", "0.999", "--gate", "point"]  # more than the networks' clean accuracy


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def early_run(s2ap, own_run) -> Path:
    s2ap.ok("certify", "--overwrite", *HOPELESS, "--run", own_run, "--workers", 1)
    return own_run


def test_it_stops_and_reports_an_interval_and_no_figure(s2ap, own_run) -> None:
    done = s2ap.ok("certify", "--overwrite", *HOPELESS, "--json", "--run", own_run, "--workers", 1)
    assert "decided early: fail; at most" in done.err
    assert "can be robust, 99.9% is required;" in done.err
    assert "of 40 images unresolved" in done.err
    answer = done.answer["certify"]
    for role in ("dense", "pruned"):
        certificate = read(own_run / "certify" / f"{role}.json")
        robust = answer[role]["robust"]
        assert robust == certificate["robust"]
        assert robust.keys() == {"settled", "possible", "n", "low", "high"}
        assert (robust["settled"], robust["possible"]) == (0, certificate["clean"]["k"])
        assert {row["possible"] - row["settled"] > 0 for row in certificate["per_class"]} >= {True}
        decision = certificate["decision"]
        assert (decision["decided"], decision["policy"]) == ("fail", {"min_robust": 0.999})
        assert len(decision["undecided"]) == robust["possible"] == answer[role]["decision"]["undecided"]
        standing = [sample["broken_by"] for sample in certificate["samples"]]
        assert None not in standing
        assert [i for i, by in enumerate(standing) if by == "undecided"] == decision["undecided"]


def test_the_gate_agrees_and_does_not_guess(s2ap, early_run) -> None:
    decided = s2ap("gate", "--min-robust", 0.999, "--rule", "point", "--run", early_run)
    assert decided.code == 1
    assert "required 99.9%; decided early" in decided.out
    for other in (["--min-robust", 0.1], ["--max-drop", 0.05], ["--max-class-drop", 0.05]):
        done = s2ap("gate", *other, "--rule", "point", "--run", early_run)
        assert done.code == 3, done.out
        assert "is inside the certificate's interval" in done.out
        assert "s2ap-deploy certify --full --resume" in done.out
    assert s2ap("gate", "--min-clean", 0, "--rule", "point", "--run", early_run).code == 0
    answer = json.loads(s2ap("gate", "--min-robust", 0.999, "--json", "--run", early_run).out)
    (check,) = [check for check in answer["checks"] if check["name"].startswith("robust accuracy")]
    assert (check["status"], check["observed"]) == ("fail", None)


def test_a_full_run_completes_it(s2ap, early_run, finished_run, files_in) -> None:
    s2ap.refused("stage-policy-changed", "certify", "--full", "--run", early_run)
    s2ap.ok("certify", "--full", "--resume", "--run", early_run)
    for role in ("dense", "pruned"):
        certificate, before = (read(run / "certify" / f"{role}.json") for run in (early_run, finished_run))
        assert certificate["samples"] == before["samples"]
        assert certificate["robust"] == before["robust"]
        assert certificate["decision"] is None
        assert not (early_run / "certify" / f"record-{role}").exists()
        name = f"certify/{role}-points.safetensors"
        assert files_in(early_run)[name] == files_in(finished_run)[name]
    inputs = read(early_run / "manifest.json")["stages"]["certify"]["inputs"]
    assert inputs == read(finished_run / "manifest.json")["stages"]["certify"]["inputs"]


def test_another_policy_goes_on_from_there(s2ap, early_run) -> None:
    again = s2ap("certify", *HOPELESS, "--run", early_run)
    assert "already done with the same inputs" in again.err
    assert s2ap("certify", "--min-robust", 0.5, "--gate", "point", "--run", early_run).code == 2
    easier = ["--min-robust", 0.001, "--max-drop", 0.5, "--gate", "point", "--resume"]
    done = s2ap.ok("certify", *easier, "--run", early_run, "--workers", 1)
    assert "decided early: fail; at most 0.0% can be robust" in done.err
    assert "value" in read(early_run / "certify" / "pruned.json")["robust"], "nothing was left of it"
    assert "value" not in read(early_run / "certify" / "dense.json")["robust"]


def test_what_a_full_run_found_serves_every_policy(s2ap, own_run) -> None:
    done = s2ap.ok("certify", *HOPELESS, "--run", own_run)
    assert "already done with the same inputs" in done.err


def test_the_recipes_gate_decides_unless_full(s2ap, own_run) -> None:
    recipe = yaml.safe_load((own_run / "recipe.yaml").read_text())
    recipe["gate"] = {"min_robust": 0.999, "rule": "point"}
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = s2ap("certify", "--overwrite", "--run", own_run, "--workers", 1)
    assert "decided early: fail" in done.err
    assert s2ap("gate", "--run", own_run).code == 1
    done = s2ap("run", own_run / "recipe.yaml", "--resume", "--run", own_run, "--workers", 1)
    assert done.code == 1, done.err
    assert "undecided" in done.out
    assert "show no robustness" in done.err
    assert s2ap("certify", "--full", "--resume", "--run", own_run).code == 0
    assert "value" in read(own_run / "certify" / "pruned.json")["robust"]
    assert yaml.safe_load((own_run / "recipe.yaml").read_text())["certify"]["full"] is True
    assert "already done" in s2ap("certify", "--run", own_run).err


def test_a_network_alone_is_decided_too(s2ap, digits_model, tmp_path) -> None:
    options = ["--eps", "0.5", "--n", 20, "--max-drop", 0.01, "--gate", "point", "--workers", 1]
    done = s2ap.ok("certify", digits_model, *options, cwd=tmp_path)
    assert "decided early: pass; the drop is at most 0.0%" in done.err
    s2ap.ok("gate", "--max-drop", 0.01, "--rule", "point", cwd=tmp_path)


def test_out_of_time_before_it_is_decided(s2ap, own_run) -> None:
    policy = ["--min-robust", 0.01, "--gate", "point", "--workers", 1, "--run", own_run]
    stopped = s2ap("certify", "--overwrite", "--time-budget", 0, *policy)
    assert stopped.code == 3
    assert "the time budget ran out" in stopped.err
    resumed = s2ap.ok("certify", "--resume", *policy)
    assert "decided early: fail" in resumed.err
