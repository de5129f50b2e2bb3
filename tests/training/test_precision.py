"""Precision: bf16 inside the network only, everything that learns in float32, all settings put back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from s2ap_deploy.errors import UsageError
from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search import Perturbation, search
from s2ap_deploy.recipe.sections import SearchSection, TrainSection
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.precision import FLOAT32, Precision, choose_precision
from s2ap_deploy.training.train import TrainingData, TrainingEnvironment, train

CPU = torch.device("cpu")
BF16 = Precision(bf16=True)
KEEP = {"0.weight": 20, "4.weight": 60}
LOSSES = ("at", "trades", "mart", "fast", "free")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def objective(loss: str) -> Objective:
    steps = None if loss in ("fast", "free") else 2
    return Objective(ThreatModel(eps="0.1"), loss=loss, attack_steps=steps, replays=2)


def env(precision: Precision, recorder: Silent | None = None) -> TrainingEnvironment:
    return TrainingEnvironment(CPU, precision=precision, recorder=recorder or Silent())


class Watching(Silent):
    """Notes what a loop warns of, and the types of what it has at every step."""

    def __init__(self, look: Callable[[], torch.dtype] | None = None) -> None:
        self.look = look
        self.warnings: list[str] = []
        self.types: set[torch.dtype] = set()

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def advance(self, steps: int = 1) -> None:
        if self.look is not None:
            self.types.add(self.look())


def test_the_layers_compute_in_bf16_and_the_answer_is_float32() -> None:
    model = network()
    inside: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    images = torch.rand(4, 1, 8, 8)
    with BF16.apply(model, pytest.fail):
        logits = model(images)
    assert inside == [torch.bfloat16]
    assert logits.dtype == torch.float32
    assert "forward" not in vars(model)
    exact = model(images)
    assert inside[1] == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(logits, exact)


def test_all_is_put_back_when_a_step_fails() -> None:
    model = network()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        computing = Precision(bf16=True, tf32=tf32).apply(model, pytest.fail)
        with computing:
            assert torch.backends.cuda.matmul.allow_tf32 is tf32
            assert torch.backends.cudnn.allow_tf32 is tf32
        with pytest.raises(KeyError), computing:
            raise KeyError
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
        assert "forward" not in vars(model)
        with computing, pytest.raises(RuntimeError, match="already active"):
            computing.__enter__()


def test_a_copy_made_inside_computes_with_its_own_weights() -> None:
    model = network()
    images = torch.rand(2, 1, 8, 8)
    with BF16.apply(model, pytest.fail):
        twin = copy.deepcopy(model)
    nn.init.zeros_(twin[4].weight)
    assert torch.equal(twin(images), twin[4].bias.expand(2, 3).bfloat16().float())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_bf16_search_keeps_scores_and_budget_exact(stripes, loss) -> None:
    model = network()
    scored = ScoredNetwork(model, Weights(tuple(KEEP)), Fixed(KEEP))
    watching = Watching(lambda: next(iter(scored.scores.values())).dtype)
    result = search(
        scored,
        TrainingData(stripes(34), stripes(20)),
        SearchSection(epochs=1, batch_size=16),
        objective(loss),
        env(BF16, watching),
        perturbation=Perturbation(0.05, 0),
    )
    assert watching.types == {torch.float32}
    assert {score.dtype for score in result.scores.values()} == {torch.float32}
    assert {name: int(mask.sum()) for name, mask in result.masks.items()} == KEEP
    assert result.perturbed_steps > 0
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}
    assert "forward" not in vars(model)


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_training_stays_near_float32(stripes, loss) -> None:
    losses = []
    for precision in (FLOAT32, BF16):
        result = train(
            network(),
            TrainingData(stripes(66), stripes(20)),
            TrainSection(epochs=1, batch_size=16, weight_decay=0.0, awp_gamma=0.01),
            objective(loss),
            env(precision),
            stage="pretrain",
        )
        losses.append(result.history[0].loss)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_channels_innermost_change_the_layout_and_nothing_else(stripes) -> None:
    found = []
    for innermost in (False, True):
        precision = Precision(channels_last=innermost)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), *network()[2:])
        precision.to_channels_last(model)
        nn.init.constant_(model[1].weight, 0.1)
        model[4] = nn.Linear(6 * 16, 3)
        nn.init.eye_(model[4].weight)
        for index in (0, 1):
            torch.manual_seed(index)
            model[index].weight.data.copy_(torch.randn(model[index].weight.shape))
            nn.init.zeros_(model[index].bias)
        nn.init.zeros_(model[4].bias)
        assert model[1].weight.is_contiguous(memory_format=torch.channels_last) is innermost
        keep = {"0.weight": 20, "1.weight": 50, "4.weight": 60}
        scored = ScoredNetwork(model, Weights(tuple(keep)), Fixed(keep))
        chosen = search(
            scored,
            TrainingData(stripes(34), stripes(20)),
            SearchSection(epochs=1, batch_size=16),
            objective("at"),
            env(precision),
        )
        found.append(chosen)
    for name, mask in found[0].masks.items():
        assert torch.equal(mask, found[1].masks[name])
        torch.testing.assert_close(found[0].scores[name], found[1].scores[name], rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_is_told_once_and_done_without(stripes, monkeypatch) -> None:
    def refuse(function: Any) -> Any:
        def fail(*images: Any) -> Any:
            raise RuntimeError("no compiler here\nand much more")

        return fail

    def fitted(precision: Precision, watching: Watching) -> nn.Module:
        model = network()
        train(
            model,
            TrainingData(stripes(34), stripes(20)),
            TrainSection(epochs=2, batch_size=16, weight_decay=0.0),
            objective("at"),
            env(precision, watching),
            stage="pretrain",
        )
        return model

    monkeypatch.setattr(torch, "compile", refuse)
    watching = Watching()
    compiled, plain = fitted(Precision(compiled=True), watching), fitted(FLOAT32, Watching())
    assert watching.warnings == ["the network could not be compiled and runs uncompiled: no compiler here"]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, compiled.state_dict()[name]), "the trial must leave no trace"


def test_what_is_compiled_runs_from_the_second_call_on(monkeypatch) -> None:
    calls: list[int] = []

    def stand_in(function: Any) -> Any:
        def counted(images: torch.Tensor) -> Any:
            calls.append(len(images))
            return function(images)

        return counted

    monkeypatch.setattr(torch, "compile", stand_in)
    model = network().eval()
    images = torch.rand(3, 1, 8, 8)
    expected = model(images)
    computing = Precision(compiled=True).apply(model, pytest.fail)
    for _ in range(2):
        with computing:
            assert torch.equal(model(images), expected)
    assert calls == [3, 3, 3], "one trial, two passes"
    assert torch.equal(model(images), expected)
    assert len(calls) == 3


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_function() -> None:
    model = network().eval()
    images = torch.rand(3, 1, 8, 8)
    with Precision(compiled=True).apply(model, pytest.fail):
        torch.testing.assert_close(model(images), network().eval()(images), rtol=1e-4, atol=1e-5)


def test_the_names_of_precisions() -> None:
    assert choose_precision("auto", CPU) == choose_precision("float32", CPU) == FLOAT32
    assert choose_precision("bf16", CPU) == BF16
    assert choose_precision("bf16", CPU).facts() == {
        "precision": "bf16",
        "channels_last": False,
        "compiled": False,
    }
    with pytest.raises(UsageError, check=lambda error: error.code == "precision-unknown"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(("capability", "bf16"), [((9, 0), True), ((7, 5), False)])
def test_a_gpu_computes_bf16_where_it_can(monkeypatch, capability, bf16) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert choose_precision("auto", gpu) == Precision(bf16=bf16, channels_last=True, tf32=bf16)
    assert choose_precision("float32", gpu) == Precision(channels_last=True, tf32=False)
    if not bf16:
        with pytest.raises(UsageError, check=lambda error: error.code == "bf16-unsupported"):
            choose_precision("bf16", gpu)
