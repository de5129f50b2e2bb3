"""Six small networks of one odd kind of layer each, by weight, float and int8, to a verdict of the gate."""

import json

import pytest
import torch
from safetensors.torch import load_file

NETWORKS = """
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(1, 16, 2, 2), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x.squeeze(1))))).mean(2))


class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.head = nn.Parameter(0.3 * torch.randn(16, 1, 3, 3)), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(F.relu(F.conv2d(x, self.kernel, padding=1)).mean((2, 3)))


def ended(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def upwards():
    up = nn.ConvTranspose2d(8, 12, 4, 2, 1)
    return ended(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), up, nn.ReLU(), width=12)


def normed():
    weight_norm = nn.utils.parametrizations.weight_norm
    return ended(weight_norm(nn.Conv2d(1, 16, 3)), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), width=16)


def sloped():
    return ended(nn.Conv2d(1, 16, 3), nn.PReLU(16), nn.Conv2d(16, 16, 3), nn.PReLU(), width=16)


for each in (Attention, Rows, Parameters, upwards, normed, sloped):
    each.input_size = (1, 8, 8)
"""
# Entries of the weights, by definition of the layers.
WEIGHTS = {
    "Attention": 16 * 4 + 3 * 256 + 256 + 160,
    "Rows": 8 * 16 * 3 + 16 * 16 * 3 + 160,
    "Parameters": 16 * 9 + 160,
    "upwards": 8 * 9 + 8 * 12 * 16 + 120,
    "normed": 16 * 9 + 16 * 16 * 9 + 160,
    "sloped": 16 * 9 + 16 * 16 * 9 + 160,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_true_sparsity_everywhere_and_a_verdict_float_and_int8(name, s2ap, tmp_path) -> None:
    (tmp_path / "net.py").write_text(NETWORKS)
    space: dict[str, object] = {}
    exec(NETWORKS, space)
    torch.manual_seed(0)
    torch.save(space[name]().state_dict(), tmp_path / "model.pt")  # type: ignore[operator]
    here, few = ("--arch", f"net.py:{name}"), ("--n", 10, "--workers", 1, "--threads", 1)
    short = ("--search-epochs", 1, "--finetune-epochs", 1, "--warmup-epochs", 0, "--loss", "at")
    task = ("--data", "digits", "--eps", "0.05", "--sparsity", 0.9, "--threads", 1)
    run = tmp_path / "s2ap-run"
    s2ap.ok("prune", "model.pt", *here, *task, *short, cwd=tmp_path)
    s2ap.ok("certify", *few, *here, cwd=tmp_path)
    s2ap.ok("export", "--onnx", *here, cwd=tmp_path)
    s2ap.ok("export", "--int8", *here, cwd=tmp_path)
    s2ap.ok("certify", "--artifact", run / "export-int8" / "model-int8.onnx", *few, cwd=tmp_path)
    assert s2ap("gate", "--min-clean", 0, "--rule", "point", cwd=tmp_path).code in (0, 3)
    # Counted from the saved file, and stated by every report.
    tensors = load_file(run / "finetune" / "model.safetensors").values()
    weights = [tensor for tensor in tensors if tensor.dim() >= 2]
    assert sum(tensor.numel() for tensor in weights) == WEIGHTS[name]
    true = sum(int((tensor == 0).sum()) for tensor in weights) / WEIGHTS[name]
    assert true == pytest.approx(0.9, abs=1 / WEIGHTS[name])

    def read(path: str) -> dict:
        return json.loads((run / path).read_text())

    assert read("certify/pruned.json")["subject"]["sparsity"] == pytest.approx(true)
    exported = read("export/report.json")
    assert exported["sparsity"] >= true - 1e-9  # removed channels count as zeros
    assert exported["agreement"]["max_logit_difference"] <= exported["agreement"]["tolerance"]
    quantized = read("export-int8/report.json")["sparsity"]
    assert read("artifact-int8/certificate.json")["subject"]["sparsity"] == pytest.approx(quantized)
