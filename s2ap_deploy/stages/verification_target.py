"""What a certificate speaks of, read again from the file that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from s2ap_deploy.evaluation.autoattack.frozen_model import FrozenModel, LogitsFn, OnnxModel
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.onnx_export.onnx_file import load
from s2ap_deploy.onnx_export.torch_backend.onnx_module import OnnxModule
from s2ap_deploy.stages.context import read_classifier
from s2ap_deploy.stages.execution import ExecutionConfig


@dataclass(frozen=True, eq=False)
class VerificationTarget:
    """What a certificate speaks of: a network, or a file with its differentiable twin.

    ``answers`` are the file's. ``size`` is (C, H, W).
    """

    network: nn.Module
    answers: LogitsFn | None
    size: tuple[int, int, int]
    weights_sha256: str

    def judge(self, machine: ExecutionConfig) -> FrozenModel:
        if self.answers is None:
            return FrozenModel(self.network, machine.device)
        return OnnxModel(self.network, self.answers, machine.device)


def suspect_network(path: Path, machine: ExecutionConfig) -> VerificationTarget:
    """The network in the checkpoint at ``path``, which answers for itself."""
    classifier, info = read_classifier(path, machine)
    return VerificationTarget(classifier, None, info.preprocessing.size, weights_hash(classifier))


def suspect_file(path: Path) -> VerificationTarget:
    """The exported file at ``path``: it gives the answers, its twin the gradients."""
    opened = load(path)
    twin = OnnxModule(opened.model)
    judge = OnnxModel(twin, opened.answers, torch.device("cpu"))
    return VerificationTarget(twin, opened.answers, opened.input_size, weights_hash(judge.network))
