"""The file is the judge: gradients are the twin's, every answer is the file's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.evaluation.autoattack import cascade
from s2ap_deploy.evaluation.autoattack.cascade import AttackConfig
from s2ap_deploy.evaluation.autoattack.frozen_model import OnnxModel
from s2ap_deploy.spec import ThreatModel

CPU = torch.device("cpu")


class LogitsFn:
    """A network as a file would be: pixels in, logits out. Counts what it is asked."""

    def __init__(self, network: nn.Module, shift: float = 0.0) -> None:
        self.network = network
        self.shift = shift
        self.asked = 0

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        assert images.dtype == np.float32
        self.asked += len(images)
        with torch.no_grad():
            found: NDArray[np.float32] = self.network(torch.from_numpy(images)).numpy()
        found[:, 0] += np.float32(self.shift)
        return found


def test_the_files_word_counts(robust_network, digits) -> None:
    images, labels = digits[0][:20], digits[1][:20]
    judge = OnnxModel(robust_network, LogitsFn(robust_network, shift=1e4), CPU)
    assert (judge.logits(images, 7).argmax(1) == 0).all()
    broken, _, predictions = judge.confirm(images, images, labels, ThreatModel(eps="0.1"))
    assert (predictions == 0).all()
    assert torch.equal(broken, labels != 0)
    assert torch.equal(judge(images), robust_network(images))  # attacks follow the twin


def test_square_asks_the_file_only(robust_network, digits) -> None:
    answers = LogitsFn(robust_network)
    judge = OnnxModel(robust_network, answers, CPU)
    assert torch.equal(judge.black_box(digits[0][:3]), robust_network(digits[0][:3]))
    assert answers.asked == 3
    judge(digits[0][:3])
    assert answers.asked == 3


def test_a_file_that_says_nan(robust_network, digits) -> None:
    judge = OnnxModel(robust_network, LogitsFn(robust_network, shift=np.nan), CPU)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "logits-not-finite"):
        judge.logits(digits[0][:3], 3)


@pytest.mark.usefixtures("short")
def test_cascade_with_the_files_answers(robust_network, digits) -> None:
    images, labels = digits[0][1200:1216], digits[1][1200:1216]
    config = AttackConfig(threat=ThreatModel(eps="0.2"), seed=0, device=CPU)
    plain = cascade.attack(robust_network, images, labels, config, workers=1)
    config = replace(config, answers=LogitsFn(robust_network))
    same = cascade.attack(robust_network, images, labels, config, workers=1)
    assert same.broken_by == plain.broken_by
    assert torch.equal(same.adversarial, plain.adversarial)
    # A file that answers 0 to everything: only what is really a 0 can stand, whatever the twin says.
    config = replace(config, answers=LogitsFn(robust_network, shift=1e4))
    stuck = cascade.attack(robust_network, images, labels, config, workers=1)
    assert [by is None for by in stuck.broken_by] == (labels == 0).tolist()
