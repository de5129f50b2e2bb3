"""``sweep`` through the command line: figures, failures, interruptions, folders that are something else."""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy import tracking
from s2ap_deploy.cli.run_commands import exit_code
from s2ap_deploy.errors import InconclusiveError
from s2ap_deploy.runs.manifest import Manifest
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.stages import open_run
from s2ap_deploy.sweeps import runner as sweeping
from s2ap_deploy.sweeps.aggregate import Row, SweepReport

# At this radius every image falls to the first attack, so that certifying takes a second, not minutes.
RECIPE = """\
name: small
seed: 4
model: {{checkpoint: {checkpoint}}}
data: {{name: digits}}
threat: {{eps: 0.5}}
prune:
  method: hydra
  sparsity: 0.9
  warmup_epochs: 0
  search: {{epochs: 1, objective: {{loss: fast}}}}
  finetune: {{epochs: 1, objective: {{loss: fast}}}}
  diagnostics: {{every: 0}}
certify: {{n: 20}}
gate: {{max_drop: 0.9}}
"""
AXES = ["--method", "magnitude,random", "--s2ap", "both", "--sparsity", "0.9,0.99999"]
NAMES = ["magnitude-plain-0.9-seed-4", "random-plain-0.9-seed-4"]
COMMON = ["small.yaml", "--threads", 1, "--workers", 1, "--quiet"]


@pytest.fixture(scope="module")
def swept(digits_model, tmp_path_factory, s2ap) -> tuple[Path, dict[str, Any], int]:
    """A folder with the recipe and a finished sweep ``s2ap-sweep``, what it printed, and its exit code."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "small.yaml").write_text(RECIPE.format(checkpoint=digits_model))
    done = s2ap("sweep", *COMMON, *AXES, "--json", cwd=folder)
    return folder, done.answer, done.code


@pytest.fixture
def own(swept, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(swept[0], tmp_path / "own"))


def rows(report: dict[str, Any], status: str) -> list[str]:
    return [row["name"] for row in report["rows"] if row["status"] == status]


def test_what_can_be_run_is_run_and_the_rest_is_named(swept) -> None:
    _, report, code = swept
    assert code == 2  # a budget that no mask can meet is an input that cannot be used
    assert rows(report, "finished") == NAMES
    assert rows(report, "skipped") == [
        f"{method}-s2ap-{sparsity}-seed-4"
        for method in ("magnitude", "random")
        for sparsity in (0.9, 0.99999)
    ]
    assert rows(report, "failed") == ["magnitude-plain-0.99999-seed-4", "random-plain-0.99999-seed-4"]
    failed = next(row for row in report["rows"] if row["status"] == "failed")
    assert failed["exit_code"] == 2
    assert failed["error"]
    assert [group["seeds"] for group in report["groups"]] == [[4]] * 2


def test_the_files_agree_with_each_other_and_with_the_certificates(swept) -> None:
    folder, report, _ = swept
    place = folder / "s2ap-sweep"
    assert json.loads((place / "sweep.json").read_text()) == report
    table = (place / "table.md").read_text()
    assert table.count("| magnitude") == table.count("| random") == 1
    assert (place / "pareto.svg").read_text().startswith("<svg xmlns=")
    lines = list(csv.DictReader((place / "sweep.csv").read_text().splitlines()))
    assert [line["name"] for line in lines] == [row["name"] for row in report["rows"]]
    for row in report["rows"]:
        if row["status"] != "finished":
            continue
        outputs = Manifest.load(place / row["run"]).stages["certify"].outputs
        hashes = {output.path: output.sha256 for output in outputs}
        assert row["figures"]["certificate_sha256"] == hashes["certify/pruned.json"]
        assert row["figures"]["dense_certificate_sha256"] == hashes["certify/dense.json"]
        assert row["figures"]["verdict"] in ("pass", "fail", "inconclusive")


def test_the_dense_network_and_the_attack_on_it_are_made_once(swept) -> None:
    place = swept[0] / "s2ap-sweep"
    shared = place / "dense" / "seed-4"
    networks = [shared / "pretrain" / "model.safetensors"]
    networks += [place / "runs" / name / "pretrain" / "model.safetensors" for name in NAMES]
    assert len({path.stat().st_ino for path in networks}) == 1
    made = Manifest.load(shared).stages["pretrain"]
    assert all(Manifest.load(place / "runs" / name).stages["pretrain"] == made for name in NAMES)
    dense = {(place / "runs" / name / "certify" / "dense-points.safetensors").read_bytes() for name in NAMES}
    assert dense == {(shared / "certify" / "dense-points.safetensors").read_bytes()}
    assert (shared / "certify" / "record-dense").is_dir()


def test_a_second_call_does_nothing_again(own, s2ap, swept) -> None:
    before = {name: Manifest.load(own / "s2ap-sweep" / "runs" / name).stages["certify"] for name in NAMES}
    done = s2ap("sweep", *COMMON, *AXES, "--json", cwd=own)
    assert done.code == 2
    assert done.answer == swept[1]
    assert {
        name: Manifest.load(own / "s2ap-sweep" / "runs" / name).stages["certify"] for name in NAMES
    } == before


def test_an_interrupted_sweep_is_resumed_to_the_same_table(own, s2ap, monkeypatch) -> None:
    straight = (own / "s2ap-sweep" / "table.md").read_bytes()
    real, calls = sweeping.whole, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(sweeping, "whole", interrupted)
    stopped = s2ap("sweep", *COMMON, *AXES, "--run", "other", cwd=own)
    assert stopped.code == 130
    monkeypatch.undo()
    assert SweepReport.load(own / "other").status == "started"
    s2ap.refused("sweep-unfinished", "sweep", *COMMON, *AXES, "--run", "other", cwd=own)
    resumed = s2ap("sweep", *COMMON, *AXES, "--run", "other", "--resume", cwd=own)
    assert resumed.code == 2  # of the combinations that no mask can meet, as before
    assert (own / "other" / "table.md").read_bytes() == straight


def test_printed_commands_do_the_work_and_the_sweep_makes_the_table(own, s2ap) -> None:
    place = own / "with space"
    axes = ["--method", "magnitude,random", "--sparsity", "0.9"]
    typed = ["sweep", *COMMON, *axes, "--run", place]
    lines = s2ap.ok(*typed, "--print-commands", cwd=own).out.splitlines()
    commands = [shlex.split(line) for line in lines]
    parts = ["dense/seed-4", "runs/magnitude-0.9-seed-4", "runs/random-0.9-seed-4"]
    assert [words[0] for words in commands] == ["s2ap-deploy"] * 3
    assert [words[-1] for words in commands] == parts
    listed = s2ap.json(*typed, "--print-commands", cwd=own)["commands"]
    assert listed == [{"part": part, "command": line} for part, line in zip(parts, lines, strict=True)]
    assert not place.exists()
    s2ap.refused("stage-unfinished", *commands[1][1:], cwd=own)
    for words in [commands[0], *commands[:0:-1]]:
        s2ap.ok(*words[1:], cwd=own)
    assert not (place / "table.md").exists()
    s2ap.refused("sweep-unfinished", *typed, cwd=own)
    s2ap.refused("part-unknown", *typed, "--only", "runs/nothing", cwd=own)
    before = {part: Manifest.load(place / part).stages["certify"] for part in parts}
    assert s2ap.json(*typed, "--resume", cwd=own)["status"] == "finished"
    assert {part: Manifest.load(place / part).stages["certify"] for part in parts} == before
    s2ap.ok("sweep", *COMMON, *axes, "--run", "straight", cwd=own)
    assert (place / "table.md").read_bytes() == (own / "straight" / "table.md").read_bytes()


def test_a_cluster_makes_the_same_table_and_fails_the_same_combinations(
    own, s2ap, local_tasks, monkeypatch
) -> None:
    tasks = local_tasks()
    use(tasks, monkeypatch)
    done = s2ap("sweep", *COMMON, *AXES, "--on", "ray", "--run", "elsewhere", "--json", cwd=own)
    assert done.code == 2, done.err
    place, straight = own / "elsewhere", own / "s2ap-sweep"
    assert (place / "table.md").read_bytes() == (straight / "table.md").read_bytes()
    report = json.loads((straight / "sweep.json").read_text())
    assert [(row["name"], row["status"], row["error"]) for row in done.answer["rows"]] == [
        (row["name"], row["status"], row["error"]) for row in report["rows"]
    ]
    assert tasks.calls.count("run_dense") == 1
    assert tasks.calls.count("run_combination") == 4


def test_lost_tasks_fail_their_combinations_and_resume_without_the_cluster_finishes(
    own, s2ap, local_tasks, monkeypatch
) -> None:
    lost = InconclusiveError("a node ran out of memory", code="cluster-out-of-memory", hint="less at once")
    axes = ["--method", "magnitude,random", "--sparsity", "0.9"]
    with monkeypatch.context() as patch:
        use(local_tasks(lose={2: lost}), patch)  # after the dense network and the first combination
        done = s2ap("sweep", *COMMON, *axes, "--on", "ray", "--run", "elsewhere", "--json", cwd=own)
    assert done.code == 3
    assert rows(done.answer, "finished") == ["magnitude-0.9-seed-4"]
    (failed,) = [row for row in done.answer["rows"] if row["status"] == "failed"]
    assert (failed["error"], failed["hint"], failed["exit_code"]) == (lost.message, lost.hint, 3)
    s2ap.ok("sweep", *COMMON, *axes, "--run", "elsewhere", "--resume", cwd=own)
    assert SweepReport.load(own / "elsewhere").rows[1].status == "finished"


def test_a_dense_network_that_fails_on_a_cluster_fails_its_combinations(
    own, s2ap, local_tasks, monkeypatch
) -> None:
    (own / "small.yaml").write_text(RECIPE.format(checkpoint="nowhere.pt"))
    use(local_tasks(), monkeypatch)
    options = [*COMMON, "--method", "random", "--run", "elsewhere", "--json"]
    there = s2ap("sweep", *options, "--on", "ray", cwd=own)
    here = s2ap("sweep", *options, "--overwrite", cwd=own)
    assert there.code == here.code == 2
    assert there.answer["rows"] == here.answer["rows"]


def use(tasks: Any, patch: pytest.MonkeyPatch) -> None:
    """Make ``tasks`` the cluster that ``--on ray`` connects to."""

    @contextlib.contextmanager
    def connected(target: str, resources: Any, folder: Path | None = None) -> Iterator[Any]:
        assert (target, folder is not None and folder.is_absolute()) == ("ray", True)
        yield tasks

    patch.setattr(open_run, "connected", connected)


def test_the_pages_slurm_script_starts_every_part_once_and_dense_networks_first(tmp_path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (script,) = [text for text in re.findall(r"^```sh\n(.*?)^```$", page, re.S | re.M) if "sbatch" in text]
    parts = ["dense/seed-0", "dense/seed-1", "runs/0.9-seed-0", "runs/0.9-seed-1"]
    stand_ins = {
        "s2ap-deploy": 'case "$*" in *--print-commands*) printf "s2ap-deploy sweep --only %s\\n" '
        f'{" ".join(parts)};; *) echo "${{@: -1}}" >> log;; esac',
        "sbatch": "count=; for word; do case $word in --array=1-*) count=${word#--array=1-};; esac; done\n"
        'for i in $(seq $count); do SLURM_ARRAY_TASK_ID=$i bash -c "${@: -1}"; done;\n'
        'echo 7; echo "$*" >> jobs',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, env=path, check=True)
    assert (tmp_path / "log").read_text().split() == parts
    assert "--dependency=afterok:7 --array=1-2" in (tmp_path / "jobs").read_text()


@pytest.mark.parametrize(
    "options", [["--dry-run", "--only", "dense/seed-4"], ["--print-commands", "--overwrite"]]
)
def test_options_that_print_or_run_a_part_exclude_others(own, s2ap, options) -> None:
    s2ap.refused("usage", "sweep", *COMMON, *AXES, *options, cwd=own)


def test_a_shared_file_that_was_changed_is_not_passed_on(own, s2ap) -> None:
    place = own / "s2ap-sweep"
    shutil.rmtree(place / "runs")
    model = place / "dense" / "seed-4" / "pretrain" / "model.safetensors"
    data = model.read_bytes()
    model.unlink()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = s2ap("sweep", *COMMON, "--method", "magnitude", "--s2ap", "off", "--json", cwd=own)
    (row,) = done.answer["rows"]
    assert (done.code, row["status"]) == (2, "failed")
    assert "has changed since" in row["error"]


def test_an_unforeseen_failure_is_isolated_and_told(own, s2ap, monkeypatch) -> None:
    real = sweeping.whole

    def broken(job: Any, **options: Any) -> Any:
        if job.recipe.prune.method == "random":
            raise ZeroDivisionError("by chance")
        return real(job, **options)

    monkeypatch.setattr(sweeping, "whole", broken)
    done = s2ap(
        "sweep",
        *COMMON,
        "--s2ap",
        "off",
        "--sparsity",
        0.9,
        "--method",
        "magnitude,random",
        "--json",
        cwd=own,
    )
    report = done.answer
    assert done.code == 70
    assert [row["status"] for row in report["rows"]] == ["finished", "failed"]
    assert report["rows"][1]["error"] == "ZeroDivisionError: by chance"


def test_overwrite_starts_again(own, s2ap) -> None:
    kept = own / "s2ap-sweep" / "runs" / "magnitude-plain-0.9-seed-4"
    done = s2ap.ok(
        "sweep", *COMMON, "--method", "random", "--s2ap", "off", "--seeds", 2, "--overwrite", cwd=own
    )
    assert not kept.exists()
    assert "random" in done.out
    assert "±" in done.out
    assert "upper bound" in done.out


def test_another_recipe_in_the_same_folder_is_refused_combination_by_combination(own, s2ap) -> None:
    changed = [
        "--set",
        "prune.finetune.epochs=2",
        "--method",
        "magnitude",
        "--s2ap",
        "off",
        "--sparsity",
        0.9,
    ]
    done = s2ap("sweep", *COMMON, *changed, "--json", cwd=own)
    (row,) = done.answer["rows"]
    assert done.code == 2
    assert "finetune.epochs: 1 → 2" in row["error"]


def test_folders_of_something_else_are_left_alone(own, s2ap, files_in) -> None:
    (own / "file").write_text("x")
    run = own / "s2ap-sweep" / "runs" / NAMES[0]
    before = files_in(run)
    for folder, code in (("file", "folder-is-file"), (run, "folder-not-empty"), (".", "folder-not-empty")):
        s2ap.refused(code, "sweep", *COMMON, "--run", folder, "--overwrite", cwd=own)
    assert files_in(run) == before


def test_a_damaged_report_is_told_and_overwritten_only_when_asked(own, s2ap) -> None:
    (own / "s2ap-sweep" / "sweep.json").write_text('{"kind": 3}')
    sweep = ["sweep", *COMMON, "--method", "random", "--s2ap", "off"]
    assert "--overwrite" in s2ap.refused("file-damaged", *sweep, cwd=own).answer["hint"]


def report_of(*codes: int | None) -> SweepReport:
    return SweepReport(
        status="finished", recipe="r", data="digits", arch=None, threat=ThreatModel(eps="1"),
        protocol="standard",
        statement=None, axes={}, groups=(),
        rows=tuple(
            Row(name=str(i), seed=0, values={}, status="failed" if code else "finished", exit_code=code)
            for i, code in enumerate(codes)
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((None, None), 0), ((None, 3), 3), ((3, 1), 1), ((1, 2, 3), 2), ((2, 70, None), 70), ((130,), 70)],
)
def test_the_exit_code_is_that_of_the_worst_failure(codes, expected) -> None:
    assert exit_code(report_of(*codes)) == expected


def test_a_sweep_tells_every_run_and_its_figures(digits_model, tmp_path, s2ap, monkeypatch) -> None:
    heard: dict[str, set[str]] = {}

    class Fake:
        def __init__(self, folder: Path) -> None:
            self.heard = heard.setdefault(folder.name, set())

        def facts(self, values: dict[str, str]) -> None:
            self.heard.add("facts")

        def figures(self, stage: str, values: dict[str, float], step: int) -> None:
            self.heard.add(stage.partition("/")[0])

        def close(self) -> None:
            self.heard.add("closed")

    monkeypatch.setattr(tracking, "_tracker", lambda name, folder: Fake(folder))
    monkeypatch.setattr(tracking, "require", lambda names: None)
    (tmp_path / "small.yaml").write_text(RECIPE.format(checkpoint=digits_model))
    axes = ["--method", "magnitude", "--s2ap", "off"]
    loud = [word for word in COMMON if word != "--quiet"]
    done = s2ap.ok("sweep", *loud, *axes, "--track", "mlflow", "--verbose", "--json", cwd=tmp_path)
    again = s2ap("sweep", *loud, *axes, cwd=tmp_path)
    assert "all output is in s2ap-sweep: the table, sweep.csv, sweep.json, pareto.svg and runs/" in again.err
    assert heard["seed-4"] >= {"facts", "certify", "closed"}
    (name,) = rows(done.answer, "finished")
    assert heard[name] >= {"facts", "finetune", "certify", "closed"}
    assert f"debug: run folder s2ap-sweep/runs/{name}; device cpu" in done.err


def test_a_tracker_that_is_missing_is_told_before_there_is_a_folder(
    digits_model, tmp_path, s2ap, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    (tmp_path / "small.yaml").write_text(RECIPE.format(checkpoint=digits_model))
    s2ap.refused("tracker-not-installed", "sweep", *COMMON, "--track", "mlflow", cwd=tmp_path)
    assert not (tmp_path / "s2ap-sweep").exists()
