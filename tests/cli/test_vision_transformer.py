"""torchvision's vision transformer on 32x32 images goes the whole way, at 90% of all its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

NETWORK = """
import torch
from torch import nn
from torchvision.models import VisionTransformer


class Enlarged(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
            num_classes=num_classes,
        )

    def forward(self, x):
        return self.net(nn.functional.interpolate(x.expand(-1, 3, -1, -1), scale_factor=4))


def make(num_classes=10):
    return Enlarged(num_classes)


make.input_size = (1, 8, 8)
"""
# The patches, two blocks of attention (queries, keys, values; output) and two layers each, and the head.
WEIGHTS = 3 * 8 * 8 * 32 + 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64) + 32 * 10


@pytest.mark.slow
def test_a_vision_transformer_is_pruned_certified_exported_and_gated(
    s2ap: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "vit.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    torch.manual_seed(0)
    network = space["make"]()
    torch.nn.init.normal_(network.net.heads.head.weight)  # torchvision starts at zero, without a gradient
    torch.save(network.state_dict(), tmp_path / "vit.pt")
    here, threads = ["--arch", "vit.py:make"], ["--threads", 1]
    short = ["--search-epochs", 1, "--finetune-epochs", 1, "--warmup-epochs", 0, "--loss", "at", *threads]
    task = ["--data", "digits", "--eps", "0.05", "--sparsity", 0.9]
    for command in (
        ["prune", "vit.pt", *task, *short, *here],
        ["certify", "--n", 20, "--workers", 1, *threads, *here],
        ["export", "--onnx", *here],
        ["gate", "--min-clean", 0, "--rule", "point"],
    ):
        done = s2ap(*command, cwd=tmp_path)
        assert done.code == 0, done.err
    run = tmp_path / "s2ap-run"
    apart = ("network.net.class_token", "network.net.encoder.pos_embedding")
    tensors = load_file(run / "finetune" / "model.safetensors")
    weights = [t for name, t in tensors.items() if t.dim() >= 2 and name not in apart]
    assert sum(tensor.numel() for tensor in weights) == WEIGHTS
    zeros = sum(int((tensor == 0).sum()) for tensor in weights)
    assert zeros == pytest.approx(0.9 * WEIGHTS, abs=1)
    subject = json.loads((run / "certify" / "pruned.json").read_text())["subject"]
    assert subject["sparsity"] == pytest.approx(zeros / WEIGHTS)
    assert (subject["weights"]["counted"], subject["weights"]["outside"]) == (WEIGHTS, [])
    assert subject["weights"]["tables"] == (1 + 17) * 32
