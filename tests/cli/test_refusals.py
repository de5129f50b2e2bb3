"""What cannot be used is refused: exit code 2, one clear message, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Builder = Callable[[Path, Path], None]
FOREIGN = ["--data", "digits", "--eps", "0.1"]


def weights(model: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(model, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in state.items() if "network" in name}


class RunsCode:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def truncated(model: Path, path: Path) -> None:
    content = model.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def text(model: Path, path: Path) -> None:
    path.write_text("these are no weights\n")


def empty(model: Path, path: Path) -> None:
    path.write_bytes(b"")


def folder(model: Path, path: Path) -> None:
    path.mkdir()


def dangerous(model: Path, path: Path) -> None:
    torch.save({"state_dict": weights(model), "extra": RunsCode(path.parent / "marker")}, path)


def dangerous_legacy(model: Path, path: Path) -> None:
    content = {"state_dict": weights(model), "extra": RunsCode(path.parent / "marker")}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def dangerous_plain(model: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(RunsCode(path.parent / "marker")))


def not_finite(model: Path, path: Path) -> None:
    state = weights(model)
    state["2.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)


def seven_classes(model: Path, path: Path) -> None:
    state = weights(model)
    torch.save({**state, "7.weight": state["7.weight"][:7], "7.bias": state["7.bias"][:7]}, path)


def unknown_network(model: Path, path: Path) -> None:
    torch.save({"some.weight": torch.zeros(3, 4)}, path)


BAD_CHECKPOINTS = [
    (truncated, "is damaged, cut off"),
    (text, "is text, neither a torch.save file nor safetensors"),
    (empty, "is empty"),
    (folder, "is a folder, not a checkpoint"),
    (dangerous, "asks to import and run more than tensors: posix.system"),
    (dangerous_legacy, "asks to import and run more than tensors: posix.system"),
    (dangerous_plain, "asks to import and run more than tensors: posix.system"),
    (not_finite, "1 of the 18432 values of 2.weight are NaN or infinite"),
    (seven_classes, "tells 7 classes apart, but digits has 10"),
    (unknown_network, "no registered architecture fits"),
]


def assert_refused(done: Any, message: str, *, code: int = 2) -> None:
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.count("error: ") == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert "unforeseen" not in done.err


def only_a_run_folder_without_stages(folder: Path) -> bool:
    """A command that was refused by what it read may leave the folder that it locked, and no work in it."""
    if not folder.exists():
        return True
    manifest = json.loads((folder / "manifest.json").read_text())
    return {path.name for path in folder.iterdir()} == {"manifest.json", ".lock"} and manifest["stages"] == {}


@pytest.mark.parametrize(("build", "message"), BAD_CHECKPOINTS)
@pytest.mark.parametrize("command", ["prune", "certify"])
def test_checkpoints_that_cannot_be_used(
    command: str,
    build: Builder,
    message: str,
    s2ap: Callable[..., Any],
    digits_model: Path,
    files_in: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    build(digits_model, tmp_path / "bad.pt")
    before = files_in(tmp_path)
    sparsity = ["--sparsity", 0.9] if command == "prune" else []
    done = s2ap(command, "bad.pt", *sparsity, *FOREIGN, cwd=tmp_path)
    assert_refused(done, message)
    assert not (tmp_path / "marker").exists()
    assert only_a_run_folder_without_stages(tmp_path / "s2ap-run")
    kept = {name: data for name, data in files_in(tmp_path).items() if not name.startswith("s2ap-run/")}
    assert kept == before


def test_a_refusal_with_json_is_one_object(s2ap: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_text("no weights")
    done = s2ap("prune", "bad.pt", "--sparsity", "0.9", "--json", cwd=tmp_path)
    assert json.loads(done.out)["exit_code"] == done.code == 2


def test_trusting_a_pickle_is_the_users_own_word(
    s2ap: Callable[..., Any], digits_model: Path, tmp_path: Path
) -> None:
    dangerous(digits_model, tmp_path / "bad.pt")
    done = s2ap("inspect", "bad.pt", "--trust-pickle", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "marker").exists()
    assert "posix.system" in json.dumps(json.loads(done.out)["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1.0"], "1.0 is not in the range 0<x<1"),
        (["--sparsity", "-0.1"], "-0.1 is not in the range 0<x<1"),
        (["--sparsity", "0"], "is not in the range 0<x<1"),
        (["--sparsity", "abc"], "'abc' is not a valid float"),
        (["--sparsity", "nan"], "prune.sparsity"),
        ([], "--sparsity is missing"),
        (["--sparsity", "0.9", "--eps", "8/0"], "threat.eps"),
        (["--sparsity", "0.9", "--eps", "-1"], "threat.eps"),
        (["--sparsity", "0.9", "--norm", "L3"], "'L3' is not one of 'Linf', 'L2', 'L1'"),
        (["--sparsity", "0.9", "--gamma", "-1"], "prune.gamma"),
        (["--sparsity", "0.9", "--gamma", "0"], "gamma 0 leaves S2AP nothing to do"),
        (["--sparsity", "0.9", "--gamma", "nan"], "prune.gamma"),
        (["--sparsity", "0.9", "--warmup-epochs", "20"], "warmup_epochs 20 leaves S2AP none of the 20"),
        (["--sparsity", "0.9", "--search-epochs", "0"], "0 is not in the range x>=1"),
        (["--sparsity", "0.9", "--mean", "0.5"], "--mean and --std belong together"),
        (["--sparsity", "0.9", "--mean", "0.5", "--std", "half"], "'half' is not a list of numbers"),
        (["--sparsity", "0.9", "--mean", "0.5", "--std", "0"], "standard deviations positive"),
        (["--sparsity", "0.9", "--mean", "nan", "--std", "1"], "means must be finite"),
        (["--sparsity", "0.9", "--mean", "0.5,0.5", "--std", "1,1"], "is for 2 channels, the input has 1"),
        (["--sparsity", "0.9", "--data", "minst"], "did you mean mnist?"),
        (["--sparsity", "0.9", "--data", "mnist"], "mnist"),
        (["--sparsity", "0.9", "--data", "imagefolder:nowhere"], "there is no folder nowhere"),
        (["--sparsity", "0.9", "--arch", "digit-conv"], "no architecture is called 'digit-conv'"),
        (["--sparsity", "0.9", "--arch", "mnist-conv"], "does not fit mnist-conv"),
        (["--sparsity", "0.9", "--arch", "nowhere.py:net"], "there is no file nowhere.py"),
        (["--sparsity", "0.9", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--sparsity", "0.9", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["--sparsity", "0.9", "--sparsty", "0.9"], "No such option"),
        (["--sparsity", "0.9", "--run", "model.pt"], "is a file, not a run folder"),
        (["--sparsity", "0.9", "--run", "model.pt/below"], "cannot create model.pt/below"),
        (["--sparsity", "0.9", "--run", "thesis"], "thesis holds other files and is no run folder"),
    ],
)
def test_options_of_prune_that_cannot_be_used(
    options: list[str],
    message: str,
    s2ap: Callable[..., Any],
    digits_model: Path,
    files_in: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    (tmp_path / "model.pt").write_bytes(digits_model.read_bytes())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    before = files_in(tmp_path)
    done = s2ap("prune", "model.pt", *options, "--data-root", "no-data", cwd=tmp_path)
    assert_refused(done, message)
    assert only_a_run_folder_without_stages(tmp_path / "s2ap-run")
    kept = {name: data for name, data in files_in(tmp_path).items() if not name.startswith("s2ap-run/")}
    assert kept == before


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ([], "does not say which data it was trained on", "add --data"),
        (["--data", "digits"], "does not say which attack it should withstand", "add --eps"),
    ],
)
def test_what_a_foreign_checkpoint_does_not_say_is_asked_for(
    options: list[str],
    message: str,
    hint: str,
    s2ap: Callable[..., Any],
    digits_model: Path,
    tmp_path: Path,
) -> None:
    torch.save(weights(digits_model), tmp_path / "foreign.pth")
    done = s2ap("prune", "foreign.pth", "--sparsity", "0.9", *options, cwd=tmp_path)
    assert_refused(done, message)
    assert f"hint: {hint}" in done.err
    assert not (tmp_path / "s2ap-run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "dmeo"], "no recipe 'dmeo' comes with the tool; did you mean demo?"),
        (["run", "nowhere.yaml"], "there is no recipe at nowhere.yaml"),
        (["run", "bad.yaml"], "bad.yaml, line 3: unknown key prnue; did you mean prune?"),
        (["run", "own-code.yaml"], "import paths are taken only on the command line"),
        (["run", "demo", "--set", "prune.sparsity=abc"], "prune.sparsity"),
        (["run", "demo", "--set", "prune.sparsity=1.0"], "prune.sparsity"),
        (["run", "demo", "--set", "prune.sparsty=0.9"], "did you mean prune.sparsity?"),
        (["run", "demo", "--set", "sparsity"], "write it as key.path=value"),
        (
            ["run", "demo", "--set", "model.arch=file.py:net"],
            "import paths are taken only on the command line",
        ),
        (["run", "demo", "--arch", "digits-conv"], "the recipe decides on the architecture"),
        (["demo", "--sparsity", "1.0"], "is not in the range 0<x<1"),
        (["recipes", "nonsense"], "no recipe 'nonsense'"),
        (["recipes", "bad.yaml"], "unknown key prnue"),
        (["pretrain"], "pretrain needs --data, --arch, --eps"),
        (["pretrain", "--data", "digits", "--eps", "0.1"], "pretrain needs --arch"),
        (
            ["pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--output", "old.pt"],
            "old.pt exists",
        ),
        (
            ["pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--output", "x.onnx"],
            "cannot tell the format of x.onnx",
        ),
        (
            ["pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--output", "no/x.pt"],
            "there is no folder no",
        ),
        (
            ["pretrain", "--data", "digits", "--arch", "digits-conv", "--eps", "0.1", "--learning-rate", "0"],
            "pretrain.learning_rate",
        ),
        (["pretrain", "--data", "digits", "--arch", "cifar-resnet18", "--eps", "0.1"], "digits has 1x8x8"),
        (["certify"], "there is no run in s2ap-run"),
        (["export", "--onnx"], "there is no run in s2ap-run"),
        (["gate", "--min-robust", "0.4"], "there is no run in s2ap-run"),
        (["inspect", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    ],
)
def test_commands_that_cannot_begin(
    arguments: list[str],
    message: str,
    s2ap: Callable[..., Any],
    files_in: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    (tmp_path / "bad.yaml").write_text("name: mine\nmodel: {arch: digits-conv}\nprnue: {sparsity: 0.9}\n")
    (tmp_path / "old.pt").write_text("precious")
    (tmp_path / "own-code.yaml").write_text(
        "name: mine\nmodel: {arch: 'file.py:net'}\ndata: {name: digits}\nthreat: {eps: 0.1}\n"
    )
    before = files_in(tmp_path)
    done = s2ap(*arguments, cwd=tmp_path)
    assert_refused(done, message)
    assert only_a_run_folder_without_stages(tmp_path / "s2ap-run")
    kept = {name: data for name, data in files_in(tmp_path).items() if not name.startswith("s2ap-run/")}
    assert kept == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["certify", "--first", "--sample-seed", "1"], "--first and --sample-seed exclude each other"),
        (["certify", "--data", "mnist"], "--data: the run folder has already decided this"),
        (
            ["certify", "--eps", "0.2", "--norm", "L2"],
            "--eps, --norm: the run folder has already decided this",
        ),
        (["certify", "--arch", "digits-conv"], "the run folder decides on the architecture"),
        (["certify", "--n", "0"], "0 is not in the range x>=1"),
        (["certify", "--n", "501"], "501"),
        (["certify", "--n", "41"], "already holds a certify from other inputs (certify.n: 40 → 41)"),
        (["export", "--arch", "digits-conv"], "the run folder decides on the architecture"),
        (["export", "--opset", "11"], "export.opset"),
        (["export", "--opset", "21"], "already holds a export from other inputs (export.opset: 20 → 21)"),
        (["export", "--output", "s2ap-run/export/model.onnx"], "model.onnx exists"),
        (["export", "--output", "no/model.onnx"], "there is no folder no"),
        (["export", "--output", "model.tflite"], "cannot tell the format of model.tflite"),
        (["gate"], "the gate has nothing to check"),
        (["gate", "--min-robust", "40"], "--min-robust 40 is not a fraction between 0 and 1"),
        (["gate", "--min-robust", "nan"], "is not a fraction between 0 and 1"),
        (["gate", "--min-robust", "1.0"], "cannot be shown by any number of samples"),
        (["gate", "--max-drop", "-0.1"], "is not a fraction between 0 and 1"),
    ],
)
def test_a_finished_run_stays_as_it_was_when_a_command_is_refused(
    arguments: list[str],
    message: str,
    s2ap: Callable[..., Any],
    own_run: Path,
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    before = files_in(own_run)
    done = s2ap(*arguments, cwd=own_run.parent)
    assert_refused(done, message)
    after = files_in(own_run)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"manifest.json", ".lock"}
    old, new = json.loads(before["manifest.json"]), json.loads(after["manifest.json"])
    assert {**old, "commands": ()} == {**new, "commands": ()}


def test_a_run_with_another_sparsity_is_refused_and_the_recipe_stays(
    s2ap: Callable[..., Any],
    digits_model: Path,
    own_run: Path,
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    before = files_in(own_run)
    short = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--eps", "0.5"]
    done = s2ap("prune", digits_model, "--sparsity", 0.95, *short, "--threads", 1, cwd=own_run.parent)
    assert_refused(done, "already holds a search from other inputs (prune.sparsity: 0.9 → 0.95)")
    assert "--overwrite" in done.err
    assert files_in(own_run)["recipe.yaml"] == before["recipe.yaml"]


def test_a_sparsity_that_empties_a_layer_is_refused_before_the_search_begins(
    s2ap: Callable[..., Any], digits_model: Path, tmp_path: Path
) -> None:
    done = s2ap("prune", digits_model, "--sparsity", "0.99999", cwd=tmp_path)
    assert done.code == 2
    assert "keeps 2 of 151072 weights, but the 4 layers need at least 13" in done.err
    stages = json.loads((tmp_path / "s2ap-run" / "manifest.json").read_text())["stages"]
    assert list(stages) == ["pretrain"]
