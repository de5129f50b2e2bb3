"""Random networks for measurements that do not depend on what weights mean: time, memory, size."""

import torch
from torch import nn

from s2ap_deploy import runtime
from s2ap_deploy.data.splits import Augmentation, MemorySplit
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.classifier import Classifier
from s2ap_deploy.models.used_weights import prunable
from s2ap_deploy.pruning.allocation import Fixed
from s2ap_deploy.pruning.budgets import erk, uniform
from s2ap_deploy.pruning.granularity import Weights
from s2ap_deploy.pruning.scores import ScoredNetwork

CIFAR = (3, 32, 32)
BUDGETS = {"erk": erk, "uniform": uniform}


def network(arch: str) -> tuple[Classifier, tuple[int, int, int]]:
    """A network with random weights, and the size of its input."""
    torch.manual_seed(0)
    architecture = registry.resolve(arch)
    assert architecture.input_size is not None
    return Classifier(architecture.build(10)), architecture.input_size


def quotas(
    model: nn.Module, size: tuple[int, int, int], sparsity: float = 0.9, budget: str = "erk"
) -> dict[str, int]:
    """How many weights each prunable layer keeps."""
    shapes = {name: tuple(model.get_parameter(name).shape) for name in prunable(model, size)}
    return BUDGETS[budget](shapes, sparsity)


def scored(model: nn.Module, keep: dict[str, int]) -> ScoredNetwork:
    """``model`` with scores on the weights that ``keep`` names."""
    return ScoredNetwork(model, Weights(list(keep)), Fixed(keep))


def pruned(arch: str, sparsity: float, budget: str = "erk") -> Classifier:
    """A random network under a random mask; BatchNorm as initialized."""
    classifier, size = network(arch)
    classifier.eval()
    for name, count in quotas(classifier, size, sparsity, budget).items():
        weight = classifier.get_parameter(name)
        order = torch.randperm(weight.numel(), generator=runtime.generator(0, "mask", name))
        weight.data.view(-1)[order[count:]] = 0.0
    return classifier


def calibrate(model: nn.Module, batches: int) -> nn.Module:
    """Give BatchNorm random weights and the statistics of noise; returns ``model`` in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
        for _ in range(batches):
            model.train()(torch.rand(64, *CIFAR))
    for norm in norms:
        norm.momentum = 0.1  # without one the exporter meets a data-dependent branch
    return model.eval()


def images(count: int, size: tuple[int, int, int]) -> MemorySplit:
    """Random images in ten classes, augmented as CIFAR's are."""
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=stream)
    labels = torch.randint(0, 10, (count,), generator=stream)
    return MemorySplit(pixels, labels, [str(i) for i in range(count)], Augmentation(padding=4, flip=True))
