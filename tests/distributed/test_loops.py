"""Training over ranks is training: the same steps as one process, up to the order of sums."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks
from s2ap_deploy.pruning.allocation import Fixed, Quotas
from s2ap_deploy.pruning.budgets import floors
from s2ap_deploy.pruning.curvature import ScorePerturbation
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search import Perturbation, SearchResult, search, update
from s2ap_deploy.recipe.sections import SearchSection, TrainSection
from s2ap_deploy.recorder import NoSnapshots
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batching import RankBatch
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.train import TrainingData, TrainingEnvironment, train

OnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]
THREAT = ThreatModel(eps="0.1")
NAMES = ("0.weight", "4.weight")
CPU = torch.device("cpu")


def network(normalized: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(4) if normalized else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 4, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def scored(model: nn.Module, learned: bool = False) -> ScoredNetwork:
    shapes = {name: tuple(model.get_parameter(name).shape) for name in NAMES}
    least = floors(shapes, classifier=NAMES[-1], dense=())
    counts = Quotas(shapes, 0.7, least) if learned else Fixed({"0.weight": 20, "4.weight": 60})
    return ScoredNetwork(model, Weights(NAMES), counts)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((one - other).norm() / other.norm())


class Given(Adversary):
    """An adversary that has its images already, and cuts them to the part."""

    images: torch.Tensor

    def attack(self, network: Any, part: Any, noise: Any) -> torch.Tensor:
        rows = self.images[part.index :: part.of]
        return rows if len(rows) else self.images[:1]


@pytest.mark.parametrize("loss", ["at", "trades"])
@pytest.mark.parametrize(("n", "size"), [(16, 2), (15, 2), (13, 3), (3, 4)])
@pytest.mark.parametrize("learned", [False, True])
def test_one_step_of_s2ap_on_given_adversarial_images_gives_the_same_scores(
    on_ranks, stripes, loss, n, size, learned
) -> None:
    """Scores, quotas, BatchNorm within 1e-5 of one process; the perturbation is of averaged gradients."""
    images, labels = stripes(n).tensors()
    given = (images + 0.1 * torch.randn(images.shape, generator=generator(1)).sign()).clamp(0, 1)
    start = network()

    def work(ranks: Ranks) -> ScoredNetwork:
        subject = scored(copy.deepcopy(start).train(), learned)
        adversary = Given(Objective(THREAT, loss), ranks)
        adversary.images = given
        optimizer = torch.optim.SGD(subject.parameters(), lr=0.5)
        ranks.present = ranks.rank < n
        rows = slice(ranks.rank, None, ranks.size) if ranks.present else slice(0, 1)
        ball = ScorePerturbation(subject.scores, 0.05)
        batch = RankBatch(images[rows], labels[rows], n, ranks.rank, ranks.size)
        moved = update(subject, optimizer, adversary, batch, generator(0), ball)
        assert bool(moved.perturbed)
        return subject

    alone = work(Ranks())
    for found in on_ranks(size, work):
        for name in NAMES:
            assert apart(found.scores[name], alone.scores[name]) < 1e-5
            assert float(alone.scores[name].grad.norm()) > 0
            assert apart(found.scores[name].grad, alone.scores[name].grad) < 1e-5
        if learned:
            torch.testing.assert_close(found.allocation.parameters()[0], alone.allocation.parameters()[0])
        for name, buffer in alone.network.named_buffers():
            torch.testing.assert_close(found.network.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


class FirstRanks:
    """Snapshots as ``runs.Stage`` keeps them: rank 0's."""

    def __init__(self, ranks: Ranks, kept: Any) -> None:
        self.ranks, self.kept = ranks, kept

    def load_snapshot(self) -> Any:
        return self.ranks.on_first(self.kept.load_snapshot)

    def save_snapshot(self, tensors: Any, state: Any) -> None:
        if self.ranks.first:
            self.kept.save_snapshot(tensors, state)


def environment(ranks: Ranks, kept: Any = None, accumulate: int = 1) -> TrainingEnvironment:
    snapshots = FirstRanks(ranks, kept or NoSnapshots())
    return TrainingEnvironment(CPU, snapshots=snapshots, accumulate=accumulate, ranks=ranks)


def run_search(
    model: nn.Module, stripes: Any, ranks: Ranks, loss: Any, snapshots: Any = None
) -> SearchResult:
    return search(
        scored(model),
        TrainingData(stripes(31), stripes(30)),
        SearchSection(epochs=2, batch_size=12),
        Objective(THREAT, loss, **({"attack_steps": 2} if loss != "free" else {})),
        environment(ranks, snapshots),
        perturbation=Perturbation(0.02, 0),
    )


@pytest.mark.parametrize("loss", ["at", "trades", "free"])
def test_a_search_over_ranks_ends_with_the_scores_of_one(on_ranks, stripes, loss) -> None:
    """Batches of 12, 12 and 7 images over 2 ranks; an epoch's figures are those of all rows."""
    starts = [network() for _ in range(2)]  # here, for threads share torch's global stream
    alone = run_search(network(), stripes, SINGLE_PROCESS, loss)
    found = on_ranks(2, lambda ranks: run_search(starts[ranks.rank], stripes, ranks, loss))
    for result in found:
        for name in NAMES:
            assert apart(result.scores[name], alone.scores[name]) < 1e-4
        for row, expected in zip(result.history, alone.history, strict=True):
            assert row.loss == pytest.approx(expected.loss, rel=1e-4)
            assert row.clean_accuracy == expected.clean_accuracy
            assert row.robust_accuracy == pytest.approx(expected.robust_accuracy, abs=0.04)
    for name in NAMES:
        assert torch.equal(found[0].scores[name], found[1].scores[name]), "replicas must not drift"
        assert torch.equal(found[0].masks[name], found[1].masks[name])


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_ranks_takes_a_search_up(
    on_ranks, stripes, memory_snapshots, before, after
) -> None:
    """Free training, whose perturbation is spread over the ranks, interrupted after its first epoch."""
    straight = run_search(network(), stripes, SINGLE_PROCESS, "free")
    kept = memory_snapshots(lives=1)
    starts = [network() for _ in range(before)]
    with pytest.raises(KeyboardInterrupt):
        on_ranks(before, lambda ranks: run_search(starts[ranks.rank], stripes, ranks, "free", snapshots=kept))
    again = [network() for _ in range(after)]
    for result in on_ranks(
        after, lambda ranks: run_search(again[ranks.rank], stripes, ranks, "free", snapshots=kept)
    ):
        assert len(result.history) == 2
        for name in NAMES:
            assert apart(result.scores[name], straight.scores[name]) < 1e-4


def run_training(
    model: nn.Module, stripes: Any, ranks: Ranks, objective: Objective | None = None, accumulate: int = 1
) -> nn.Module:
    train(
        model,
        TrainingData(stripes(31), stripes(30)),
        TrainSection(epochs=2, learning_rate=0.05, weight_decay=5e-4, batch_size=12, awp_gamma=0.01),
        objective or Objective(THREAT, attack_steps=2),
        environment(ranks, accumulate=accumulate),
        stage="finetune",
        masks={"4.weight": torch.arange(3 * 144).view(3, 144) % 2 == 0},
    )
    return model


@pytest.mark.parametrize("size", [2, 3])
def test_training_with_awp_over_ranks_gives_the_weights_of_one(on_ranks, stripes, size) -> None:
    alone = run_training(network(), stripes, SINGLE_PROCESS).state_dict()
    starts = [network() for _ in range(size)]
    found = [
        model.state_dict()
        for model in on_ranks(size, lambda ranks: run_training(starts[ranks.rank], stripes, ranks))
    ]
    for state in found:
        for name, expected in alone.items():
            assert apart(state[name].float(), expected.float()) < 1e-4, name
            assert torch.equal(state[name], found[0][name]), "replicas must not drift"


@pytest.mark.parametrize("changes", [{}, {"objective": Objective(THREAT, "trades", attack_steps=2)}])
@pytest.mark.parametrize("accumulate", [2, 5])
def test_pieces_of_a_batch_train_as_the_whole_without_batchnorm(stripes, accumulate, changes) -> None:
    whole = run_training(network(False), stripes, SINGLE_PROCESS, **changes).state_dict()
    pieces = run_training(
        network(False), stripes, SINGLE_PROCESS, accumulate=accumulate, **changes
    ).state_dict()
    for name, expected in whole.items():
        assert apart(pieces[name], expected) < 1e-4, name


def test_pieces_on_ranks_and_free_training_work_together(on_ranks, stripes) -> None:
    free = Objective(THREAT, "free", replays=2)
    whole = run_training(network(False), stripes, SINGLE_PROCESS, objective=free).state_dict()
    starts = [network(False) for _ in range(2)]
    for model in on_ranks(
        2, lambda ranks: run_training(starts[ranks.rank], stripes, ranks, objective=free, accumulate=3)
    ):
        for name, expected in whole.items():
            assert apart(model.state_dict()[name], expected) < 1e-4, name
