"""Methods that find the mask by training the weights themselves: dynamic sparse training and ADMM.

Scores and S2AP have no part in them. A method changes the mask, or pulls the weights towards one, while
:func:`train_sparse` trains the weights as fine-tuning does. All end with the exact budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from s2ap_deploy.data.splits import Split
from s2ap_deploy.pruning.masks import hamming, replaced, top_k
from s2ap_deploy.pruning.scores import ScoredNetwork, keep_one_per_row
from s2ap_deploy.pruning.search import SearchResult, recalibrate_by
from s2ap_deploy.recipe.sections import SearchSection
from s2ap_deploy.runtime import derive_seed, seed_layers
from s2ap_deploy.training.adversary import Adversary
from s2ap_deploy.training.batchnorm import shared_statistics
from s2ap_deploy.training.objective import Objective, SelfDistillation
from s2ap_deploy.training.pgd import pgd_accuracy
from s2ap_deploy.training.train import (
    VALIDATION_STEPS,
    Epoch,
    EpochLoop,
    TrainingData,
    TrainingEnvironment,
    enforce,
    load_loop,
    load_momentum,
    momentum,
    save_loop,
    train_step,
    validation_sample,
)

UPDATES = 2  # of the mask, per epoch
DROP = 0.5  # share of the kept weights that the first update drops; it falls with half a cosine to 0
OVERFIT_DROP, UNDERFIT_GROWTH = 0.4, 0.05  # so much more of that is dropped, or grown
WINDOW, THRESHOLD = 4, 0.5  # epochs that are looked back on, and the share of them that decides
RHO = (0.01, 0.1, 1.0)  # of ADMM, in the three parts of the search

Masks = dict[str, Tensor]
Parameters = Mapping[str, nn.Parameter]


class FlyingBird:
    """Drop the smallest kept weights and grow those of largest gradient, in every layer.

    Flying Bird (Chen et al., ICLR 2022, arXiv 2202.09844). With ``adapts`` it is Flying Bird+: in the second
    half of the search an update drops 40% more where the network overfits (the gap between robust accuracy
    on training and on validation images rose in half of the last epochs), and grows 5% more where robust
    validation accuracy did not rise in half of them. Here it starts from the magnitude mask of a robust
    network, and the last update brings every layer back to its count: the budget is exact.

    ``covered`` layers keep a weight of every row, as in :class:`ScoredNetwork`.
    """

    teacher: SelfDistillation | None = None
    enforces = True  # weights outside the mask are 0 while the others learn

    def __init__(
        self, parameters: Parameters, masks: Masks, covered: Sequence[str] = (), *, adapts: bool = False
    ) -> None:
        self.parameters, self.covered, self.adapts = parameters, frozenset(covered), adapts
        self.masks = dict(masks)
        self.budget = {name: int(mask.sum()) for name, mask in masks.items()}

    @torch.no_grad()
    def update(self, done: float, history: Sequence[Epoch], *, last: bool) -> None:
        """Change the masks after the share ``done`` of the search, by the gradients of the last step."""
        more, growth = self.pressures(history) if self.adapts and done >= 0.5 else (0.0, 0.0)
        for name, mask in self.masks.items():
            weight, count = self.parameters[name], int(mask.sum())
            slope = torch.zeros_like(weight) if weight.grad is None else weight.grad
            least = len(weight) if name in self.covered else 1
            # Drop by magnitude: half of the kept weights first, ever fewer later.
            moved = math.ceil(DROP * 0.5 * (1 + math.cos(math.pi * done)) * count)
            after = count - math.ceil(moved * (1 + more)) + int(moved * (1 + growth))
            after = self.budget[name] if last else min(max(after, least), mask.numel())
            stay = min(max(count - math.ceil(moved * (1 + more)), least), after)
            chosen = self.largest(name, weight.abs().masked_fill(~mask, -1.0), stay)
            # Grow by gradient; what was dropped may return.
            self.masks[name] = chosen | top_k(slope.abs().masked_fill(chosen, -1.0), after - stay)

    def largest(self, name: str, importance: Tensor, count: int) -> Tensor:
        """Select the ``count`` largest entries, of a covered layer one in every row first."""
        return top_k(keep_one_per_row(importance) if name in self.covered else importance, count)

    def pressures(self, history: Sequence[Epoch]) -> tuple[float, float]:
        """Return how much more to drop and to grow, by the last epochs of ``history``."""
        rows = history[-WINDOW - 1 :]
        pairs = list(itertools.pairwise(rows))
        if not pairs:
            return 0.0, 0.0
        overfit = sum((b.overfitting or 0.0) > (a.overfitting or 0.0) for a, b in pairs) / len(pairs)
        stuck = sum(b.robust_accuracy <= a.robust_accuracy for a, b in pairs) / len(pairs)
        return OVERFIT_DROP * (overfit >= THRESHOLD), UNDERFIT_GROWTH * (stuck >= THRESHOLD)

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed search needs; ``load`` restores it."""
        return dict(self.masks)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name: state[name].to(mask.device) for name, mask in self.masks.items()}

    def finish(self) -> Masks:
        """Return the masks, which meet the budget."""
        return self.masks


class Solver(FlyingBird):
    """Pull the weights towards the budget by ADMM, under PwoA's loss without adversarial images.

    PwoA (Jian et al., 2022, arXiv 2210.04311): minimize L(w) + ρ/2 ‖w − z + u‖² in turn with the projection z
    of w + u on the budget, u ← u + w − z (Zhang et al., 2018, section 3). ρ rises tenfold twice. The mask is
    that of the largest weights at the end.
    """

    enforces = False

    def __init__(
        self,
        parameters: Parameters,
        masks: Masks,
        covered: Sequence[str] = (),
        *,
        teacher: SelfDistillation,
    ) -> None:
        super().__init__(parameters, masks, covered)
        self.teacher = teacher
        self.z = {name: parameters[name].detach() * mask for name, mask in masks.items()}
        self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self.rho = RHO[0]
        teacher.penalty = self.penalty

    def penalty(self) -> Tensor:
        """Return ρ/2 ‖w − z + u‖² over all layers."""
        pulls = [(self.parameters[name] - z + self.u[name]).square().sum() for name, z in self.z.items()]
        return 0.5 * self.rho * torch.stack(pulls).sum()

    @torch.no_grad()
    def update(self, done: float, history: Sequence[Epoch], *, last: bool) -> None:
        self.rho = RHO[min(int(done * len(RHO)), len(RHO) - 1)]
        for name, u in self.u.items():
            moved = self.parameters[name] + u
            self.masks[name] = self.largest(name, moved.abs(), self.budget[name])
            self.z[name] = moved * self.masks[name]
            u.copy_(moved - self.z[name])

    def state(self) -> dict[str, Tensor]:
        parts = {"mask": self.masks, "z": self.z, "u": self.u}
        named = {f"{part}/{name}": value for part, all_ in parts.items() for name, value in all_.items()}
        return {**named, "rho": torch.tensor(self.rho, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.rho = float(state["rho"])
        for name in self.masks:
            self.masks[name] = state[f"mask/{name}"].to(self.u[name].device)
            self.z[name] = state[f"z/{name}"].to(self.u[name])
            self.u[name].copy_(state[f"u/{name}"])

    @torch.no_grad()
    def finish(self) -> Masks:
        """Return the masks of the largest weights."""
        self.masks = {
            name: self.largest(name, self.parameters[name].abs(), count)
            for name, count in self.budget.items()
        }
        return self.masks


def mask_method(scored: ScoredNetwork, kind: str) -> FlyingBird:
    """Return the mask method ``kind`` (``Method.sparse``), from the magnitude mask of the budget."""
    parameters = dict(scored.network.named_parameters())
    if kind == "admm":
        teacher = SelfDistillation(scored.network, list(scored.masked))
        masks = scored.masks()
        return Solver(parameters, masks, tuple(scored.covered), teacher=teacher)
    masks = scored.finish()
    return FlyingBird(parameters, masks, tuple(scored.covered), adapts=kind == "flying-bird-plus")


def train_sparse(
    scored: ScoredNetwork,
    kind: str,
    data: TrainingData,
    section: SearchSection,
    objective: Objective,
    env: TrainingEnvironment,
) -> SearchResult:
    """Train the weights of a robust network while the method ``kind`` moves its mask.

    The network keeps the trained weights under the final mask, and they are the ``scores`` of the result.
    Raises InputError when the loss stops being finite.
    """
    network = scored.network
    method = mask_method(scored, kind)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )
    adversary = Adversary(objective, env.ranks)
    loop = EpochLoop("search", network, optimizer, adversary, data, section, env)
    history = resume(network, optimizer, adversary, method, env)
    # The mask is updated in the middle and at the end of epochs.
    steps = loop.steps * adversary.replays
    due = {update * steps // UPDATES for update in range(1, UPDATES * section.epochs)} - {0}
    loop.begin(len(history))

    for epoch in range(len(history), section.epochs):
        # Train the weights for one epoch, and move the mask when an update is due.
        before, losses = dict(method.masks), []
        for index, (batch, noise) in enumerate(loop.batches(epoch), 1 + epoch * steps):
            pruned = (
                [(parameters[name], mask) for name, mask in method.masks.items()] if method.enforces else []
            )
            with loop.computing:
                losses.append(
                    train_step(network, optimizer, adversary, batch, noise, None, pruned, method.teacher)
                )
            if index in due:
                method.update(index / (steps * section.epochs), history, last=index == max(due))
                if method.enforces:
                    settle(method.masks, parameters, optimizer)
        # Measure the epoch, and how much better the network does on images that it was trained on.
        accuracy = loop.validate()
        row = loop.row(
            epoch,
            losses,
            accuracy,
            replaced=replaced(before, method.masks),
            hamming=hamming(before, method.masks),
            overfitting=accuracy_on(data.train, network, objective, env) - accuracy.robust_accuracy,
        )
        history.append(row)
        loop.record(row)
        groups = {
            "now": network.state_dict(),
            "method": method.state(),
            "adversary": adversary.state(),
            "momentum": momentum(optimizer, parameters),
        }
        save_loop(env.snapshots, groups, history)

    env.recorder.end()
    # Cut to the budget, and measure BatchNorm under the final mask.
    masks = method.finish()
    enforce([(parameters[name], mask) for name, mask in masks.items()])
    seed_layers(env.seed, "search", "layers", section.epochs, env.ranks.rank)
    with shared_statistics(network, env.ranks):
        recalibrate_by(section, network, data.train, objective, env)
    return SearchResult({name: parameters[name].detach().clone() for name in masks}, masks, history, 0)


def resume(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    method: FlyingBird,
    env: TrainingEnvironment,
) -> list[Epoch]:
    """Restore the last snapshot; return the epochs already done."""
    saved = load_loop(env.snapshots)
    if saved is None:
        return []
    network.load_state_dict(saved.group("now"))
    load_momentum(optimizer, dict(network.named_parameters()), saved.group("momentum"))
    adversary.load(saved.group("adversary"))
    method.load(saved.group("method"))
    return saved.history


def accuracy_on(train: Split, network: nn.Module, objective: Objective, env: TrainingEnvironment) -> float:
    """Measure robust accuracy on as many training images as validation has, under the same attack."""
    found = pgd_accuracy(
        network,
        validation_sample(train, env.seed),
        threat=objective.threat,
        steps=VALIDATION_STEPS,
        seed=derive_seed(env.seed, "overfitting"),
        device=env.device,
        ranks=env.ranks,
    )
    return found.robust_accuracy


@torch.no_grad()
def settle(masks: Masks, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Zero what a new mask drops, and the momentum of weights that were 0, so that they grow from rest."""
    for name, mask in masks.items():
        weight = parameters[name]
        resting = weight == 0
        weight.mul_(mask).add_(0.0)
        buffer = optimizer.state[weight].get("momentum_buffer")
        if buffer is not None:
            buffer.masked_fill_(resting | ~mask, 0.0)
