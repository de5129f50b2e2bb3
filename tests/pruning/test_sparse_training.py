"""Methods that train the weights while the mask moves: Flying Bird, Flying Bird+ and PwoA's ADMM."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search import SearchResult
from s2ap_deploy.pruning.sparse_training import FlyingBird, Solver, train_sparse
from s2ap_deploy.recipe.sections import PruneSection, SearchSection
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.objective import Objective, SelfDistillation, hsic, kernel
from s2ap_deploy.training.train import Epoch, TrainingData, TrainingEnvironment

NAMES = ("0.weight", "4.weight")
KEEP = {"0.weight": 20, "4.weight": 60}
THREAT = ThreatModel(eps="0.1")
KINDS = ["flying-bird", "flying-bird-plus", "admm"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def trained(stripes, model: nn.Module, kind: str, epochs: int = 4, **env: Any) -> SearchResult:
    scored = ScoredNetwork(model, Weights(NAMES), Fixed(KEEP), covered=NAMES[-1:])
    objective = Objective(THREAT, "natural") if kind == "admm" else Objective(THREAT, attack_steps=2)
    return train_sparse(
        scored,
        kind,
        TrainingData(stripes(66), stripes(30)),
        SearchSection(epochs=epochs, learning_rate=0.05, weight_decay=1e-4, batch_size=16),
        objective,
        TrainingEnvironment(torch.device("cpu"), **env),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_with_the_exact_budget_trained_weights_and_every_class(stripes, kind) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = trained(stripes, model, kind)
    assert {name: int(mask.sum()) for name, mask in found.masks.items()} == KEEP
    assert bool(found.masks["4.weight"].any(dim=1).all())
    for name in NAMES:
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, found.masks[name])
        assert torch.equal(found.scores[name], weight)
        kept = weight[found.masks[name]]
        assert not torch.equal(kept, before[name][found.masks[name]]), "weights must learn"
    assert [row.epoch for row in found.history] == [1, 2, 3, 4]
    assert sum(row.replaced or 0 for row in found.history) > 0, "a mask that never moves is static"
    assert all(row.overfitting is not None for row in found.history)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lives", [1, 3])
def test_an_interrupted_search_resumes_to_the_same_bits(stripes, memory_snapshots, kind, lives) -> None:
    def run(**env: Any) -> tuple[SearchResult, Mapping[str, torch.Tensor]]:
        model = network()
        return trained(stripes, model, kind, **env), model.state_dict()

    snapshots = memory_snapshots(lives)
    with pytest.raises(KeyboardInterrupt):
        run(snapshots=snapshots)
    (whole, straight), (again, resumed) = run(), run(snapshots=snapshots)
    for name in NAMES:
        assert torch.equal(whole.masks[name], again.masks[name])
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def rows(gaps: list[float], robust: list[float]) -> list[Epoch]:
    return [
        Epoch(i, 1.0, 1.0, r, 1.0, overfitting=g) for i, (g, r) in enumerate(zip(gaps, robust, strict=True))
    ]


@pytest.mark.parametrize(
    ("gaps", "robust", "more", "growth"),
    [
        ([0.0], [0.5], 0.0, 0.0),
        ([0.0, 0.1, 0.2], [0.5, 0.6, 0.7], 0.4, 0.0),
        ([0.2, 0.1, 0.0], [0.5, 0.5, 0.4], 0.0, 0.05),
        ([0.0, 0.1, 0.2], [0.5, 0.4, 0.3], 0.4, 0.05),
        ([0.9, 0.0, 0.0, 0.0, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0.4, 0.0),
    ],
)
def test_overfitting_drops_more_and_standing_still_grows_more(gaps, robust, more, growth) -> None:
    """The published rule looks at the last four epochs and decides by half of them."""
    assert FlyingBird({}, {}, adapts=True).pressures(rows(gaps, robust)) == (more, growth)


@pytest.mark.parametrize(
    ("adapts", "gaps", "dropped"), [(False, [0.0, 1.0], 13), (True, [0.0, 1.0], 19), (True, [1.0, 0.0], 13)]
)
def test_an_update_drops_small_weights_and_grows_steep_ones(adapts, gaps, dropped) -> None:
    """A quarter of 50 halfway down the cosine, 40% more where the network overfits."""
    weight = nn.Parameter(torch.arange(1.0, 101.0).view(4, 25))
    weight.grad = torch.zeros(4, 25)
    weight.grad.view(-1)[:10] = 1.0
    mask = (torch.arange(100) >= 50).view(4, 25)
    method = FlyingBird({"w": weight}, {"w": mask}, adapts=adapts)
    history = rows(gaps, [0.5, 0.6])
    method.update(0.5, history, last=False)
    kept = method.masks["w"].view(-1)
    assert int(kept.sum()) == 50 - dropped + 13
    assert bool(kept[:10].all()), "the steepest grow"
    assert bool(kept[50 + dropped :].all())
    method.update(0.9, history, last=True)
    assert int(method.masks["w"].sum()) == 50


def test_admm_projects_on_the_budget_and_adds_up_what_is_left() -> None:
    model = network()
    parameters = dict(model.named_parameters())
    masks = {name: torch.zeros_like(parameters[name], dtype=torch.bool) for name in NAMES}
    for name, count in KEEP.items():
        masks[name].view(-1)[:count] = True
    method = Solver(parameters, masks, teacher=SelfDistillation(model, NAMES))
    loose = float(method.penalty().detach())
    method.update(0.5, [], last=False)
    for name in NAMES:
        w = parameters[name].detach()
        assert int((method.z[name] != 0).sum()) == KEEP[name]
        assert torch.equal(method.z[name] + method.u[name], w)
        assert float((w - method.z[name]).norm()) <= float((w - w * masks[name]).norm())
    assert float(method.penalty().detach()) > loose, "rho rises, and u adds up"


def test_self_distillation_needs_no_attack_and_is_least_for_the_teacher_itself() -> None:
    model = network().eval()
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    teacher = SelfDistillation(model, NAMES)
    objective = Objective(THREAT, "natural")
    same = teacher.loss(objective, model, images, images, labels)
    other = network().eval()
    nn.init.normal_(other[4].weight)
    assert float(same) < float(teacher.loss(objective, other, images, images, labels))
    same.backward()
    assert model[0].weight.grad is not None
    assert not model._forward_hooks
    assert not model[0]._forward_hooks


def test_hsic_tells_dependence_from_independence() -> None:
    """Of linear kernels it is the sum of the squared canonical correlations, here of three dimensions."""
    noise = torch.Generator().manual_seed(0)
    x, z = torch.randn(40, 3, generator=noise), torch.randn(40, 3, generator=noise)
    y = x @ torch.randn(3, 3, generator=noise)
    gram = {name: samples @ samples.T for name, samples in {"x": x, "y": y, "z": z}.items()}
    assert float(hsic(gram["x"], gram["x"])) == pytest.approx(3.0, abs=0.01)
    assert float(hsic(gram["x"], gram["y"])) == pytest.approx(3.0, abs=0.05)
    assert 0 < float(hsic(gram["x"], gram["z"])) < 1
    assert float(hsic(gram["x"], torch.ones(40, 40))) == pytest.approx(0.0, abs=1e-3)
    assert torch.allclose(kernel(x), kernel(x).T, atol=1e-6)
    assert torch.allclose(kernel(x).diagonal(), torch.ones(40), atol=1e-5)


@pytest.mark.parametrize("method", ["flyingbird", "flyingbird-plus", "pwoa"])
def test_the_search_starts_at_the_rate_of_fine_tuning(method) -> None:
    section = PruneSection(method=method, sparsity=0.9, search={"epochs": 3})
    assert (section.search.learning_rate, section.search.weight_decay, section.search.epochs) == (
        0.01,
        1e-4,
        3,
    )
    assert not section.perturbs
    natural = "natural" if method == "pwoa" else "at"
    assert section.search.objective.loss == section.finetune.objective.loss == natural
    assert PruneSection.model_validate(section.model_dump()) == section


@pytest.mark.parametrize(
    ("code", "keys"),
    [
        ("granularity-unfit", {"method": "flyingbird", "sparsity": 0.5, "granularity": "channel"}),
        ("loss-unfit", {"method": "pwoa", "sparsity": 0.5, "search": {"objective": {"loss": "trades"}}}),
        ("s2ap-needs-learned-scores", {"method": "flyingbird", "sparsity": 0.5, "s2ap": True}),
    ],
)
def test_settings_that_do_not_fit_are_refused(code, keys) -> None:
    with pytest.raises(ValidationError, check=lambda error: error.errors()[0]["type"] == code):
        PruneSection.model_validate(keys)
