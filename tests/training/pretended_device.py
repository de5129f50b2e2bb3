"""Training steps on a device that only pretends to be one, and what in them would wait for it.

Run as a program by ``test_waiting``, in a process of its own: torch cannot forget a device once it is
registered. Values live on the CPU under another device's name, so every branch that a GPU takes is taken. As
on a GPU, tensors of two devices do not mix. Whatever makes the host wait for the device is counted: reading a
value, a shape that depends on values, indexing by a mask, a copy between host and device. Not seen: autocast
and compilation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from s2ap_deploy import runtime

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
A = torch.ops.aten
UNBOUND = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
CROSSING = (A._to_copy, A.copy_, A.lift_fresh)
INDEXING = (A.index, A.index_put, A.index_put_, A._index_put_impl_)

waits: Counter[str] = Counter()


class Pretended(Tensor):
    """A tensor of the device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, kwargs or {})

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.held.tolist()


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, kwargs or {})


def on_device(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """One operation: refused where devices mix, counted where it waits, computed on the CPU."""
    given = [each for each in tree.tree_leaves((args, dict(kwargs))) if isinstance(each, Tensor)]
    ours = [each for each in given if isinstance(each, Pretended)]
    hosts = [each for each in given if not isinstance(each, Pretended)]
    packet = func.overloadpacket
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if ours and packet not in (*CROSSING, *INDEXING) and any(each.dim() > 0 for each in hosts):
        raise RuntimeError(f"{func} was given tensors of two devices")
    if (reason := waiting(func, args, kwargs, ours, hosts, asked)) is not None:
        waits[reason] += 1
    owners = {id(each.held): each for each in ours}
    plain = tree.tree_map(
        lambda each: each.held if isinstance(each, Pretended) else each, (args, dict(kwargs))
    )
    if asked is not None:
        plain[1]["device"] = torch.device("cpu")
    out = func(*plain[0], **plain[1])
    if packet is A.copy_:
        return args[0]
    here = asked == DEVICE.type if asked is not None else bool(ours)

    def name(each: Any) -> Any:
        if not here or not isinstance(each, Tensor) or isinstance(each, Pretended):
            return each
        return owners[id(each)] if id(each) in owners else Pretended(each)

    return tree.tree_map(name, out)


def waiting(
    func: Any,
    args: Any,
    kwargs: Mapping[str, Any],
    ours: Sequence[Tensor],
    hosts: Sequence[Tensor],
    asked: str | None,
) -> str | None:
    """Why the host would wait for a GPU in this operation, or None."""
    packet = func.overloadpacket
    if packet is A._to_copy and asked is not None and (asked == DEVICE.type) != bool(ours):
        to_device = asked == DEVICE.type
        return None if to_device and kwargs.get("non_blocking") else f"copy to {asked}"
    if packet is A.copy_ and ours and hosts:
        return "copy_ between devices"
    if packet in INDEXING and ours:
        indices = [each for each in args[1] if each is not None]
        by_mask = any(each.dtype in (torch.bool, torch.uint8) for each in indices)
        filled = packet is not A.index and len(indices) == 1 and args[2].numel() == 1  # a masked_fill
        if (by_mask and not filled) or any(not isinstance(each, Pretended) for each in indices):
            return f"{func} by a mask or by indices of the host"
        return None
    return str(func) if ours and any(tag in UNBOUND for tag in func.tags) else None


# Whatever the modules below take from ``runtime`` by name: the device has no generator of its own.
keyed = runtime.generator
runtime.generator = lambda *keys, device="cpu": keyed(*keys)

from s2ap_deploy.data.splits import Augmentation, MemorySplit  # noqa: E402
from s2ap_deploy.distributed.collectives import SINGLE_PROCESS, Ranks  # noqa: E402
from s2ap_deploy.pruning.allocation import Allocation, Fixed, Global, Quotas  # noqa: E402
from s2ap_deploy.pruning.budgets import floors  # noqa: E402
from s2ap_deploy.pruning.granularity import NOfM, Weights  # noqa: E402
from s2ap_deploy.pruning.scores import ScoredNetwork  # noqa: E402
from s2ap_deploy.pruning.search import Perturbation, search  # noqa: E402
from s2ap_deploy.recipe.sections import SearchSection, TrainSection  # noqa: E402
from s2ap_deploy.recorder import Silent  # noqa: E402
from s2ap_deploy.spec import ThreatModel  # noqa: E402
from s2ap_deploy.training.objective import Objective, Teacher  # noqa: E402
from s2ap_deploy.training.train import (  # noqa: E402
    TrainingData,
    TrainingEnvironment,
    train,
)

COMMON = ("at", "trades", "mart")
LOSSES = (*COMMON, "fast", "free")
NAMES = ("0.weight", "4.weight")
EPOCHS, STEPS, BATCH = 2, 2, 6


class Twins(Ranks):
    """The first of two ranks that find the same."""

    size = 2

    def reduce(self, flat: Tensor) -> None:
        flat.mul_(2)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor])


class Watch(Silent):
    """What was waited for in each step that follows another one of its epoch, its batch included."""

    def __init__(self) -> None:
        self.steps = 0
        self.found: list[dict[str, int]] = []

    def advance(self, steps: int = 1) -> None:
        self.steps += steps
        if steps and self.steps % STEPS != 1:
            self.found.append(dict(waits))
        waits.clear()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def split(n: int) -> MemorySplit:
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=stream)
    labels = torch.randint(0, 3, (n,), generator=stream)
    return MemorySplit(pixels, labels, [str(i) for i in range(n)], Augmentation(padding=1, flip=True))


def objective(loss: str) -> Objective:
    return Objective(
        ThreatModel(eps="0.1"), loss, **({} if loss in ("fast", "free") else {"attack_steps": 2})
    )


def allocations(model: nn.Module) -> dict[str, Callable[[], Allocation]]:
    shapes = {name: tuple(model.get_parameter(name).shape) for name in NAMES}
    sizes = {name: model.get_parameter(name).numel() for name in NAMES}
    least = floors(shapes, classifier=NAMES[-1], dense=())
    return {
        "fixed": lambda: Fixed({"0.weight": 30, "4.weight": 60}),
        "global": lambda: Global(sizes, 0.7, least),
        "quotas": lambda: Quotas(shapes, 0.7, least, device=DEVICE),
    }


def searched(loss: str, kind: str, ranks: Ranks) -> list[dict[str, int]]:
    watch, model = Watch(), network().to(DEVICE)
    if kind == "2:4":
        scored = ScoredNetwork(model, NOfM(NAMES[-1:], 2, 4), Fixed({NAMES[-1]: 216}))
    else:
        scored = ScoredNetwork(model, Weights(NAMES), allocations(model)[kind](), covered=NAMES[-1:])
    search(
        scored,
        TrainingData(split(STEPS * BATCH), split(6)),
        SearchSection(epochs=EPOCHS, batch_size=BATCH),
        objective(loss),
        TrainingEnvironment(DEVICE, recorder=watch, ranks=ranks),
        perturbation=Perturbation(0.05, 1),
    )
    return watch.found


def trained(loss: str, ranks: Ranks, *, distilled: bool = False) -> list[dict[str, int]]:
    watch, model = Watch(), network().to(DEVICE)
    mask = (torch.arange(3 * 144).view(3, 144) % 2 == 0).to(DEVICE)
    train(
        model,
        TrainingData(split(STEPS * BATCH), split(6)),
        TrainSection(epochs=EPOCHS, batch_size=BATCH, awp_gamma=0.01, awp_warmup_epochs=1),
        objective(loss),
        TrainingEnvironment(DEVICE, recorder=watch, ranks=ranks),
        stage="finetune",
        masks={"4.weight": mask},
        teacher=Teacher(model, weight=0.5) if distilled else None,
    )
    return watch.found


def controls() -> dict[str, list[str]]:
    """Operations that do wait, so that counting none elsewhere means something, and some that do not."""
    on = torch.arange(6.0).to(DEVICE)
    mask = on > 2
    cases: dict[str, Callable[[], object]] = {
        "float": lambda: float(on.sum()),
        "if": lambda: bool(mask.any()),
        "tolist": lambda: on.tolist(),
        "nonzero": lambda: mask.nonzero(),
        "mask": lambda: on[mask],
        "host index": lambda: on[torch.tensor([1, 2])],
        "from host": lambda: torch.tensor([1.0], device=DEVICE),
        "to host": lambda: on.cpu(),
        "nothing": lambda: torch.where(mask, on, 0.0).sort().values[2] + torch.zeros(6, device=DEVICE),
    }
    found = {}
    for name, case in cases.items():
        waits.clear()
        case()
        found[name] = sorted(waits)
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is a copy from the host
    with Device():
        found: dict[str, Any] = {"controls": controls(), "search": {}, "finetune": {}}
        for ranks, losses in ((SINGLE_PROCESS, LOSSES), (Twins(), COMMON)):
            for loss in losses:
                found["search"][f"{loss}, fixed, {ranks.size}"] = searched(loss, "fixed", ranks)
                found["finetune"][f"{loss}, {ranks.size}"] = trained(loss, ranks)
            for kind in ("global", "quotas", "2:4"):
                found["search"][f"trades, {kind}, {ranks.size}"] = searched("trades", kind, ranks)
        found["finetune"]["trades, distilled, 1"] = trained("trades", SINGLE_PROCESS, distilled=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
