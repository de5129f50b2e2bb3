"""Networks of the user's own with odd parts go the whole way, or are refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

NETWORKS = """
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 10))

    def forward(self, x):
        return x.flatten(1) @ self.matrix


class Computed(Bare):
    def forward(self, x):
        return x.flatten(1) @ (self.matrix - self.matrix.mean())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        self.computed = Computed()
        self.computed.matrix = nn.Parameter(torch.randn(48, 12))
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        return self.head(torch.relu(self.computed(torch.relu(self.first(x[:, 0])))))


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.dark, self.bright = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        layer = self.bright if float(x.detach().mean()) > 0.31 else self.dark
        return layer(x.flatten(1))


class Cut(Bare):
    def forward(self, x):
        return super().forward(x).detach()


def double():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).double()
"""


def prune(s2ap: Callable[..., Any], folder: Path, name: str, *options: str) -> Any:
    (folder / "net.py").write_text(NETWORKS)
    spaces: dict[str, Any] = {}
    exec(NETWORKS, spaces)
    torch.manual_seed(0)
    torch.save(spaces[name]().state_dict(), folder / "model.pt")
    short = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--threads", 1]
    asked = ["--arch", f"net.py:{name}", "--data", "digits", "--eps", "0.3", "--sparsity", 0.8]
    return s2ap("prune", "model.pt", *asked, *short, *options, cwd=folder)


@pytest.mark.parametrize("name", ["Tied", "double", "Bare"])
def test_shared_weights_and_other_precisions_are_pruned_and_exported(name, s2ap, tmp_path) -> None:
    done = prune(s2ap, tmp_path, name)
    assert done.code == 0, done.err
    exported = s2ap("export", "--onnx", "--arch", f"net.py:{name}", cwd=tmp_path)
    assert exported.code == 0, exported.err


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Computed", "prunable-layers-missing"),
        ("Mixed", "sparsity-unaffordable"),
        ("Forked", "path-depends-on-images"),
        ("Cut", "logits-without-gradient"),
    ],
)
def test_what_cannot_be_pruned_as_asked_is_refused_before_the_search(name, code, s2ap, tmp_path) -> None:
    done = prune(s2ap, tmp_path, name, "--json")
    assert done.code == 2
    assert json.loads(done.out)["code"] == code
    assert not (tmp_path / "s2ap-run" / "search").exists()


def test_both_figures_are_reported_where_weights_stay_unpruned(s2ap, tmp_path) -> None:
    done = prune(s2ap, tmp_path, "Mixed", "--allow-unpruned", "--json")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "s2ap-run" / "manifest.json").read_text())["stages"]["search"]["results"]
    weights = found["weights"]
    assert (weights["counted"], weights["prunable"]) == (192 + 576 + 120, 192 + 120)
    assert [each["name"] for each in weights["outside"]] == ["network.computed.matrix"]
    assert found["kept"] == 576 + 62
    assert found["sparsity"] == pytest.approx(1 - 638 / 888)
    assert "80.13% of the weights that can be pruned, 28.15% of all" in " ".join(done.err.split())


def test_a_clean_accuracy_below_what_is_expected_is_refused_before_any_work(
    s2ap: Callable[..., Any], tmp_path: Path
) -> None:
    done = prune(s2ap, tmp_path, "double", "--expect-clean", "0.83", "--json")
    assert done.code == 2
    assert json.loads(done.out)["code"] == "clean-accuracy-unexpected"
    assert "clean accuracy" in done.err
    assert not (tmp_path / "s2ap-run" / "pretrain").exists()
    allowed = prune(s2ap, tmp_path, "double", "--expect-clean", "0.05")
    assert allowed.code == 0, allowed.err
    assert "may have been trained on them" in " ".join(allowed.err.split())


def test_a_network_is_pruned_in_the_folder_that_trained_it(s2ap: Callable[..., Any], tmp_path: Path) -> None:
    task = ["--data", "digits", "--eps", "0.1", "--threads", 1]
    trained = s2ap(
        "pretrain", "--arch", "digits-conv", *task, "--epochs", 1, "--output", "model.pt", cwd=tmp_path
    )
    assert trained.code == 0, trained.err
    assert "next: s2ap-deploy prune model.pt --sparsity 0.9" in trained.err
    short = ["--sparsity", 0.9, "--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--threads", 1]
    ready = s2ap("prune", "model.pt", *short, "--dry-run", cwd=tmp_path)
    assert ready.code == 0, ready.err
    pruned = s2ap("prune", "model.pt", *short, cwd=tmp_path)
    assert pruned.code == 0, pruned.err
    assert "the one that this run folder trained" in pruned.err
    refused = s2ap("prune", "model.pt", *short, "--eps", "0.2", "--dry-run", cwd=tmp_path)
    assert refused.code == 2
    assert "refused" in refused.out
