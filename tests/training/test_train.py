"""Adversarial training: it learns, it keeps its mask, it resumes to the same bits."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2ap_deploy.data.splits import Augmentation, MemorySplit
from s2ap_deploy.errors import InputError
from s2ap_deploy.recipe.sections import TrainSection
from s2ap_deploy.recorder import NoSnapshots, Recorder, Silent, Snapshots
from s2ap_deploy.runtime import generator
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective, Teacher
from s2ap_deploy.training.pgd import pgd_accuracy
from s2ap_deploy.training.train import (
    VALIDATION_IMAGES,
    Epoch,
    TrainingData,
    TrainingEnvironment,
    TrainingResult,
    cosine,
    train,
    validation_sample,
)

THREAT = ThreatModel(eps="0.1")
L2 = ThreatModel(norm="L2", eps="0.6")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def run_training(
    stripes: Callable[[int], MemorySplit],
    model: nn.Module,
    *,
    stage: str = "pretrain",
    objective: Objective | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    teacher: Teacher | None = None,
    seed: int = 0,
    snapshots: Snapshots | None = None,
    recorder: Recorder | None = None,
    **section: Any,
) -> TrainingResult:
    return train(
        model,
        TrainingData(stripes(66), stripes(30)),
        TrainSection(**{"epochs": 4, "weight_decay": 5e-4, "batch_size": 16, **section}),
        objective or Objective(THREAT, attack_steps=2),
        TrainingEnvironment(
            torch.device("cpu"), seed, snapshots=snapshots or NoSnapshots(), recorder=recorder or Silent()
        ),
        stage=stage,
        masks=masks,
        teacher=teacher,
    )


Run = Callable[..., TrainingResult]


@pytest.fixture
def run(stripes) -> Run:
    return partial(run_training, stripes)


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
@pytest.mark.parametrize("loss", ["at", "trades", "mart", "fast", "free"])
def test_it_learns_to_be_robust(run, stripes, loss, threat) -> None:
    model = network()
    accuracy = {"threat": threat, "steps": 10, "seed": 0, "device": torch.device("cpu")}
    before = pgd_accuracy(model.eval(), stripes(90), **accuracy)
    run(model, objective=Objective(threat, loss, attack_steps=None if loss in ("fast", "free") else 5))
    after = pgd_accuracy(model, stripes(90), **accuracy)
    assert after.robust_accuracy > max(0.8, before.robust_accuracy)
    assert after.clean_accuracy >= after.robust_accuracy


def test_pruned_weights_never_leave_zero(run) -> None:
    model = network()
    mask = torch.zeros_like(model[4].weight, dtype=torch.bool)
    mask[:, ::7] = True
    before = model[4].weight.detach().clone()
    run(model, masks={"4.weight": mask})
    assert bool((model[4].weight[~mask] == 0).all())
    assert not torch.equal(model[4].weight[mask], before[mask]), "kept weights must learn"


@pytest.mark.parametrize("lives", [1, 3, 4])
def test_interrupted_training_resumes_to_the_same_bits(run, memory_snapshots, lives) -> None:
    straight, resumed = network(), network()
    whole = run(straight)
    snapshots = memory_snapshots(lives)
    with pytest.raises(KeyboardInterrupt):
        run(network(), snapshots=snapshots)
    again = run(resumed, snapshots=snapshots)
    assert equal(straight.state_dict(), resumed.state_dict())
    assert again.best_epoch == whole.best_epoch
    assert [row.loss for row in again.history] == [row.loss for row in whole.history]


def test_layers_that_draw_for_themselves_do_it_by_the_seed(run, memory_snapshots) -> None:
    def dropping() -> nn.Sequential:
        return nn.Sequential(*network()[:4], nn.Dropout(0.5), network()[4])

    models = [dropping() for _ in range(4)]
    torch.manual_seed(1)
    run(models[0])
    torch.manual_seed(2)
    run(models[1])
    assert equal(models[0].state_dict(), models[1].state_dict()), "whatever was drawn before in this process"
    run(models[2], seed=1)
    assert not equal(models[0].state_dict(), models[2].state_dict())
    snapshots = memory_snapshots(2)
    with pytest.raises(KeyboardInterrupt):
        run(dropping(), snapshots=snapshots)
    torch.manual_seed(3)
    run(models[3], snapshots=snapshots)
    assert equal(models[0].state_dict(), models[3].state_dict()), "nor does a kill change it"


@pytest.mark.parametrize("lives", [1, 3])
@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
def test_every_extra_resumes_to_the_same_bits(run, memory_snapshots, threat, lives) -> None:
    """Free training's perturbation outlives an epoch, so it must outlive a kill; AWP and a mask on top."""
    extras = {
        "objective": Objective(threat, "free", replays=2),
        "awp_gamma": 0.01,
        "awp_warmup_epochs": 1,
        "masks": {"4.weight": torch.arange(648).view(3, 216) % 3 > 0},
        "teacher": Teacher(network(), weight=0.5, temperature=2.0),
    }
    straight, resumed = network(), network()
    whole = run(straight, **extras)
    snapshots = memory_snapshots(lives)
    with pytest.raises(KeyboardInterrupt):
        run(network(), snapshots=snapshots, **extras)
    assert float(snapshots.kept[0]["adversary/perturbation"].abs().max()) > 0
    again = run(resumed, snapshots=snapshots, **extras)
    assert equal(straight.state_dict(), resumed.state_dict())
    assert [row.loss for row in again.history] == [row.loss for row in whole.history]


def test_free_training_forgets_nothing_between_epochs(run, memory_snapshots) -> None:
    """Without the perturbation in the snapshot, the second epoch would be another one."""
    objective = Objective(THREAT, "free", replays=2)
    whole = run(network(), objective=objective)
    snapshots = memory_snapshots(1)
    with pytest.raises(KeyboardInterrupt):
        run(network(), objective=objective, snapshots=snapshots)
    del snapshots.kept[0]["adversary/perturbation"]
    again = run(network(), objective=objective, snapshots=snapshots)
    assert again.history[1].loss != whole.history[1].loss


def test_a_replay_is_an_update_but_no_step_of_the_progress(run) -> None:
    class Counting(Silent):
        steps = 0

        def advance(self, steps: int = 1) -> None:
            self.steps += steps

    class Updates(nn.Flatten):
        """Passes in train mode: free training's only ones, as each serves weights and images."""

        count = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.count += self.training
            return super().forward(images)

    counting, updates = Counting(), Updates()
    model = nn.Sequential(updates, nn.Linear(64, 3))
    run(model, objective=Objective(THREAT, "free", replays=3), epochs=2, recorder=counting)
    assert counting.steps == 2 * 5
    assert updates.count == 2 * 5 * 3


@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
def test_one_step_of_awp_is_its_formula(run, stripes, threat) -> None:
    """Wu et al. (2020) on masked weights, with momentum and weight decay at w, not at w + v."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    mask = torch.arange(512).view(8, 64) % 2 == 0
    plain = [parameter.detach().clone() for parameter in model.parameters()]
    plain[0] *= mask
    start = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    start.load_state_dict(dict(zip(model.state_dict(), plain, strict=True)))
    objective = Objective(threat, attack_steps=2)
    run(
        model,
        objective=objective,
        epochs=1,
        batch_size=66,
        masks={"1.weight": mask},
        awp_gamma=0.2,
        learning_rate=0.5,
        weight_decay=0.1,
    )
    ((images, labels),) = stripes(66).train_batches(66, seed=0, epoch=0, augment=True, device="cpu")
    moved = objective.attack(start, images, labels, generator(0, "pretrain", 0, 0))

    def gradients(point: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        w1, b1, w2, b2 = (tensor.clone().requires_grad_() for tensor in point)
        logits = F.linear(F.linear(moved.flatten(1), w1, b1).relu(), w2, b2)
        return torch.autograd.grad(F.cross_entropy(logits, labels), (w1, b1, w2, b2))

    top = list(plain)
    ascent = gradients(plain)
    for index, masked in ((0, ascent[0] * mask), (2, ascent[2])):
        top[index] = plain[index] + 0.2 * plain[index].norm() * masked / masked.norm()
    expected = [w - 0.5 * (g + 0.1 * w) for w, g in zip(plain, gradients(top), strict=True)]
    expected[0] *= mask
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-4, atol=1e-6)


def test_awp_leaves_no_trace_but_its_gradient(run) -> None:
    """At a rate too small to move any weight, runs with and without AWP agree in every bit of the state."""
    tiny = {"learning_rate": 1e-50, "epochs": 2}
    with_awp, without, unmoved = network(), network(), network()
    mask = {"4.weight": torch.ones(3, 216, dtype=torch.bool)}
    one = run(with_awp, awp_gamma=0.3, masks=mask, **tiny)
    other = run(without, **tiny)
    assert equal(with_awp.state_dict(), without.state_dict()), "weights and BatchNorm statistics"
    assert [row.loss for row in one.history] == [row.loss for row in other.history], "the loss is that at w"
    assert not equal(with_awp.state_dict(), unmoved.state_dict()), "the statistics did move"


def test_awp_waits_for_its_warm_up_and_is_off_at_gamma_0(run) -> None:
    plain, off, late = network(), network(), network()
    history = [row.loss for row in run(plain).history]
    assert [row.loss for row in run(off, awp_gamma=0.0, awp_warmup_epochs=9).history] == history
    assert equal(plain.state_dict(), off.state_dict())
    changed = [row.loss for row in run(late, awp_gamma=0.1, awp_warmup_epochs=2).history]
    assert changed[:2] == history[:2]
    assert changed[2:] != history[2:]


def test_pruned_weights_rest_under_awp_and_momentum(run) -> None:
    model = network()
    mask = torch.zeros_like(model[4].weight, dtype=torch.bool)
    mask[:, ::7] = True
    run(model, masks={"4.weight": mask}, awp_gamma=0.2, objective=Objective(THREAT, "free"))
    assert bool((model[4].weight[~mask] == 0).all())


def test_a_student_comes_closer_to_its_teacher(run, stripes) -> None:
    dense = network()
    run(dense)
    images, _ = stripes(90).tensors()

    def disagreement(weight: float) -> float:
        torch.manual_seed(1)
        student = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3))
        run(student, stage="finetune", teacher=Teacher(dense, weight=weight))
        with torch.no_grad():
            target, answers = dense.eval()(images).softmax(1), student.eval()(images).log_softmax(1)
        return float(F.kl_div(answers, target, reduction="batchmean"))

    assert disagreement(0.9) < disagreement(0.0)


@pytest.mark.parametrize("loss", ["at", "mart", "free"])
def test_a_teacher_without_a_say_changes_no_bit(run, loss) -> None:
    objective = Objective(THREAT, loss, replays=2)
    alone, taught = network(), network()
    run(alone, objective=objective, epochs=2)
    run(taught, objective=objective, epochs=2, teacher=Teacher(network(), weight=0.0))
    assert equal(alone.state_dict(), taught.state_dict())


def test_the_most_robust_epoch_is_the_one_that_stays(run, memory_snapshots) -> None:
    model, snapshots = network(), memory_snapshots(-1)
    result = run(model, snapshots=snapshots)
    best = max(row.robust_accuracy for row in result.history)
    assert result.history[result.best_epoch - 1].robust_accuracy == best
    assert all(row.robust_accuracy < best for row in result.history[result.best_epoch :])
    assert snapshots.kept is not None
    kept = {
        name.removeprefix("best/"): t for name, t in snapshots.kept[0].items() if name.startswith("best/")
    }
    assert equal(kept, model.state_dict())


def test_a_loss_that_leaves_the_real_numbers_is_an_error(run) -> None:
    with pytest.raises(InputError, check=lambda error: error.code == "loss-not-finite"):
        run(network(), learning_rate=1e30)


def test_pgd_accuracy_counts_what_stands() -> None:
    """A classifier of one pixel: the attack moves it past the boundary or it does not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=True))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-10.0], [10.0]]))
        model[1].bias.copy_(torch.tensor([5.0, -5.0]))  # class 1 above one half
    pixels = torch.tensor([0, 120, 140, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    images = MemorySplit(
        pixels, torch.tensor([0, 0, 1, 0]), list("abcd"), Augmentation(padding=0, flip=False)
    )
    accuracy = pgd_accuracy(model, images, threat=THREAT, steps=10, seed=0, device=torch.device("cpu"))
    assert (accuracy.n, accuracy.clean, accuracy.robust) == (4, 3, 1)
    assert accuracy.clean_accuracy == 0.75


def test_the_rate_starts_at_its_peak_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    rates = []
    for step in range(201):
        cosine(optimizer, 0.1, step / 10, 20)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert [rates[0], rates[100], rates[200]] == pytest.approx([0.1, 0.05, 0.0], abs=1e-12)
    assert rates == sorted(rates, reverse=True)


def test_a_row_survives_json_without_the_figures_that_do_not_apply() -> None:
    row = Epoch(epoch=3, loss=0.5, clean_accuracy=0.9, robust_accuracy=0.6, seconds=1.5, replaced=0.01)
    assert "flip_rate" not in row.figures()
    assert Epoch(**row.figures()) == row


def test_the_validation_sample_is_bounded_and_always_the_same(stripes) -> None:
    split = stripes(1200)
    sample = validation_sample(split, seed=5)
    assert len(sample) == VALIDATION_IMAGES
    assert sample.ids == validation_sample(split, seed=5).ids
    assert sample.ids != validation_sample(split, seed=6).ids
    assert len(validation_sample(stripes(30), seed=5)) == 30
