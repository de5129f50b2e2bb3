"""A step of search and training: equal to a plain loop's, and without waiting for the device."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2ap_deploy.data.splits import MemorySplit
from s2ap_deploy.pruning import allocation
from s2ap_deploy.pruning.allocation import Allocation, Fixed, Global, Quotas
from s2ap_deploy.pruning.granularity import NOfM, Weights
from s2ap_deploy.pruning.masks import top_k
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search import Perturbation, search
from s2ap_deploy.recipe.sections import SearchSection, TrainSection
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.train import TrainingData, TrainingEnvironment, train

KEEP = {"0.weight": 20, "1.weight": 100, "5.weight": 60}
SHAPES = {"0.weight": (6, 1, 3, 3), "1.weight": (8, 6, 3, 3), "5.weight": (3, 128)}
OBJECTIVE = Objective(ThreatModel(eps="0.1"), loss="trades", attack_steps=2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    """The benchmark's independent loop."""
    path = Path(__file__).parents[2] / "benchmarks" / "training" / "plain.py"
    if not path.exists():
        pytest.skip("the benchmarks are not beside the tests")
    spec = importlib.util.spec_from_file_location("plain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_masks_and_score_gradients_are_those_of_a_plain_loop(plain: ModuleType) -> None:
    """Fed the same adversarial batch, the same integer budget and the same BatchNorm mode."""
    model = network()
    ours = ScoredNetwork(copy.deepcopy(model), Weights(tuple(KEEP)), Fixed(KEEP))
    theirs = plain.masked(model, KEEP)
    torch.manual_seed(1)
    images, labels = torch.rand(16, 1, 8, 8), torch.randint(0, 3, (16,))
    moved = (images + 0.1 * torch.randn_like(images).sign()).clamp(0, 1)
    selection = ours.select()
    ours.apply_mask(selection)
    loss, _ = OBJECTIVE.robust_loss(ours.network.train(), images, moved, labels)
    found = ours.gradients(loss)
    expected = plain.trades_loss(model.train(), images, moved, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, layer in theirs.items():
        assert torch.equal(ours.scores[name], layer.scores)
        mask = plain.KeepLargest.apply(layer.scores.abs(), layer.keep)
        assert torch.equal(selection[name], mask.bool())
        gradient = layer.scores.grad
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert (found[name][mask == 0] != 0).any(), "a pruned weight must be able to come back"


def test_the_attack_of_the_plain_loop_is_ours(plain: ModuleType) -> None:
    """Where both start from the same noise; it does not clip its start, so images stay off the borders."""
    model = network().eval()
    images = 0.3 + 0.4 * torch.rand(8, 1, 8, 8)
    labels = torch.zeros(8, dtype=torch.int64)
    ours = OBJECTIVE.attack(model, images, labels, torch.Generator().manual_seed(3))
    for backward in (False, True):
        theirs = plain.trades_attack(
            model,
            images,
            eps=0.1,
            step_size=0.025,
            steps=2,
            noise=torch.Generator().manual_seed(3),
            backward=backward,
        )
        assert (ours == theirs).float().mean() > 0.99, "signs of gradients near 0 may differ"


class WaitsForNothing(TorchDispatchMode):
    """Raises where a value is read from its device, or where a shape depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.FORBIDDEN:
            raise AssertionError(f"{func.name()} waits for the device inside a step")
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a bool index waits"
        return func(*args, **(kwargs or {}))


class Watched(MemorySplit):
    """A split whose batches are worked on under :class:`WaitsForNothing`."""

    def train_batches(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().train_batches(*args, **kwargs):
            if kwargs["epoch"] < 0:  # BatchNorm's last measurement is no step
                yield batch
                continue
            with WaitsForNothing():
                yield batch


def watched(split: MemorySplit) -> Watched:
    return Watched(split.images, split.labels, split.ids, split.augmentation)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that a device decides on stay there; a host's may be read."""
    monkeypatch.setattr(allocation, "numbers", lambda counts: counts.unbind())

    def refuse(self: Tensor) -> Any:
        raise AssertionError("tolist waits for the device inside a step")

    # Lists of numbers that are read outside the steps come from plain calls before and after.
    reading = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        inside = torch.utils._python_dispatch._get_current_dispatch_mode() is not None
        return refuse(self) if inside else reading(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)


def settings(loss: Any) -> tuple[Objective, TrainingEnvironment]:
    steps = None if loss in ("fast", "free") else 2
    objective = Objective(ThreatModel(eps="0.1"), loss=loss, attack_steps=steps, replays=2)
    return objective, TrainingEnvironment(torch.device("cpu"))


def allocations() -> dict[str, Allocation]:
    least = dict.fromkeys(KEEP, 1)
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    return {
        "fixed": Fixed(KEEP),
        "global": Global(sizes, 0.5, least),
        "quotas": Quotas(SHAPES, 0.5, least),
    }


@pytest.mark.parametrize("loss", ["at", "trades", "fast", "free"])
@pytest.mark.parametrize("name", ["fixed", "global", "quotas", "2:4"])
@pytest.mark.usefixtures("as_on_a_device")
def test_no_step_of_a_search_waits_for_the_device(
    stripes: Callable[[int], MemorySplit], name: str, loss: str
) -> None:
    scored = (
        ScoredNetwork(network(), NOfM(("5.weight",), 2, 4), Fixed({"5.weight": 192}))
        if name == "2:4"
        else ScoredNetwork(network(), Weights(tuple(KEEP)), allocations()[name], covered=("5.weight",))
    )
    result = search(
        scored,
        TrainingData(watched(stripes(34)), stripes(20)),
        SearchSection(epochs=1, batch_size=16),
        *settings(loss),
        perturbation=Perturbation(0.05, 0),
    )
    assert result.perturbed_steps > 0


@pytest.mark.parametrize("loss", ["at", "trades", "fast", "free"])
@pytest.mark.usefixtures("as_on_a_device")
def test_no_step_of_training_waits_for_the_device(stripes: Callable[[int], MemorySplit], loss: str) -> None:
    masks = {"5.weight": torch.rand(3, 128) < 0.5}
    result = train(
        network(),
        TrainingData(watched(stripes(34)), stripes(20)),
        TrainSection(epochs=1, batch_size=16, awp_gamma=0.01),
        *settings(loss),
        stage="finetune",
        masks=masks,
    )
    assert result.history[0].loss > 0


def test_the_watch_sees_what_it_should() -> None:
    for read in (
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ):
        with pytest.raises(AssertionError, match="waits"), WaitsForNothing():
            read(torch.rand(3))


@pytest.mark.parametrize("k", [0, 1, 4, 9, 10])
@pytest.mark.parametrize("tied", [False, True])
def test_a_count_on_the_device_selects_what_the_number_selects(k: int, tied: bool) -> None:
    torch.manual_seed(k)
    values = torch.randint(0, 3, (2, 5)).float() if tied else torch.rand(2, 5)
    assert torch.equal(top_k(values, torch.tensor(k)), top_k(values, k))


def test_quotas_on_a_device_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores() -> ScoredNetwork:
        return ScoredNetwork(network(), Weights(tuple(KEEP)), Quotas(SHAPES, 0.9, dict.fromkeys(KEEP, 1)))

    host = scores().select()
    monkeypatch.setattr(allocation, "numbers", lambda counts: counts.unbind())
    device = scores().select()
    assert all(torch.equal(host[name], device[name]) for name in KEEP)
