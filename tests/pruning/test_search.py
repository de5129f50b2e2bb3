"""The search loop: exact budgets, frozen weights, S2AP as a plug-in, and resuming to the same bits."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from s2ap_deploy.data.splits import MemorySplit
from s2ap_deploy.errors import InputError
from s2ap_deploy.pruning.allocation import Fixed, Global, Quotas
from s2ap_deploy.pruning.budgets import floors, total_kept
from s2ap_deploy.pruning.granularity import NOfM, Weights
from s2ap_deploy.pruning.masks import top_k
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search import Perturbation, SearchResult, choose_once, search
from s2ap_deploy.recipe.sections import SearchSection
from s2ap_deploy.recorder import Silent
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective
from s2ap_deploy.training.train import TrainingData, TrainingEnvironment

NAMES = ("0.weight", "4.weight")
KEEP = {"0.weight": 20, "4.weight": 60}
S2AP = Perturbation(0.05, 1)
TINY = Perturbation(gamma=5e-324, warmup_epochs=0)  # below float32's resolution: z adds nothing


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def searched(
    stripes: Callable[[int], MemorySplit],
    scored: ScoredNetwork,
    *,
    objective: Objective | None = None,
    perturbation: Perturbation | None = S2AP,
    epochs: int = 3,
    section: Mapping[str, Any] | None = None,
    **env: Any,
) -> SearchResult:
    return search(
        scored,
        TrainingData(stripes(66), stripes(30)),
        SearchSection(epochs=epochs, learning_rate=0.5, batch_size=16, **(section or {})),
        objective or Objective(ThreatModel(eps="0.1"), attack_steps=2),
        TrainingEnvironment(torch.device("cpu"), **env),
        perturbation=perturbation,
    )


def run_search(
    stripes: Callable[[int], MemorySplit], model: nn.Module, perturbation: Perturbation | None, **changes: Any
) -> SearchResult:
    scored = ScoredNetwork(model, Weights(NAMES), Fixed(KEEP))
    return searched(stripes, scored, perturbation=perturbation, **changes)


Run = Callable[..., SearchResult]


@pytest.fixture
def run(stripes) -> Run:
    return partial(run_search, stripes)


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_budgets_hold_weights_rest_and_scores_move(run) -> None:
    model = network()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, Perturbation(0.05, 1))
    assert {name: int(mask.sum()) for name, mask in result.masks.items()} == KEEP
    for name in NAMES:
        assert torch.equal(model.state_dict()[name], dense[name] * result.masks[name])
    assert torch.equal(model[4].bias, dense["4.bias"])
    assert torch.equal(model[1].weight, dense["1.weight"])
    assert result.history[-1].replaced is not None
    assert max(row.replaced or 0 for row in result.history) > 0, (
        "a search that moves no mask searches nothing"
    )


def test_s2ap_acts_after_its_warm_up_and_changes_the_outcome(run) -> None:
    base, s2ap = run(network(), None), run(network(), Perturbation(0.05, 1))
    assert base.perturbed_steps == 0
    assert all(row.flip_rate is None for row in base.history)
    assert s2ap.perturbed_steps == 2 * 5  # two epochs of five batches
    assert s2ap.history[0].flip_rate is None
    assert all((row.flip_rate or 0) > 0 for row in s2ap.history[1:])
    assert s2ap.history[0].loss == base.history[0].loss
    assert not equal(base.scores, s2ap.scores)


def test_a_vanishing_gamma_gives_the_base_method_bit_for_bit(run) -> None:
    """Scores, masks and BatchNorm statistics: the extra passes leave no trace of their own."""
    models = network(), network()
    base, s2ap = run(models[0], None), run(models[1], TINY)
    assert s2ap.perturbed_steps > 0
    assert equal(base.scores, s2ap.scores)
    assert equal(base.masks, s2ap.masks)
    assert equal(models[0].state_dict(), models[1].state_dict())


def test_layers_that_draw_for_themselves_do_it_by_the_seed(stripes, memory_snapshots) -> None:
    keep = {"0.weight": 20, "5.weight": 60}

    def dropped(before: int, **changes: Any) -> tuple[SearchResult, Mapping[str, torch.Tensor]]:
        model = nn.Sequential(*network()[:4], nn.Dropout(0.5), network()[4])
        scored = ScoredNetwork(model, Weights(tuple(keep)), Fixed(keep))
        torch.manual_seed(before)  # what a process has drawn before
        result = searched(stripes, scored, perturbation=Perturbation(0.05, 1), **changes)
        return result, model.state_dict()

    first, second, other = dropped(1), dropped(2), dropped(1, seed=1)
    assert equal(first[0].scores, second[0].scores)
    assert equal(first[1], second[1])
    assert not equal(first[0].scores, other[0].scores)
    for lives in (2, 3):
        snapshots = memory_snapshots(lives)
        with pytest.raises(KeyboardInterrupt):
            dropped(1, snapshots=snapshots)
        resumed = dropped(3, snapshots=snapshots)
        assert equal(first[0].scores, resumed[0].scores)
        assert equal(first[1], resumed[1])


def test_batchnorm_is_measured_under_the_final_mask(run, stripes) -> None:
    model = network()
    run(model, None, epochs=1)
    stale = network()
    stale.load_state_dict(model.state_dict())
    stale.train()
    with torch.no_grad():
        stale(stripes(66).tensors()[0])
    # One pass over all clean images lands near the average that recalibration took.
    torch.testing.assert_close(
        (stale[1].running_mean - 0.9 * model[1].running_mean) / 0.1, model[1].running_mean, rtol=0.5, atol=0.1
    )


def test_s2ap_that_never_moved_is_an_error(run) -> None:
    dead = network()
    for weight in (dead[0].weight, dead[4].weight):
        nn.init.zeros_(weight)  # the gradient of a score is w times something
    with pytest.raises(InputError, check=lambda error: error.code == "s2ap-never-acted"):
        run(dead, Perturbation(0.01, 0))


def test_a_loss_that_leaves_the_real_numbers_is_an_error(run) -> None:
    broken = network()
    broken[4].bias.data[0] = torch.inf
    with pytest.raises(InputError, check=lambda error: error.code == "loss-not-finite"):
        run(broken, None)


SHAPES = {"0.weight": (6, 1, 3, 3), "4.weight": (3, 216)}


def harp(sparsity: float) -> ScoredNetwork:
    least = floors(SHAPES, classifier="4.weight")
    quotas = Quotas(SHAPES, sparsity, least, compression_weight=0.5)
    return ScoredNetwork(network(), Weights(NAMES), quotas, covered=["4.weight"])


@pytest.mark.parametrize("perturbation", [None, Perturbation(0.05, 1)])
def test_harp_learns_quotas_and_ends_at_the_exact_budget(stripes, perturbation) -> None:
    scored = harp(0.93)
    (quotas,) = scored.allocation.parameters()
    begin = quotas.clone()
    result = searched(stripes, scored, perturbation=perturbation)
    assert not torch.allclose(begin, quotas), "quotas must learn"
    assert sum(int(mask.sum()) for mask in result.masks.values()) == total_kept(54 + 648, 0.93)


def test_a_global_budget_moves_weights_between_layers(stripes) -> None:
    least = floors(SHAPES, classifier="4.weight")
    pooled = Global({"0.weight": 54, "4.weight": 648}, 0.9, least)
    scored = ScoredNetwork(network(), Weights(NAMES), pooled, covered=["4.weight"])
    before = {name: int(mask.sum()) for name, mask in scored.select().items()}
    result = searched(stripes, scored)
    after = {name: int(mask.sum()) for name, mask in result.masks.items()}
    assert sum(before.values()) == sum(after.values()) == total_kept(702, 0.9)
    assert before != after


def test_n_of_m_holds_through_the_search(stripes) -> None:
    groups = NOfM(["4.weight"], 2, 4)
    result = searched(stripes, ScoredNetwork(network(), groups, Fixed({"4.weight": 324})))
    mask = result.masks["4.weight"].view(3, 54, 4)
    assert (mask.sum(2) == 2).all()
    assert result.perturbed_steps > 0


def test_a_mask_without_a_search_is_the_magnitude_mask(stripes) -> None:
    made = network()
    weights = {name: dict(made.named_parameters())[name].detach().clone() for name in NAMES}
    scored = ScoredNetwork(made, Weights(NAMES), Fixed(KEEP), weights)
    result = choose_once(
        scored,
        stripes(66),
        SearchSection(batch_size=16),
        Objective(ThreatModel(eps="0.1"), attack_steps=1),
        TrainingEnvironment(torch.device("cpu")),
    )
    for name in NAMES:
        assert torch.equal(result.masks[name], top_k(weights[name].abs(), KEEP[name]))
        assert torch.equal(dict(made.named_parameters())[name], weights[name] * result.masks[name])
    assert result.history == []


class Warned(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize(("gamma", "word"), [(1e-9, "too small"), (5.0, "too large")])
def test_a_gamma_that_does_nothing_useful_is_told(run, gamma, word) -> None:
    recorder = Warned()
    run(network(), Perturbation(gamma, 2), recorder=recorder)
    assert len(recorder.said) == 1
    assert word in recorder.said[0]
    assert "epoch 3" in recorder.said[0]


@pytest.mark.parametrize("ball", ["layer", "elementwise"])
def test_gamma_auto_holds_the_flip_rate(run, ball) -> None:
    found = run(network(), Perturbation(1e-3, 0, ball=ball, flip_target=0.05), epochs=12).history
    assert all(row.gamma is not None for row in found)
    assert sum(row.flip_rate or 0 for row in found[6:]) / 6 == pytest.approx(0.05, abs=0.02)
    fixed = run(network(), Perturbation(1e-5, 0, ball=ball)).history
    assert fixed[-1].gamma is None
    assert (fixed[-1].flip_rate or 0) < 0.01


def test_s2ap_acts_in_its_epochs_alone(run) -> None:
    found = run(network(), Perturbation(0.05, 1, until=2), epochs=4)
    assert [row.flip_rate is not None for row in found.history] == [False, True, False, False]
    assert found.perturbed_steps == 5


def test_signs_matter_only_where_a_score_crosses_zero(run) -> None:
    """Within the elementwise ball none does, below a gamma of 1."""
    for perturbation, same in (
        (Perturbation(0.5, 0, ball="elementwise"), True),
        (Perturbation(2.0, 0, ball="elementwise"), False),
    ):
        keep, follow = (
            run(network(), dataclasses.replace(perturbation, signs=signs)) for signs in ("keep", "follow")
        )
        assert equal(keep.scores, follow.scores) is same


@pytest.mark.parametrize("key", ["weight_decay", "bn_affine", "cosine", "recalibration"])
def test_each_published_setting_changes_what_it_names(stripes, key) -> None:
    models = network(), network()
    (base, changed) = (
        searched(
            stripes,
            ScoredNetwork(model, Weights(NAMES), Fixed(KEEP), affine=affine),
            perturbation=None,
            section=section,
        )
        for model, affine, section in (
            (models[0], (), {}),
            (models[1], ("1.weight", "1.bias") if key == "bn_affine" else (), {key: PUBLISHED[key]}),
        )
    )
    assert equal(base.scores, changed.scores) is (key == "recalibration")
    same = torch.equal(models[0][1].weight, models[1][1].weight)
    assert same is (key != "bn_affine")
    if key == "recalibration":
        assert not torch.equal(models[0][1].running_mean, models[1][1].running_mean)


def test_hamming_and_replaced_agree(run) -> None:
    for row in run(network(), None).history:
        assert row.hamming == pytest.approx(2 * (row.replaced or 0) * 80 / 702)


FREE = Objective(ThreatModel(eps="0.1"), loss="free", replays=3)


@pytest.mark.parametrize("perturbation", [None, Perturbation(0.05, 1)])
def test_free_training_replays_every_batch(stripes, perturbation) -> None:
    scored = ScoredNetwork(network(), Weights(NAMES), Fixed(KEEP))
    result = searched(stripes, scored, objective=FREE, perturbation=perturbation)
    assert result.perturbed_steps == (2 * 5 * 3 if perturbation else 0)
    assert {name: int(mask.sum()) for name, mask in result.masks.items()} == KEEP


@pytest.mark.parametrize(("weight", "told"), [(1e-9, 1), (50.0, 0)])
def test_quotas_that_missed_the_budget_are_told(stripes, weight, told) -> None:
    least = floors(SHAPES, classifier="4.weight")
    quotas = Quotas(SHAPES, 0.97, least, compression_weight=weight)
    recorder = Warned()
    scored = ScoredNetwork(network(), Weights(NAMES), quotas, covered=["4.weight"])
    searched(stripes, scored, perturbation=None, recorder=recorder)
    assert len(recorder.said) == told
    assert all("learned quotas" in words for words in recorder.said)


PUBLISHED = {"weight_decay": 5e-4, "bn_affine": "learn", "cosine": "epoch", "recalibration": "loss"}


@pytest.mark.parametrize(
    ("kind", "lives"),
    [
        *(
            (kind, lives)
            for kind in ("at", "harp", "free", "published", "auto", "follow")
            for lives in (1, 2)
        ),
        ("at", 3),
    ],
)
def test_an_interrupted_search_resumes_to_the_same_bits(stripes, memory_snapshots, kind, lives) -> None:
    perturbation = {
        "auto": Perturbation(0.0005, 0, flip_target=0.02, ball="elementwise"),
        "follow": Perturbation(0.05, 1, until=2, signs="follow"),
    }.get(kind, S2AP)

    def run(**changes: Any) -> tuple[SearchResult, Mapping[str, torch.Tensor]]:
        affine = ("1.weight", "1.bias") if kind == "published" else ()
        plain = ScoredNetwork(network(), Weights(NAMES), Fixed(KEEP), affine=affine)
        scored = harp(0.93) if kind == "harp" else plain
        changes |= {"section": PUBLISHED} if kind == "published" else {}
        objective = FREE if kind == "free" else None
        found = searched(stripes, scored, objective=objective, perturbation=perturbation, **changes)
        return found, scored.network.state_dict()

    snapshots = memory_snapshots(lives)
    with pytest.raises(KeyboardInterrupt):
        run(snapshots=snapshots)
    (whole, straight), (again, resumed) = run(), run(snapshots=snapshots)
    assert equal(whole.scores, again.scores)
    assert equal(whole.masks, again.masks)
    assert equal(straight, resumed)
    assert again.perturbed_steps == whole.perturbed_steps
    assert [row.loss for row in again.history] == [row.loss for row in whole.history]
