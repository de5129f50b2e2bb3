"""``init``: a recipe that ``run`` takes as it is, guesses that are named, one blank at most."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.recipe import catalog

QUIET = ["--threads", 1, "--workers", 1, "--quiet"]


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch) -> None:
    """What the suite was started with is not what these commands are about."""
    monkeypatch.delenv("S2AP_DATA_ROOT", raising=False)


def foreign(path: Path, arch: str, classes: int | None = None) -> Path:
    torch.manual_seed(0)
    torch.save({"state_dict": registry.build(arch, classes).state_dict()}, path)
    return path


def test_a_checkpoint_of_ours_needs_nothing(digits_model, tmp_path, s2ap) -> None:
    (tmp_path / "model.pt").write_bytes(digits_model.read_bytes())
    done = s2ap.ok("init", "model.pt", cwd=tmp_path)
    assert done.out.splitlines() == ["wrote recipe.yaml", "next: s2ap-deploy run recipe.yaml"]
    recipe = catalog.load(str(tmp_path / "recipe.yaml"))
    assert (recipe.model.arch, recipe.model.checkpoint) == ("digits-conv", "model.pt")
    assert (recipe.data.name, str(recipe.threat)) == ("digits", "Linf eps 0.1")
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.startswith("# Written by: s2ap-deploy init model.pt")
    assert text.count("  # ") > 10


def test_run_accepts_it_as_it_is(digits_model, tmp_path, s2ap) -> None:
    (tmp_path / "model.pt").write_bytes(digits_model.read_bytes())
    assert s2ap("init", "model.pt", "--output", "mine.yaml", "--eps", "0.5", cwd=tmp_path).code == 0
    short = ["prune.search.epochs=1", "prune.finetune.epochs=1", "certify.n=20", "prune.warmup_epochs=0"]
    overrides = [word for each in short for word in ("--set", each)]
    done = s2ap("run", "mine.yaml", *overrides, *QUIET, cwd=tmp_path)
    assert done.code in (0, 1, 3), done.err
    assert (tmp_path / "s2ap-run" / "export" / "model.onnx").exists()
    assert "gate" in done.out


@pytest.mark.parametrize(
    ("arch", "classes", "data", "eps", "others"),
    [
        ("mnist-conv", None, "mnist", "0.3", None),
        ("cifar-resnet20", 10, "cifar10", "8/255", "svhn"),
        ("cifar-resnet20", 100, "cifar100", "8/255", None),
    ],
)
def test_a_foreign_file_gets_guesses_that_are_named(tmp_path, s2ap, arch, classes, data, eps, others) -> None:
    foreign(tmp_path / "foreign.pth", arch, classes)
    told = s2ap.json("init", "foreign.pth", cwd=tmp_path)
    assert (told["guesses"], told["blanks"]) == (["data.name", "threat.eps"], [])
    assert told["command"] == "s2ap-deploy run recipe.yaml --data-root data --download"
    recipe = catalog.load(str(tmp_path / "recipe.yaml"))
    assert (recipe.data.name, recipe.threat.eps, recipe.model.arch) == (data, eps, arch)
    text = (tmp_path / "recipe.yaml").read_text()
    assert "a guess from the input" in text
    assert (f"{others} has the same shape" in text) == (others is not None)


def test_data_that_lie_where_run_looks_are_not_fetched(tmp_path, s2ap, monkeypatch) -> None:
    foreign(tmp_path / "foreign.pth", "mnist-conv")
    told = ["init", "foreign.pth", "--overwrite", "--json"]

    def command() -> str:
        return str(json.loads(s2ap(*told, cwd=tmp_path).out)["command"])

    monkeypatch.setenv("S2AP_DATA_ROOT", str(tmp_path / "sets"))
    assert command() == "s2ap-deploy run recipe.yaml --download"
    (tmp_path / "sets" / "MNIST" / "raw").mkdir(parents=True)
    assert command() == "s2ap-deploy run recipe.yaml"
    monkeypatch.delenv("S2AP_DATA_ROOT")
    assert command() == "s2ap-deploy run recipe.yaml --data-root data --download"
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    assert command() == "s2ap-deploy run recipe.yaml"


def test_data_that_nobody_can_guess_are_the_one_blank_and_run_names_it(tmp_path, s2ap) -> None:
    foreign(tmp_path / "foreign.pth", "cifar-resnet20", 7)
    done = s2ap.ok("init", "foreign.pth", cwd=tmp_path)
    assert "blank, to be filled in: data.name" in done.out
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.count("<- FILL IN") == 1
    line = 1 + next(number for number, each in enumerate(text.splitlines()) if "<- FILL IN" in each)
    refused = s2ap.refused("value-invalid", "run", "recipe.yaml", *QUIET, cwd=tmp_path)
    assert refused.answer["error"].startswith(f"recipe.yaml, line {line}: data.name")
    (tmp_path / "recipe.yaml").write_text(text.replace("name: null", "name: imagefolder:photos"))
    assert catalog.load(str(tmp_path / "recipe.yaml")).data.size == (3, 32, 32)


def test_options_are_taken_as_they_are(tmp_path, s2ap) -> None:
    foreign(tmp_path / "foreign.pth", "cifar-resnet20")
    asked = ["--data", "svhn", "--eps", "0.5", "--norm", "L2", "--sparsity", 0.75]
    norm = ["--mean", "0.49,0.48,0.45", "--std", "0.25,0.24,0.26"]
    done = s2ap("init", "foreign.pth", *asked, *norm, "--json", cwd=tmp_path)
    assert done.answer["guesses"] == []
    recipe = catalog.load(str(tmp_path / "recipe.yaml"))
    assert recipe.prune is not None
    assert recipe.model.normalization is not None
    assert (recipe.data.name, str(recipe.threat), recipe.prune.sparsity) == ("svhn", "L2 eps 0.5", 0.75)
    assert recipe.model.normalization.mean == (0.49, 0.48, 0.45)


def test_code_of_ones_own_goes_into_the_command_and_never_into_the_recipe(tmp_path, s2ap) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def small(num_classes=10):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "small.input_size = (1, 8, 8)\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), tmp_path / "own.pt")
    done = s2ap.ok("init", "own.pt", "--arch", "net.py:small", "--json", cwd=tmp_path)
    assert done.answer["command"] == "s2ap-deploy run recipe.yaml --arch net.py:small"
    recipe = catalog.load(str(tmp_path / "recipe.yaml"))
    assert (recipe.model.arch, recipe.data.name) == (None, "digits")


def test_a_file_that_is_there_stays(digits_model, tmp_path, s2ap) -> None:
    (tmp_path / "recipe.yaml").write_text("mine\n")
    s2ap.refused("output-exists", "init", digits_model, cwd=tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "mine\n"
    assert s2ap("init", digits_model, "--overwrite", cwd=tmp_path).code == 0
    assert catalog.load(str(tmp_path / "recipe.yaml")).model.checkpoint == str(digits_model)


def test_an_odd_name_breaks_neither_comment_nor_recipe(digits_model, tmp_path, s2ap) -> None:
    odd = tmp_path / "a: b\n# c 'd' [é].pt"
    odd.write_bytes(digits_model.read_bytes())
    assert s2ap("init", odd.name, cwd=tmp_path).code == 0
    recipe = catalog.load(str(tmp_path / "recipe.yaml"))
    assert recipe.model.checkpoint == odd.name
    assert checkpoint.read_tensors(tmp_path / recipe.model.checkpoint).info is not None
