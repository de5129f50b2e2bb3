"""What a certificate speaks of, read again from the file that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from s2ap_deploy.certify.attacks.judge import Answers, ArtefactJudge, Judge
from s2ap_deploy.exporting.opened import read
from s2ap_deploy.exporting.twins.twin import OnnxTwin
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.pipeline.jobs.job import read_classifier
from s2ap_deploy.pipeline.jobs.machine import Machine


@dataclass(frozen=True, eq=False)
class Suspect:
    """What a certificate speaks of: a network, or a file with its differentiable twin.

    ``answers`` are the file's. ``size`` is (C, H, W).
    """

    network: nn.Module
    answers: Answers | None
    size: tuple[int, int, int]
    weights_sha256: str

    def judge(self, machine: Machine) -> Judge:
        if self.answers is None:
            return Judge(self.network, machine.device)
        return ArtefactJudge(self.network, self.answers, machine.device)


def suspect_network(path: Path, machine: Machine) -> Suspect:
    """The network in the checkpoint at ``path``, which answers for itself."""
    classifier, info = read_classifier(path, machine)
    return Suspect(classifier, None, info.preprocessing.size, weights_hash(classifier))


def suspect_file(path: Path) -> Suspect:
    """The exported file at ``path``: it gives the answers, its twin the gradients."""
    opened = read(path)
    twin = OnnxTwin(opened.model)
    judge = ArtefactJudge(twin, opened.answers, torch.device("cpu"))
    return Suspect(twin, opened.answers, opened.input_size, weights_hash(judge.network))
