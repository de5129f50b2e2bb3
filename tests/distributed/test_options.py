"""Options that have to get along with several ranks, through real processes over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TRAIN = ["--data", "digits", "--eps", "0.25", "--loss", "at", "--batch-size", 400]
SHORT = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--batch-size", 400]
ARCH = ["--arch", "own_net.py:build"]
OWN_NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.convolution = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outer)

    def forward(self, x):
        return self.norm(self.convolution(x)).relu()

def build(num_classes=10):
    return nn.Sequential(Block(1, 8), Block(8, 8), nn.Flatten(), nn.Linear(8 * 64, num_classes))
"""
pytestmark = pytest.mark.slow


def tool(folder: Path, *arguments: object) -> str:
    """What the command says to people."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "s2ap_deploy", *map(str, arguments)],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def apart(one: Path, other: Path) -> float:
    """The largest relative L2 distance of any tensor."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    norms = {name: float(tensor.float().norm()) for name, tensor in theirs.items()}
    return max(
        float((ours[name].float() - tensor.float()).norm()) / max(norms[name], 1e-9)
        for name, tensor in theirs.items()
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with an architecture in a file and a network of it, trained by one process."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "own_net.py").write_text(OWN_NET)
    tool(folder, "pretrain", *TRAIN, *ARCH, "--epochs", 2, "--run", "alone", "--threads", 1)
    return folder


def test_an_architecture_from_a_file_and_a_curve_over_two_ranks(home) -> None:
    """Two networks of one file are attacked at once; distances and verdicts are those of one process."""
    tool(home, "pretrain", *TRAIN, *ARCH, "--epochs", 2, "--run", "pair", "--devices", 2)
    one, two = (home / run / "pretrain" / "model.safetensors" for run in ("alone", "pair"))
    assert apart(two, one) < 1e-2
    tool(home, "prune", one, "--sparsity", 0.8, *ARCH, *SHORT, "--run", "two", "--devices", 2)
    subprocess.run(["cp", "-r", "two", "one"], cwd=home, check=True)
    certify = ["certify", *ARCH, "--n", 60, "--curve"]
    tool(home, *certify, "--run", "two", "--devices", 2)
    tool(home, *certify, "--run", "one", "--workers", 2, "--threads", 1)
    for role in ("dense", "pruned"):
        ours, theirs = (
            [
                json.loads((home / run / "certify" / f"{role}{kind}.json").read_text())
                for kind in ("", "-curve")
            ]
            for run in ("two", "one")
        )
        assert ours[0]["samples"] == theirs[0]["samples"]
        assert ours[0]["robust"] == theirs[0]["robust"]
        assert ours[1] == theirs[1], "the curve"
        assert max(ours[1]["accuracy"]) > 0


def test_a_compiled_network_trains_over_two_ranks(home) -> None:
    """With BatchNorm, whose statistics the ranks share inside of what is compiled, and S2AP."""
    model = home / "alone" / "pretrain" / "model.safetensors"
    prune = ["prune", model, "--sparsity", 0.8, *ARCH, *SHORT, "--s2ap", "--warmup-epochs", 0]
    said = tool(home, *prune, "--run", "compiled", "--devices", 2, "--compile")
    assert "could not be compiled" not in said
    assert "recompile_limit" not in said
    tool(home, *prune, "--run", "plain", "--threads", 1)
    found, expected = (
        load_file(home / run / "search" / "scores.safetensors") for run in ("compiled", "plain")
    )
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) < 1e-3 * float(tensor.norm()), name
    record = json.loads((home / "compiled" / "manifest.json").read_text())["stages"]["search"]
    assert record["sessions"][0]["environment"]["compiled"] is True
    assert record["sessions"][0]["environment"]["ranks"] == 2
