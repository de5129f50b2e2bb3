"""Layouts of published checkpoints, defined here, and what the reader makes of each: docs/checkpoints.md.

    python tests/models/checkpoints/test_layouts.py        (writes the page)

Every layout is a file made of a network whose function is known. A file that loads must give that function's
logits; one that gives another function must at least say what was not compared.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import io
import json
import pickle
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from s2ap_deploy.errors import DeployError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.models.checkpoints.checkpoint import load
from s2ap_deploy.spec import Normalization

Outcome = Literal["by itself", "with options", "with a note", "refused", "wrong"]
State = Mapping[str, Any]
IMAGE = (1, 8, 8)
UNIT = Normalization(mean=(0.25,), std=(0.5,))
OWN = """
import torch
import torch.nn.functional as F
from torch import nn


class Own(nn.Module):
    def __init__(self, kind, num_classes):
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        elif kind == "rows":
            self.mix = nn.Conv1d(8, 8, 3, padding=1)
        elif kind == "upwards":
            self.mix = nn.ConvTranspose2d(1, 1, 3, padding=1)
        elif kind == "parameter":
            self.mix = nn.Parameter(torch.randn(1, 1, 3, 3))
        elif kind == "weight norm":
            self.mix = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3, padding=1))
        elif kind == "spectral norm":
            self.mix = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 1, 3, padding=1))
        elif kind == "old weight norm":
            self.mix = nn.utils.weight_norm(nn.Conv2d(1, 1, 3, padding=1))
        elif kind == "old spectral norm":
            self.mix = nn.utils.spectral_norm(nn.Conv2d(1, 1, 3, padding=1))
        elif kind == "group norm":
            self.mix = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1))
        else:
            self.mix = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        if self.kind == "attention":
            x = self.mix(x[:, 0], x[:, 0], x[:, 0], need_weights=False)[0]
        elif self.kind == "rows":
            x = self.mix(x[:, 0])
        elif self.kind == "parameter":
            x = F.conv2d(x, self.mix, padding=1)
        else:
            x = self.mix(x)
        return self.head(F.gelu(x).flatten(1))


def maker(kind):
    def make(num_classes=10):
        return Own(kind, num_classes)

    make.input_size = (1, 8, 8)
    return make


attention, rows, upwards = maker("attention"), maker("rows"), maker("upwards")
parameter, plain = maker("parameter"), maker("plain")
weight_norm, spectral_norm = maker("weight norm"), maker("spectral norm")
old_weight_norm, old_spectral_norm = maker("old weight norm"), maker("old spectral norm")
group_norm = maker("group norm")
"""
OWN_KINDS = (
    *("attention", "rows", "upwards", "parameter", "plain", "group_norm"),
    *("weight_norm", "spectral_norm", "old_weight_norm", "old_spectral_norm"),
)


@dataclass(frozen=True)
class Layout:
    """A file and its function: ``write`` makes the file, ``function`` maps images to logits.

    ``options`` are keywords of ``load``, tried where the file is refused without them.
    """

    group: str
    name: str
    write: Callable[[Path], object]
    function: Callable[[Tensor], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ".pt"
    heavy: bool = False
    size: tuple[int, int, int] = IMAGE


@dataclass(frozen=True)
class Result:
    """What the reader made of a layout: ``words`` are the options, or the refusal's code."""

    outcome: Outcome
    words: str = ""


def examined(layout: Layout, folder: Path) -> Result:
    """Write the layout's file into ``folder`` and load it, without options and then with them."""
    path = folder / f"model{layout.suffix}"
    layout.write(path)
    result = Result("refused")
    for options in ({}, dict(layout.options)):
        try:
            classifier, _, notes = load(path, **options)
        except DeployError as error:
            if error.exit_code != 2:
                raise
            if result.outcome == "refused":
                result = Result("refused", str(error.code))
            continue
        images = torch.rand(2, *layout.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            same = torch.allclose(classifier(images), layout.function(images), atol=1e-4, rtol=1e-4)
        if same and not options:
            return Result("by itself")
        if same:
            return Result("with options", " ".join(_option(*each) for each in options.items()))
        if not any("not compared" in note or "several sets" in note for note in notes):
            return Result("wrong")
        result = Result("with a note")
    return result


def _option(name: str, value: Any) -> str:
    if name == "trust_pickle":
        return "--trust-pickle"
    if name == "normalization":
        return "--mean --std"
    return f"--{name} {Path(value).name if name == 'arch' and '.py:' in value else value}"


def _network(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return registry.build(name, classes).eval()


def _save(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def _prefixed(state: State, prefix: str) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _nested(state: State, *keys: str) -> Any:
    content: Any = dict(state)
    for key in reversed(keys):
        content = {key: content}
    return content


def layouts(folder: Path) -> list[Layout]:
    """Return every layout; ``folder`` gets the code of the user's own networks."""
    warnings.simplefilter("ignore")
    network = _network("digits-conv")
    state = dict(network.state_dict())
    other = {name: tensor + 1 for name, tensor in state.items()}
    return [
        *_containers(network, state),
        *_competing(network, state, other),
        *_prefixes(network, state, other),
        *_normalizations(network, state),
        *_types(network, state),
        *_extras(network, state),
        *_formats(network, state),
        *_functions(network, state),
        *_families(),
        *_own(folder),
    ]


def _containers(network: nn.Module, state: State) -> list[Layout]:
    solver = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    trained = {"epoch": 90, "optimizer": solver.state_dict()}
    wrappers = (
        *("state_dict", "net", "model_state_dict", "model", "network", "net_state_dict", "module", "params"),
        *("weights", "classifier", "student", "model_best", "best_model", "best_state_dict", "ema", "swa"),
        *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "swa_state_dict"),
        *("last", "state", "checkpoint", "some_name"),
    )
    deep = (
        *(("model", "state_dict"), ("checkpoint", "model"), ("trainer", "network", "state_dict")),
        *(("a", "b", "c", "d"), ("results", "best", "weights")),
    )
    found = [Layout("container", "bare state dict", _save(state), network)]
    found.append(Layout("container", "bare, ordered", _save(OrderedDict(state)), network))
    found += [
        Layout("container", f"under {name}", _save({name: state, **trained}), network) for name in wrappers
    ]
    found += [
        Layout("container", f"under {'.'.join(keys)}", _save(_nested(state, *keys)), network) for keys in deep
    ]
    metrics = {"model": state, "acc": torch.tensor(0.9)}
    found += [
        Layout("container", "beside metrics of tensors", _save(metrics), network),
        Layout("container", "a list of one", _save([state]), network),
        Layout("container", "under an empty key", _save({"": state}), network),
        Layout("container", "optimizer alone", _save(trained), network),
        Layout("container", "metrics alone", _save({"epoch": 3, "loss": 0.1}), network),
        Layout("container", "empty dictionary", _save({}), network),
    ]
    return found


def _competing(network: nn.Module, state: State, other: State) -> list[Layout]:
    pairs = (
        *(("state_dict", "state_dict_ema"), ("model", "ema"), ("params", "params_ema"), ("net", "swa")),
        *(
            ("student", "teacher"),
            ("model", "model_best"),
            ("module", "ema_state_dict"),
            ("model", "averager"),
        ),
    )
    found = []
    for mine, theirs in pairs:
        content = {theirs: other, mine: state}
        found.append(Layout("several", f"{mine} and {theirs}", _save(content), network))
        turned = {theirs: state, mine: other}
        key = {"key": theirs}
        found.append(Layout("several", f"{theirs}, beside {mine}", _save(turned), network, key))
    for size in (2, 5):
        members = [other] * (size - 1) + [dict(state)]
        key = {"key": f"state_dict.{size - 1}"}
        found.append(Layout("several", f"a list of {size}", _save({"state_dict": members}), network, key))
    key = {"key": "right"}
    found.append(Layout("several", "two unknown names", _save({"left": other, "right": state}), network, key))
    return found


def _prefixes(network: nn.Module, state: State, other: State) -> list[Layout]:
    prefixes = (
        *("module.", "_orig_mod.", "model.", "basic_model.", "1.", "module.model.", "net.", "network."),
        *("backbone.", "encoder.", "module._orig_mod.", "student.", "classifier.net.", "model.model.model."),
        *("trainer.module.net.", "f.", "base_model.model."),
    )
    found = [
        Layout("prefix", prefix, _save({"state_dict": _prefixed(state, prefix)}), network)
        for prefix in prefixes
    ]
    strays: dict[str, dict[str, Tensor]] = {
        "n_averaged": {"n_averaged": torch.tensor(3)},
        "criterion.weight": {"criterion.weight": torch.ones(10)},
        "metrics": {"train_acc.total": torch.tensor(1.0), "val_acc.total": torch.tensor(1.0)},
        "a projection head": {"projection.weight": torch.ones(4, 128), "projection.bias": torch.ones(4)},
    }
    for name, stray in strays.items():
        content = {**_prefixed(state, "module."), **stray}
        found.append(Layout("prefix", f"module., beside {name}", _save(content), network))
        content, options = {**_prefixed(state, "net.body."), **stray}, {"arch": "digits-conv"}
        found.append(Layout("prefix", f"net.body., beside {name}", _save(content), network, options))
    for name, stray in strays.items():
        found.append(Layout("prefix", f"none, beside {name}", _save({**state, **stray}), network))
    both = {**_prefixed(other, "teacher."), **_prefixed(state, "student.")}
    found.append(Layout("prefix", "student. and teacher.", _save(both), network))
    averaged = {**_prefixed(state, "model."), **_prefixed(other, "ema_model.")}
    found.append(Layout("prefix", "model. and ema_model.", _save(averaged), network))
    twins = {**_prefixed(other, "left."), **_prefixed(state, "right.")}
    found.append(Layout("prefix", "left. and right.", _save(twins), network))
    attacker = {**_prefixed(state, "module.model."), **_prefixed(state, "module.attacker.model.")}
    found.append(Layout("prefix", "a second copy inside an attacker", _save({"model": attacker}), network))
    return found


def _normalizations(network: nn.Module, state: State) -> list[Layout]:
    def function(images: Tensor) -> Tensor:
        return network((images - 0.25) / 0.5)  # type: ignore[no-any-return]

    names = (
        *(("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std"), ("0.mean", "0.std")),
        *(("normalizer.new_mean", "normalizer.new_std"), ("module.normalize.means", "module.normalize.sds")),
        *(("pixel_mean", "pixel_std"), ("data_mean", "data_std"), ("norm.mean", "norm.std")),
        *(("backbone.preprocess.image_mean", "backbone.preprocess.image_std"), ("model.mu", "model.sigma")),
    )
    found = []
    for mean, std in names:
        prefix = "1." if mean.startswith("0.") else "module." if mean.startswith("module.") else ""
        content = {**_prefixed(state, prefix), mean: torch.tensor([0.25]), std: torch.full((1, 1, 1), 0.5)}
        found.append(Layout("normalization", f"{mean}, {std}", _save(content), function))
    for scale, name in ((255.0, "for bytes"), (25500.0, "of no images")):
        content = {**state, "mean": torch.tensor([0.25 * scale]), "std": torch.tensor([0.5 * scale])}
        found.append(Layout("normalization", name, _save(content), function))
    bytes_ = Normalization(mean=(63.75,), std=(127.5,))
    half = {**state, "mean": torch.tensor([0.25])}
    found += [
        Layout("normalization", "a mean without deviation", _save(half), function),
        Layout("normalization", "an option", _save(state), function, {"normalization": UNIT}),
        Layout("normalization", "an option for bytes", _save(state), function, {"normalization": bytes_}),
    ]
    return found


def _types(network: nn.Module, state: State) -> list[Layout]:
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
        kind = str(dtype).removeprefix("torch.")
        cast = {name: tensor.to(dtype) for name, tensor in state.items()}
        rounded = _network("digits-conv")
        rounded.load_state_dict({name: tensor.float() for name, tensor in cast.items()})
        found.append(Layout("type", kind, _save(cast), rounded))
    first = next(iter(state))
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(4)], layout=torch.jagged)
    packed = torch.zeros(32, 1, 3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    quantized = torch.quantize_per_tensor(state[first], 0.1, 0, torch.qint8)
    for kind, tensor in (
        ("sparse", state[first].to_sparse()),
        ("float4", packed),
        ("complex", state[first].to(torch.complex64)),
        ("integers", state[first].to(torch.int32)),
        ("quantized", quantized),
        ("nested", nested),
        ("meta", state[first].to("meta")),
        ("NaN", state[first] * float("nan")),
    ):
        found.append(Layout("type", kind, _save({**state, first: tensor}), network))
    return found


def _extras(network: nn.Module, state: State) -> list[Layout]:
    extras: dict[str, Any] = {
        "numbers and text": {"epoch": 3, "note": "best", "lr": 0.1},
        "numpy scalar": np.float64(0.9),
        "numpy array": np.arange(3),
        "numpy strings": np.array(["a", "b"]),
        "numpy objects": np.array([{}], dtype=object),
        "complex numpy": np.array([1 + 2j]),
        "argparse.Namespace": argparse.Namespace(lr=0.1),
        "a date": datetime.datetime(2024, 1, 1),
        "a path": Path("runs"),
        "a device": torch.device("cpu"),
        "a size": torch.Size([3]),
    }
    trust = {"trust_pickle": True}
    return [
        Layout("extras", name, _save({"state_dict": state, "extra": extra}), network, trust)
        for name, extra in extras.items()
    ]


def _formats(network: nn.Module, state: State) -> list[Layout]:
    def zipped(path: Path) -> None:
        stream = io.BytesIO()
        torch.save(dict(state), stream)
        path.write_bytes(gzip.compress(stream.getvalue()))

    def sharded(path: Path) -> None:
        listed = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(state)}
        for part in set(listed.values()):
            save_file({n: t for n, t in state.items() if listed[n] == part}, path.with_name(part))
        path.write_text(json.dumps({"weight_map": listed}))

    def arrays(path: Path) -> None:
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})

    def plain(path: Path) -> None:
        path.write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in state.items()}))

    def exported(path: Path) -> None:
        torch.export.save(torch.export.export(network, (torch.rand(1, *IMAGE),)), path)

    def script(path: Path) -> None:
        torch.jit.save(torch.jit.trace(network, torch.rand(1, *IMAGE)), path)

    def old(path: Path) -> None:
        torch.save(dict(state), path, _use_new_zipfile_serialization=False)

    def cut(path: Path) -> None:
        torch.save(dict(state), path)
        path.write_bytes(path.read_bytes()[:900])

    def written(content: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(content)

    later = lambda path: torch.save(dict(state), path, pickle_protocol=4)  # noqa: E731
    trust = {"trust_pickle": True}
    return [
        Layout(
            "format", "safetensors", lambda path: save_file(dict(state), path), network, suffix=".safetensors"
        ),
        Layout("format", "safetensors shards", sharded, network, suffix=".safetensors.index.json"),
        Layout("format", "torch.save before 1.6", old, network),
        Layout("format", "torch.save, protocol 4", later, network, trust),
        Layout("format", "gzip", zipped, network, suffix=".pt.gz"),
        Layout("format", "numpy archive", arrays, network, suffix=".npz"),
        Layout("format", "plain pickle of arrays", plain, network, trust, suffix=".pkl"),
        Layout("format", "torch.export program", exported, network, suffix=".pt2"),
        Layout("format", "TorchScript", script, network),
        Layout("format", "ONNX", written(b"\x08\x0a"), network, suffix=".onnx"),
        Layout("format", "HDF5", written(b"\x89HDF\r\n\x1a\n"), network, suffix=".h5"),
        Layout("format", "TensorFlow Lite", written(b"\x1c\0\0\0TFL3"), network, suffix=".tflite"),
        Layout("format", "GGUF", written(b"GGUF\x03"), network, suffix=".gguf"),
        Layout("format", "a web page", written(b"<!doctype html>"), network),
        Layout("format", "a Git LFS pointer", written(b"version https://git-lfs"), network),
        Layout("format", "cut off", cut, network),
    ]


def _functions(network: nn.Module, state: State) -> list[Layout]:
    """Other functions under the names and shapes of ``digits-conv``."""

    def changed(position: int, layer: nn.Module) -> nn.Module:
        twin = _network("digits-conv")
        assert isinstance(twin, nn.Sequential)
        twin.load_state_dict(dict(state))
        twin[position] = layer
        return twin.eval()

    trust = {"trust_pickle": True}
    found = [Layout("function", "a whole module", lambda path: torch.save(network, path), network, trust)]
    for name, layer in (("softplus", nn.Softplus()), ("SiLU", nn.SiLU()), ("leaky ReLU", nn.LeakyReLU(0.1))):
        twin = changed(1, layer)
        found.append(Layout("function", f"state dict with {name}", _save(state), twin))
        found.append(Layout("function", f"a whole module with {name}", _save(twin), twin, trust))
    halved = changed(3, nn.Sequential(nn.ReLU(), nn.Tanh()))
    found.append(
        Layout("function", "a whole module with one more layer", _save({"model": halved}), halved, trust)
    )
    double = lambda images: network(2 * images - 1)  # noqa: E731
    found.append(Layout("function", "2x - 1 before the first layer", _save(state), double))
    return found


def _families() -> list[Layout]:
    light = {"mnist-conv", "mnist-trades-conv", "cifar-conv", "cifar-resnet20"}
    wide = ("cifar-wrn-40-2", "cifar-wrn-40-2-leaky", "cifar-wrn-40-2-silu")
    narrow = tuple(
        f"cifar-preact-resnet18{end}{variant}"
        for end in ("", "-final-bn")
        for variant in ("", "-raw-shortcut", "-silu", "-softplus")
    )
    others = (
        *(
            "mnist-conv",
            "mnist-trades-conv",
            "cifar-conv",
            "cifar-resnet20",
            "cifar-resnet18",
            "cifar-vgg16-bn",
        ),
        *("cifar-vgg11-bn-linear", "cifar-torchvision-resnet18", "cifar-resnet34", "cifar-wrn-28-4"),
        *("deepmind-preact-resnet18-silu", "deepmind-preact-resnet18-relu", "torchvision/squeezenet1_1"),
        *("torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/resnet18"),
        *("torchvision/googlenet", "torchvision/googlenet-transform-input"),
    )
    found = []
    for name in (*others, *wide, *narrow):
        entry = registry.resolve(name)
        found.append(_family(entry, heavy=name not in light))
    return found


def _family(entry: Architecture, *, heavy: bool) -> Layout:
    assert entry.input_size is not None
    built: list[nn.Module] = []

    def network() -> nn.Module:
        if not built:
            torch.manual_seed(0)
            built.append(entry.build(10).eval())
        return built[0]

    def function(images: Tensor) -> Tensor:
        constants = entry.normalization.get(0)
        if constants is not None:
            mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (constants.mean, constants.std))
            images = (images - mean) / std
        return network()(images)  # type: ignore[no-any-return]

    def write(path: Path) -> None:
        torch.save({"state_dict": _prefixed(network().state_dict(), "module.")}, path)

    options, size = {"arch": entry.name}, entry.input_size
    return Layout("family", entry.name, write, function, options, heavy=heavy, size=size)


def _own(folder: Path) -> list[Layout]:
    """Networks of a user's own, by ``--arch``."""
    code = folder / "own_nets.py"
    code.write_text(OWN)
    space: dict[str, Any] = {}
    exec(OWN, space)
    found = []
    for kind in OWN_KINDS:
        torch.manual_seed(0)
        network = space[kind]()
        for _ in range(3):
            network(torch.rand(2, *IMAGE))  # spectral_norm moves in train mode
        network.eval()
        content = {"model": _prefixed(network.state_dict(), "module.")}
        options = {"arch": f"{code}:{kind}"}
        found.append(Layout("own network", kind.replace("_", " "), _save(content), network, options))
    return found


def table(rows: list[tuple[Layout, Result]]) -> str:
    """Return the page."""
    counts = Counter(result.outcome for _, result in rows)
    head = [
        "# Checkpoints that were tried",
        "",
        "Written by `python tests/models/checkpoints/test_layouts.py` from definitions of its own;",
        "no published file is used. Each row is a file whose function is known, and *loads* means that the",
        "logits are those of this function. A state dict does not show its function: under the names and",
        "shapes of a registered network it loads as that one, *with a note* that says what was not compared.",
        "",
        "| outcome | layouts |",
        "|---|---|",
        f"| loads by itself, as the right function | {counts['by itself']} |",
        f"| loads with the named options | {counts['with options']} |",
        f"| loads as another function, with the note | {counts['with a note']} |",
        f"| refused, with the next step | {counts['refused']} |",
        f"| loads as another function without a word | {counts['wrong']} |",
        f"| in all | {len(rows)} |",
        "",
        "| group | layout | outcome | options, or the code of the refusal ([errors](errors.md)) |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *(_row(layout, result) for layout, result in rows)]) + "\n"


def _row(layout: Layout, result: Result) -> str:
    words = f"`{result.words}`" if result.words else ""
    return f"| {layout.group} | {layout.name} | {result.outcome} | {words} |"


PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"
GROUPS = (
    *("container", "several", "prefix", "normalization", "type", "extras", "format", "function", "family"),
    "own network",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heavy", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", GROUPS)
def test_no_layout_loads_as_another_function_without_a_word(group: str, heavy: bool, tmp_path: Path) -> None:
    listed = PAGE.read_text(encoding="utf-8")
    for number, layout in enumerate(layouts(tmp_path)):
        if layout.group != group or layout.heavy != heavy:
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        result = examined(layout, folder)
        assert result.outcome != "wrong", layout.name
        assert _row(layout, result) in listed, layout.name


def test_the_page_lists_every_layout_once(tmp_path: Path) -> None:
    found = [(each.group, each.name) for each in layouts(tmp_path)]
    assert len(set(found)) == len(found) >= 150
    assert {group for group, _ in found} == set(GROUPS)
    assert PAGE.read_text(encoding="utf-8").count("\n| ") == len(found) + 8


def main() -> None:
    """Try every layout and write the page."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number, layout in enumerate(layouts(Path(place))):
            folder = Path(place) / str(number)
            folder.mkdir()
            rows.append((layout, examined(layout, folder)))
    PAGE.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
