"""A small robust network and real digits for the attacks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2ap_deploy.evaluation.autoattack import protocols

MakeNetwork = Callable[..., nn.Sequential]


@pytest.fixture(scope="session")
def make_network() -> MakeNetwork:
    """``make_network(num_classes, channels, side)``: random weights, built of torch's own modules."""

    def make(num_classes: int = 10, channels: int = 1, side: int = 8) -> nn.Sequential:
        torch.manual_seed(num_classes + channels + side)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * side * side, num_classes),
        )

    return make


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """Real hand-written digits: images [1797, 1, 8, 8] in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(found.target)


@pytest.fixture(scope="session")
def robust_network(digits) -> nn.Sequential:
    """A few seconds of PGD training at Linf 0.1 on the first 1,200 digits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    images, labels = (values[:1200] for values in digits)
    for _ in range(8):
        for batch in torch.randperm(1200).split(64):
            x, y = images[batch], labels[batch]
            attacked = x
            for _ in range(4):
                attacked = attacked.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(network(attacked), y), attacked)
                attacked = attacked.detach() + 0.04 * gradient.sign()
                attacked = torch.min(torch.max(attacked, x - 0.1), x + 0.1).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(network(attacked), y).backward()
            optimizer.step()
    return network.eval()


@pytest.fixture
def short(monkeypatch) -> None:
    """A fraction of the published iterations, for tests of the orchestration and not of the attacks."""
    few = {name: 60 if name == "square" else 5 for name in protocols.ITERATIONS}
    monkeypatch.setattr(protocols, "ITERATIONS", few)
