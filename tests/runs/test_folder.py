"""The run folder: what is skipped, what is refused, and that no kill spoils it."""

import builtins
import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from s2ap_deploy import files
from s2ap_deploy.errors import RecipeError, RunFolderError, StorageError
from s2ap_deploy.recipe import catalog
from s2ap_deploy.runs import snapshot
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.runs.manifest import STAGES, StageName
from s2ap_deploy.runs.snapshot import Stage

INPUTS = {"weights": "ab" * 32, "prune": {"sparsity": 0.9}, "seed": 0}


def open_run(path: Path, *, create: bool = True) -> Run:
    return Run.open(path, create=create, command="test")


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    with open_run(tmp_path / "s2ap-run") as opened:
        yield opened


def enter(
    run: Run,
    name: StageName,
    inputs: dict[str, Any] = INPUTS,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Stage:
    return run.stage(name, inputs=inputs, resume=resume, overwrite=overwrite)


def complete(run: Run, name: StageName, inputs: dict[str, Any] = INPUTS, text: str = "x") -> Path:
    stage = enter(run, name, inputs)
    output = stage.folder / "out.txt"
    files.write_text(output, text)
    stage.finish([output], {"figure": 0.5})
    return output


# --- opening -----------------------------------------------------------------------------------------


def test_a_new_folder_is_made_with_its_parents_and_found_again(tmp_path) -> None:
    path = tmp_path / "a" / "b"
    with Run.open(path, create=True, command="prune model.pt") as run:
        complete(run, "search")
    with Run.open(path, create=False, command="certify") as run:
        assert run.manifest.commands == ("prune model.pt", "certify")
        assert "search finished" in repr(run)


def test_an_empty_folder_is_taken_over_and_the_rests_of_a_kill_too(tmp_path) -> None:
    (tmp_path / ".lock").write_text("123\n")
    (tmp_path / ".tmp-0123.json").write_text("{")
    with open_run(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "manifest.json"]


def test_without_create_a_run_must_be_there(tmp_path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RunFolderError, check=lambda error: error.code == "run-missing") as caught:
            open_run(path, create=False)
        assert "--run" in str(caught.value.hint)
    assert os.listdir(tmp_path) == []


def test_a_file_where_the_folder_should_be(tmp_path) -> None:
    (tmp_path / "s2ap-run").write_text("precious")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "run-folder-is-file"):
        open_run(tmp_path / "s2ap-run")
    with pytest.raises(StorageError, check=lambda error: error.code == "folder-not-created"):
        open_run(tmp_path / "s2ap-run" / "below")
    assert (tmp_path / "s2ap-run").read_text() == "precious"


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "run-folder-foreign"):
        open_run(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_in_use_is_refused_and_free_again_after_an_error(tmp_path) -> None:
    with (
        open_run(tmp_path),
        pytest.raises(RunFolderError, check=lambda error: error.code == "run-folder-in-use"),
    ):
        open_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "record-not-json"):
        open_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    open_run(tmp_path).close()


# --- skipping, resuming, overwriting -----------------------------------------------------------------


def test_a_finished_stage_with_the_same_inputs_is_skipped(run) -> None:
    output = complete(run, "search")
    stage = enter(run, "search")
    assert (stage.state, stage.results) == ("finished", {"figure": 0.5})
    assert output.read_text() == "x"
    assert enter(run, "search", dict(reversed(INPUTS.items()))).state == "finished"
    assert enter(run, "search", {**INPUTS, "added_later": None}).state == "finished"


@pytest.mark.parametrize("finished", [True, False])
def test_other_inputs_are_refused_with_what_differs_named(run, finished) -> None:
    if finished:
        complete(run, "search")
    else:
        enter(run, "search")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match=r"prune\.sparsity: 0\.9 → 0\.95; seed: 0 → 1\)") as caught:
            enter(run, "search", {**INPUTS, "prune": {"sparsity": 0.95}, "seed": 1}, resume=resume)
        assert "--overwrite" in str(caught.value.hint)
        assert "--run" in str(caught.value.hint)


def test_a_long_list_of_differences_is_cut(run) -> None:
    enter(run, "search", {f"key{i}": i for i in range(9)})
    with pytest.raises(RunFolderError, match="key4: 4 → absent; and 4 more"):
        enter(run, "search", {})


def test_an_unfinished_stage_needs_resume(run) -> None:
    stage = enter(run, "search")
    (stage.folder / "record.jsonl").write_text("1\n")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-unfinished") as caught:
        enter(run, "search")
    assert caught.value.hint == "add --resume to continue, or --overwrite to start over"
    again = enter(run, "search", resume=True)
    assert again.state == "resumable"
    assert (again.folder / "record.jsonl").read_text() == "1\n"


def test_overwrite_starts_again_from_an_empty_folder(run) -> None:
    output = complete(run, "search")
    stage = enter(run, "search", {"seed": 1}, overwrite=True)
    assert stage.state == "fresh"
    assert not output.exists()
    assert stage.results is None


def test_overwriting_a_stage_forgets_what_was_built_on_it_and_nothing_else(run) -> None:
    for name in STAGES:
        complete(run, name)
    (run.path / "notes.txt").write_text("mine")
    enter(run, "finetune", overwrite=True)
    assert list(run.manifest.stages) == ["pretrain", "search", "finetune"]
    assert sorted(os.listdir(run.path)) == [
        ".lock", "finetune", "manifest.json", "notes.txt", "pretrain", "search",
    ]  # fmt: skip
    assert enter(run, "search").state == "finished"


def test_finished_later_work_is_not_discarded_unasked(run) -> None:
    complete(run, "export")
    complete(run, "gate")
    for resume in (False, True):
        with pytest.raises(RunFolderError, check=lambda error: error.code == "stages-discarded") as caught:
            enter(run, "certify", resume=resume)
    assert "--overwrite" in str(caught.value.hint)
    assert enter(run, "certify", overwrite=True).state == "fresh"
    assert list(run.manifest.stages) == ["certify"]


def test_a_verdict_is_cheap_and_does_not_stand_in_the_way(run) -> None:
    complete(run, "gate")
    assert enter(run, "export").state == "fresh"
    assert list(run.manifest.stages) == ["export"]


def damage_change(output: Path) -> None:
    output.write_text("y")


def damage_append(output: Path) -> None:
    output.write_text("xx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "is missing"), (damage_change, "has changed"), (damage_append, "has changed")],
)
def test_damaged_outputs_run_again_when_asked(run, damage, message) -> None:
    damage(complete(run, "search"))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "output-damaged"):
        enter(run, "search")
    with pytest.raises(RunFolderError, match=message):
        run.output("search", "out.txt")
    stage = enter(run, "search", resume=True)
    assert stage.state == "fresh"
    assert message in str(stage.note)


def test_output_gives_only_what_a_finished_stage_wrote(run) -> None:
    written = complete(run, "search")
    assert run.output("search", "out.txt") == written
    with pytest.raises(RunFolderError, check=lambda error: error.code == "output-missing"):
        run.output("search", "other.txt")
    enter(run, "search", overwrite=True)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-missing") as caught:
        run.output("search", "out.txt")
    assert caught.value.hint == "repeat its command with --resume"


def test_output_before_any_stage(run) -> None:
    with pytest.raises(RunFolderError, check=lambda error: error.code == "stage-missing") as caught:
        run.output("search", "out.txt")
    assert caught.value.hint == "run s2ap-deploy prune first"


# --- what is recorded ---------------------------------------------------------------------------------


def test_the_manifest_records_outputs_environment_and_every_session(run) -> None:
    run.stage("search", inputs=INPUTS, resume=False, overwrite=False, environment={"threads": 1})
    stage = run.stage("search", inputs=INPUTS, resume=True, overwrite=False, environment={"threads": 2})
    (stage.folder / "deep").mkdir()
    files.write_text(stage.folder / "deep" / "a.txt", "abc")
    stage.finish([stage.folder / "deep" / "a.txt"], None)
    record = json.loads((run.path / "manifest.json").read_text())["stages"]["search"]
    assert record["outputs"] == [
        {"path": "search/deep/a.txt", "bytes": 3, "sha256": files.sha256(stage.folder / "deep" / "a.txt")}
    ]
    assert [session["environment"] for session in record["sessions"]] == [{"threads": 1}, {"threads": 2}]
    assert record["inputs"] == INPUTS
    assert record["seconds"] >= 0
    assert stage.state == "finished"


def test_time_before_a_kill_counts(run, monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stage = enter(run, "search")
    clock[0] += 7
    stage.save_snapshot({}, {})
    clock[0] += 50  # lost
    stage = enter(run, "search", resume=True)
    stage.load_snapshot()
    clock[0] += 3
    stage.finish([], None)
    assert run.manifest.stages["search"].seconds == 10


def test_an_output_outside_the_stage_is_a_mistake_of_ours(run) -> None:
    stage = enter(run, "search")
    files.write_text(run.path / "a.txt", "")
    with pytest.raises(ValueError, match=r"a\.txt"):
        stage.finish([run.path / "a.txt"], None)


def test_an_output_that_was_never_written(run) -> None:
    stage = enter(run, "search")
    with pytest.raises(StorageError, check=lambda error: error.code == "file-not-read"):
        stage.finish([stage.folder / "absent"], None)
    assert run.manifest.stages["search"].status == "started"


def test_an_unknown_stage_is_a_mistake_of_ours(run) -> None:
    with pytest.raises(ValueError, match="is not a stage"):
        enter(run, "polish")  # type: ignore[arg-type]


def test_recipe_round_trip(run) -> None:
    assert run.load_recipe() is None
    resolved = catalog.load("demo", overrides=["seed=3"])
    run.save_recipe(resolved)
    assert run.load_recipe() == resolved
    (run.path / "recipe.yaml").write_text("name: [")
    with pytest.raises(RecipeError, check=lambda error: error.code == "yaml-invalid"):
        run.load_recipe()


# --- folders from elsewhere ---------------------------------------------------------------------------


def test_an_output_path_that_leads_out_is_refused(run) -> None:
    complete(run, "search")
    path = run.path / "manifest.json"
    path.write_text(path.read_text().replace("search/out.txt", "../../etc/passwd"))
    run.close()
    with (
        open_run(run.path) as again,
        pytest.raises(RunFolderError, check=lambda error: error.code == "path-outside"),
    ):
        enter(again, "search")


@pytest.mark.parametrize("name", ["search", "certify"])
def test_a_stage_folder_that_is_a_link_is_refused_and_its_target_kept(run, tmp_path, name) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "a").write_text("")
    (run.path / name).symlink_to(precious)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "path-is-link"):
        enter(run, "search", overwrite=True)
    assert (precious / "a").exists()


# --- snapshots ----------------------------------------------------------------------------------------


def test_snapshot_round_trip_and_removal_by_finish(run) -> None:
    stage = enter(run, "search")
    assert stage.load_snapshot() is None
    stage.save_snapshot({"scores": torch.arange(3.0)}, {"epoch": 2})
    loaded = enter(run, "search", resume=True).load_snapshot()
    assert loaded is not None
    assert torch.equal(loaded[0]["scores"], torch.arange(3.0))
    assert loaded[1] == {"epoch": 2}
    stage.finish([], None)
    assert os.listdir(stage.folder) == []


def test_a_snapshot_of_other_inputs_is_refused(run) -> None:
    enter(run, "search").save_snapshot({}, {"epoch": 2})
    kept = run.path / "kept"
    (run.path / "search" / snapshot.FILE_NAME).rename(kept)
    stage = enter(run, "search", {"seed": 1}, overwrite=True)
    kept.rename(stage.folder / snapshot.FILE_NAME)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "snapshot-foreign"):
        stage.load_snapshot()


# --- kills --------------------------------------------------------------------------------------------

EPOCHS = 2


def step(weights: torch.Tensor, *key: int) -> torch.Tensor:
    return weights * 0.9 + torch.randn(8, generator=torch.Generator().manual_seed(hash(key) % 2**32))


def work(path: Path, *, seed: int = 0, overwrite: bool = False) -> str:
    """Two stages, the second from the first's output; returns the hash of the last output."""
    names: tuple[StageName, StageName] = ("search", "finetune")
    with open_run(path) as run:
        previous = ""
        for number, name in enumerate(names):
            inputs = {"previous": previous, "seed": seed}
            stage = run.stage(name, inputs=inputs, resume=True, overwrite=overwrite)
            if stage.state != "finished":
                loaded = stage.load_snapshot()
                weights, first = (loaded[0]["w"], loaded[1]["epoch"]) if loaded else (torch.zeros(8), 0)
                for epoch in range(first, EPOCHS):
                    weights = step(weights, seed, number, epoch)
                    stage.save_snapshot({"w": weights}, {"epoch": epoch + 1})
                files.write_bytes(stage.folder / "weights.bin", weights.numpy().tobytes())
                stage.finish([stage.folder / "weights.bin"], {"epochs": EPOCHS})
            previous = files.sha256(run.output(name, "weights.bin"))
    return previous


def recover(path: Path) -> str:
    """What a user types after a kill: --resume, and --overwrite if the folder still holds other inputs."""
    try:
        return work(path)
    except RunFolderError as error:
        if error.code != "stage-inputs-changed":
            raise
        return work(path, overwrite=True)


CLEARED = 35  # calls after which --overwrite has cleared the folder and both workloads do the same
SYSCALLS = ("open", "fsync", "replace", "unlink", "mkdir", "rmdir", "ftruncate")


def killed_at(call: int, workload: Callable[[], object]) -> bool:
    """Run ``workload`` in a fork that dies, like from SIGKILL, before its ``call``-th file system call."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
    calls = 0
    builtin_open = open

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                if original is builtin_open:  # dies after it has truncated the file, before the write
                    original(*args, **kwargs)
                os._exit(137)
            return original(*args, **kwargs)

        return call_or_die

    for name in SYSCALLS:
        setattr(os, name, dying(getattr(os, name)))
    builtins.open = dying(open)
    with contextlib.suppress(BaseException):
        workload()
        os._exit(0)
    os._exit(1)


@pytest.mark.parametrize("earlier", ["nothing", "finished", "unfinished"])
def test_a_kill_between_any_two_file_system_calls_can_be_recovered(tmp_path, monkeypatch, earlier) -> None:
    """From an empty folder, and while ``--overwrite`` clears the results or snapshots of another seed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow on a busy disk, and no kill can tell
    expected = work(tmp_path / "whole")
    before = tmp_path / "before"
    if earlier == "finished":
        work(before, seed=1)
    elif earlier == "unfinished":
        with open_run(before) as run:
            stage = run.stage("search", inputs={"previous": "", "seed": 1}, resume=False, overwrite=False)
            stage.save_snapshot({"w": torch.ones(8)}, {"epoch": 1})
    path = tmp_path / "killed"
    call, died = 0, True
    while died and (earlier == "nothing" or call < CLEARED):
        call += 1
        if before.exists():
            shutil.copytree(before, path)
        died = killed_at(call, lambda: work(path, overwrite=before.exists()))
        assert recover(path) == expected, f"killed before call {call}"
        assert not list(path.rglob(".tmp-*"))
        shutil.rmtree(path)
    assert call >= CLEARED


def test_a_refused_replace_is_one_clear_error_and_can_be_resumed(tmp_path, monkeypatch) -> None:
    expected = work(tmp_path / "whole")
    replace = os.replace
    for allowed in range(11):  # as many as the workload makes
        left = allowed

        def refuse(*paths: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            replace(*paths)

        path = tmp_path / str(allowed)
        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(StorageError, check=lambda error: error.code == "disk-full"):
            work(path)
        monkeypatch.undo()
        assert work(path) == expected


def test_killed_twenty_times_at_random_moments(tmp_path) -> None:
    expected = work(tmp_path / "whole")
    rng = random.Random(0)
    path = tmp_path / "killed"
    for _ in range(20):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                while True:
                    work(path)
                    work(path, overwrite=True)
            os._exit(1)
        time.sleep(rng.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if rng.random() < 0.5:
            assert work(path) == expected
    assert work(path) == expected
