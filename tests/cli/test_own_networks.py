"""Networks of the user's own with odd parts go the whole way, or are refused in one line."""

from __future__ import annotations

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
        self.matrix = nn.Parameter(torch.ones(64, 10))

    def forward(self, x):
        return x.flatten(1) @ self.matrix


def double():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).double()
"""


def prune(s2ap: Callable[..., Any], folder: Path, name: str) -> Any:
    (folder / "net.py").write_text(NETWORKS)
    spaces: dict[str, Any] = {}
    exec(NETWORKS, spaces)
    torch.manual_seed(0)
    torch.save(spaces[name]().state_dict(), folder / "model.pt")
    short = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--threads", 1]
    asked = ["--arch", f"net.py:{name}", "--data", "digits", "--eps", "0.3", "--sparsity", 0.8]
    return s2ap("prune", "model.pt", *asked, *short, cwd=folder)


@pytest.mark.parametrize("name", ["Tied", "double"])
def test_shared_weights_and_other_precisions_are_pruned_and_exported(
    name: str, s2ap: Callable[..., Any], tmp_path: Path
) -> None:
    done = prune(s2ap, tmp_path, name)
    assert done.code == 0, done.err
    exported = s2ap("export", "--onnx", "--arch", f"net.py:{name}", cwd=tmp_path)
    assert exported.code == 0, exported.err


def test_a_network_without_prunable_layers_is_refused(s2ap: Callable[..., Any], tmp_path: Path) -> None:
    done = prune(s2ap, tmp_path, "Bare")
    assert done.code == 2
    assert "there is nothing to prune" in done.err
