"""Refusals: exit code 2, one error with its code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


def code_of(done: Any) -> str:
    """The code of a refusal with --json, which is one object on stdout and one error on stderr."""
    assert done.code == 2, done.err
    answer = json.loads(done.out)
    assert answer["exit_code"] == 2
    assert answer["error"]
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
    code: str = answer["code"]
    return code


def without_runs(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith("s2ap-run/")}


def only_a_run_folder_without_stages(folder: Path) -> bool:
    """A refused command may leave the folder that it locked, and no work in it."""
    if not folder.exists():
        return True
    manifest = json.loads((folder / "manifest.json").read_text())
    return {path.name for path in folder.iterdir()} == {"manifest.json", ".lock"} and manifest["stages"] == {}


@pytest.fixture
def desk(digits_model: Path, tmp_path: Path) -> Path:
    """A folder with a model, a foreign checkpoint, recipes and files that must not be lost."""
    (tmp_path / "model.pt").write_bytes(digits_model.read_bytes())
    torch.save(weights(digits_model), tmp_path / "foreign.pth")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "old.pt").write_text("precious")
    (tmp_path / "bad.yaml").write_text("name: mine\nmodel: {arch: digits-conv}\nprnue: {sparsity: 0.9}\n")
    (tmp_path / "own-code.yaml").write_text(
        "name: mine\nmodel: {arch: 'file.py:net'}\ndata: {name: digits}\nthreat: {eps: 0.1}\n"
    )
    return tmp_path


PRUNE = "prune model.pt --sparsity 0.9"
PRETRAIN = "pretrain --data digits --arch digits-conv --eps 0.1"
PLAN = "plan --arch digits-conv"
REFUSALS = [
    # Values of options, by the constraints of the recipe's fields.
    ("prune model.pt --sparsity 1.0", "option-invalid"),
    ("prune model.pt --sparsity -0.1", "option-invalid"),
    ("prune model.pt --sparsity 0", "option-invalid"),
    ("prune model.pt --sparsity abc", "option-invalid"),
    ("prune model.pt --sparsity nan", "option-invalid"),
    ("prune nowhere.pt --sparsity 2", "option-invalid"),
    (f"{PRUNE} --eps 8/0", "option-invalid"),
    (f"{PRUNE} --eps -1", "option-invalid"),
    (f"{PRUNE} --norm L3", "option-invalid"),
    (f"{PRUNE} --gamma -1", "option-invalid"),
    (f"{PRUNE} --gamma nan", "option-invalid"),
    (f"{PRUNE} --search-epochs 0", "option-invalid"),
    (f"{PRUNE} --mean 0.5 --std half", "option-invalid"),
    (f"{PRUNE} --data minst", "option-invalid"),
    (f"{PRUNE} --seed -1", "option-invalid"),
    (f"{PRUNE} --granularity 4:2", "option-invalid"),
    (f"{PRUNE} --method hydr", "option-invalid"),
    (f"{PRUNE} --arch net.py", "option-invalid"),
    ("demo --sparsity 1.0", "option-invalid"),
    (f"{PRETRAIN} --learning-rate 0", "option-invalid"),
    ("export --opset 11", "option-invalid"),
    ("export --batch 0", "option-invalid"),
    ("export --batch 1025", "option-invalid"),
    ("export --batch -1", "option-invalid"),
    ("export --batch ²", "option-invalid"),
    ("export --batch many", "option-invalid"),
    ("export --values f8", "option-invalid"),
    ("export --encoding huffman", "option-invalid"),
    ("export --opset 11 --encoding gaps", "option-invalid"),
    ("gate --min-robust 40", "option-invalid"),
    ("gate --min-robust nan", "option-invalid"),
    ("gate --max-drop -0.1", "option-invalid"),
    ("gate --max-age soon", "option-invalid"),
    # Options that are missing or unknown.
    (f"{PRUNE} --sparsty 0.9", "option-unknown"),
    ("demo --nonsense", "option-unknown"),
    ("prune", "option-missing"),
    ("pretrain", "option-missing"),
    ("pretrain --data digits --eps 0.1", "option-missing"),
    ("recipes --json list", "usage"),
    ("nonsense", "command-unknown"),
    ("prnue model.pt", "command-unknown"),
    # Values that do not fit each other.
    ("prune model.pt", "sparsity-missing"),
    (f"{PRUNE} --gamma 0", "gamma-zero"),
    (f"{PRUNE} --warmup-epochs 20", "warmup-too-long"),
    (f"{PRUNE} --mean 0.5", "key-missing"),
    (f"{PRUNE} --mean 0.5 --std 0", "normalization-invalid"),
    (f"{PRUNE} --mean nan --std 1", "normalization-invalid"),
    (f"{PRUNE} --mean 0.5,0.5 --std 1,1", None),
    (f"{PRUNE} --steps 0.9,0.8", "steps-not-rising"),
    (f"{PRUNE} --method magnitude --s2ap", "s2ap-needs-learned-scores"),
    ("certify --full --min-robust 0.1", "gate-with-full"),
    ("certify --first --sample-seed 1", "first-with-sample-seed"),
    ("certify model.pt --artifact x.onnx", "artifact-with-network-options"),
    ("certify --artifact x.onnx --curve", "artifact-with-network-options"),
    ("certify --ap-method X", "entry-missing"),
    ("certify --ap-benchmark-entry e.json", "entry-incomplete"),
    ("certify model.pt --ap-benchmark-entry e.json --ap-method X --ap-paper p", "entry-needs-pruned-run"),
    ("plan", "model-missing"),
    ("init model.pt --mean 0.5", "normalization-incomplete"),
    # Methods, budgets and granularities that do not fit each other.
    (f"{PRUNE} --method random --s2ap", "s2ap-needs-learned-scores"),
    (f"{PRUNE} --method hydra --budget learned", "budget-unfit"),
    (f"{PRUNE} --method harp --budget erk", "budget-unfit"),
    (f"{PRUNE} --granularity 2:4", "sparsity-contradicts-pattern"),
    (f"{PRUNE} --granularity channel --budget erk", "budget-unfit"),
    (f"{PRUNE} --budget macs", "budget-unfit"),
    (f"{PRUNE} --method rst --steps 0.5", "steps-need-finetuning"),
    ("prune model.pt --keep-ratio 0.5", "keep-ratio-unused"),
    ("prune model.pt --steps 0.9,0.5 --sparsity 0.95", "steps-not-rising"),
    # Facts that a foreign checkpoint does not state.
    ("prune foreign.pth --sparsity 0.9", "data-missing"),
    ("prune foreign.pth --sparsity 0.9 --data digits", "eps-missing"),
    # Data, architectures, devices and folders that cannot be used.
    (f"{PRUNE} --data mnist", None),
    (f"{PRUNE} --data imagefolder:nowhere", None),
    (f"{PRUNE} --arch digit-conv", None),
    (f"{PRUNE} --arch mnist-conv", None),
    (f"{PRUNE} --arch nowhere.py:net", None),
    (f"{PRUNE} --device cuda:99", None),
    (f"{PRUNE} --run model.pt", None),
    (f"{PRUNE} --run model.pt/below", None),
    (f"{PRUNE} --run thesis", None),
    ("pretrain --data digits --arch cifar-resnet18 --eps 0.1", None),
    ("certify", None),
    ("export --onnx", None),
    ("gate --min-robust 0.4", None),
    ("inspect nowhere.pt", None),
    # Plans, targets and drafts.
    (f"{PLAN}", "sparsity-missing"),
    (f"{PLAN} --sparsity 1.5", "option-invalid"),
    (f"{PLAN} --granularity 5:4", "option-invalid"),
    (f"{PLAN} --sparsity 0.9 --align 8", "align-unused"),
    (f"{PLAN} --sparsity 0.9 --input-size 3,32", "option-invalid"),
    (f"{PLAN} --sparsity 0.9 --input-size 3,8,8", None),
    (f"{PLAN} --sparsity 0.9 --num-classes 1", "option-invalid"),
    (f"{PLAN} --sparsity 0.9 --target arm64", None),
    (f"{PLAN} --granularity channel --keep-ratio 0.001", None),
    (f"{PLAN} --granularity channel --keep-ratio 0.5 --sparsity 0.5", "keep-ratio-unused"),
    ("plan --arch digit-conv --sparsity 0.9", None),
    ("plan nowhere.pt --sparsity 0.9", None),
    ("targets show nope", None),
    ("targets shwo", "usage"),
    ("init nowhere.pt", None),
    ("init model.pt --output recipe.txt", "output-format-unknown"),
    ("init model.pt --output no/recipe.yaml", "folder-missing"),
    ("init model.pt --data imagenet", "option-invalid"),
    ("init model.pt --eps 0", "option-invalid"),
    ("init model.pt --keep 0.5", None),
    ("init model.pt --sparsity 1", "option-invalid"),
    # Outputs.
    (f"{PRETRAIN} --output old.pt", "output-exists"),
    (f"{PRETRAIN} --output x.onnx", "output-format-unknown"),
    (f"{PRETRAIN} --output no/x.pt", "folder-missing"),
    # Recipes.
    ("run dmeo", "recipe-unknown"),
    ("recipes nonsense", "recipe-unknown"),
    ("run nowhere.yaml", "recipe-missing"),
    ("run bad.yaml", "key-unknown"),
    ("recipes bad.yaml", "key-unknown"),
    ("run own-code.yaml", "architecture-not-registered"),
    ("run demo --set model.arch=file.py:net", "architecture-not-registered"),
    ("run demo --set prune.sparsity=abc", "value-invalid"),
    ("run demo --set prune.sparsity=1.0", "value-invalid"),
    ("run demo --set prune.sparsty=0.9", "key-unknown"),
    ("run demo --set sparsity", "override-malformed"),
    ("run demo --arch digits-conv", "arch-already-decided"),
    ("sweep demo --seeds 0", "option-invalid"),
]


@pytest.mark.parametrize(("line", "code"), REFUSALS)
def test_a_refused_command_leaves_everything_as_it_was(
    line: str, code: str | None, s2ap: Callable[..., Any], files_in: Callable[..., Any], desk: Path
) -> None:
    before = files_in(desk)
    command, *rest = line.split()
    where = ["--data-root", "no-data"] if command == "prune" and rest else []
    found = code_of(s2ap(command, *rest, *where, "--json", cwd=desk))
    assert found == code if code is not None else found not in ("internal", "option-invalid")
    assert only_a_run_folder_without_stages(desk / "s2ap-run")
    assert without_runs(files_in(desk)) == before


@pytest.mark.parametrize(
    "build",
    [
        truncated,
        text,
        empty,
        folder,
        dangerous,
        dangerous_legacy,
        dangerous_plain,
        not_finite,
        seven_classes,
        unknown_network,
    ],
)
@pytest.mark.parametrize("command", ["prune", "certify"])
def test_checkpoints_that_cannot_be_used(
    command: str,
    build: Callable[[Path, Path], None],
    s2ap: Callable[..., Any],
    digits_model: Path,
    files_in: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    build(digits_model, tmp_path / "bad.pt")
    before = files_in(tmp_path)
    sparsity = ["--sparsity", 0.9] if command == "prune" else []
    code = code_of(s2ap(command, "bad.pt", *sparsity, *FOREIGN, "--json", cwd=tmp_path))
    assert code != "internal"
    assert ("pickle" in code) == (build in (dangerous, dangerous_legacy, dangerous_plain))
    assert not (tmp_path / "marker").exists()
    assert only_a_run_folder_without_stages(tmp_path / "s2ap-run")
    assert without_runs(files_in(tmp_path)) == before


def test_without_json_a_refusal_is_text_with_a_hint(s2ap: Callable[..., Any], desk: Path) -> None:
    done = s2ap("prune", "foreign.pth", "--sparsity", "0.9", cwd=desk)
    assert (done.code, done.out) == (2, "")
    first, second = done.err.splitlines()
    assert first.startswith("error: foreign.pth ")
    assert second.startswith("  hint: add --data")


def test_a_trusted_pickle_is_run(s2ap: Callable[..., Any], digits_model: Path, tmp_path: Path) -> None:
    dangerous(digits_model, tmp_path / "bad.pt")
    done = s2ap("inspect", "bad.pt", "--trust-pickle", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "marker").exists()
    assert "posix.system" in json.dumps(json.loads(done.out)["notes"])


FINISHED = [
    ("certify --data mnist", "already-decided"),
    ("certify --eps 0.2 --norm L2", "already-decided"),
    ("certify --arch digits-conv", "arch-already-decided"),
    ("certify --n 0", "option-invalid"),
    ("certify --n 501", None),
    ("certify --full --min-robust 0.5", "gate-with-full"),
    ("certify --full --gate point", "gate-with-full"),
    ("certify --gate point", None),
    ("certify --min-robust nan", "option-invalid"),
    ("certify --max-drop 0", None),
    ("certify --n 41", None),
    ("certify model.pt --eps 0.5 --n 40", "run-holds-pruned-network"),
    ("export --arch digits-conv", "arch-already-decided"),
    ("export --opset 21", None),
    ("export --values float16", None),
    ("export --output s2ap-run/export/model.onnx", "output-exists"),
    ("export --output no/model.onnx", "folder-missing"),
    ("export --output model.tflite", "output-format-unknown"),
    ("gate", None),
    ("gate --min-robust 1.0", None),
    ("gate --min-robust 0.4 --junit s2ap-run/x.xml", "report-place-invalid"),
    ("gate --min-robust 0.4 --junit no/x.xml", "folder-missing"),
    ("gate --min-robust 0.4 --junit x --sarif x", "reports-share-file"),
    ("verify s2ap-run/certify/pruned.json --in-toto s2ap-run/s.json", "output-inside-run"),
    ("prune model.pt --sparsity 0.95 --search-epochs 1 --finetune-epochs 1 --eps 0.5", None),
]


@pytest.mark.parametrize(("line", "code"), FINISHED)
def test_a_finished_run_stays_as_it_was_when_a_command_is_refused(
    line: str,
    code: str | None,
    s2ap: Callable[..., Any],
    digits_model: Path,
    own_run: Path,
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    (own_run.parent / "model.pt").write_bytes(digits_model.read_bytes())
    before = files_in(own_run)
    found = code_of(s2ap(*line.split(), "--json", cwd=own_run.parent))
    assert found == code if code is not None else found != "internal"
    after = files_in(own_run)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"manifest.json", ".lock"}
    old, new = json.loads(before["manifest.json"]), json.loads(after["manifest.json"])
    assert {**old, "commands": ()} == {**new, "commands": ()}


def test_a_sparsity_that_empties_a_layer_is_refused_before_the_search_begins(
    s2ap: Callable[..., Any], digits_model: Path, tmp_path: Path
) -> None:
    code_of(s2ap("prune", digits_model, "--sparsity", "0.99999", "--json", cwd=tmp_path))
    stages = json.loads((tmp_path / "s2ap-run" / "manifest.json").read_text())["stages"]
    assert list(stages) == ["pretrain"]
