"""Whole files in and out, ours and others'."""

from __future__ import annotations

import errno
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor, nn

from s2ap_deploy.errors import ArchitectureError, CheckpointError, StorageError, UsageError
from s2ap_deploy.models.architectures import architecture, registry
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo, describe, load, read_tensors, save
from s2ap_deploy.models.checkpoints.match import only_match
from s2ap_deploy.models.classifier import Classifier, weights_hash
from s2ap_deploy.spec import Normalization, Preprocessing, ThreatModel

DIGITS = Preprocessing(size=(1, 8, 8), channel_order="L")


def digits(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return registry.build("digits-conv")


def facts(**changes: object) -> CheckpointInfo:
    stated = {
        "arch": "digits-conv",
        "num_classes": 10,
        "data": "digits",
        "preprocessing": DIGITS,
        "normalization": Normalization(mean=(0.5,), std=(0.25,)),
        "threat": ThreatModel(norm="Linf", eps="8/255"),
        "class_names": tuple("0123456789"),
        "stage": "finetune",
        "sparsity": 0.9,
        "tool_version": "1",
    }
    return CheckpointInfo(**(stated | changes))  # type: ignore[arg-type]


def foreign(path: Path, tensors: object) -> Path:
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    info = facts()
    classifier = Classifier(digits(), info.normalization)
    classifier.get_parameter("network.0.weight").data[0, 0, 0, 0] = -0.0
    save(path, classifier, info)
    loaded, found, notes = load(path)
    assert weights_hash(loaded) == weights_hash(classifier)
    assert found == info.model_copy(
        update={"source_sha256": read_tensors(path).sha256, "tool_version": found.tool_version}
    )
    assert notes == ()
    assert not loaded.training
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_equal_contents_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in files:
        save(path, Classifier(digits(), facts().normalization), facts())
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_pt_of_ours_is_read_weights_only_by_torch_itself(tmp_path: Path) -> None:
    save(tmp_path / "model.pt", Classifier(digits()), facts(normalization=None))
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["format"] == "s2ap-deploy"
    assert json.loads(content["info"])["arch"] == "digits-conv"
    assert "network.0.weight" in content["state_dict"]


def test_batchnorm_counters_and_statistics_come_back(tmp_path: Path) -> None:
    network = registry.build("cifar-resnet20").train()
    network(torch.rand(4, 3, 32, 32))
    info = facts(arch="cifar-resnet20", preprocessing=Preprocessing(size=(3, 32, 32)), normalization=None)
    save(tmp_path / "m.safetensors", Classifier(network), info)
    loaded, _, _ = load(tmp_path / "m.safetensors")
    assert weights_hash(loaded) == weights_hash(Classifier(network))
    assert loaded.get_buffer("network.bn1.num_batches_tracked") == 1


def test_arguments_override_what_our_file_says(tmp_path: Path) -> None:
    save(tmp_path / "m.pt", Classifier(digits(), facts().normalization), facts())
    normal = Normalization(mean=(0.0,), std=(1.0,))
    loaded, found, _ = load(tmp_path / "m.pt", normalization=normal)
    assert found.normalization == normal
    assert loaded.get_buffer("normalize.std").item() == 1.0
    assert found.stage == "finetune"


def test_a_file_of_ours_cannot_choose_what_is_imported(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = tmp_path / "net.py"
    code.write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from s2ap_deploy.models.architectures.small import digits_conv as make\n"
    )
    save(tmp_path / "m.pt", Classifier(digits()), facts(arch=f"{code}:make", normalization=None))
    with pytest.raises(
        ArchitectureError, check=lambda error: error.code == "architecture-import-not-allowed"
    ) as caught:
        load(tmp_path / "m.pt")
    assert str(caught.value.hint) == f"add --arch {code}:make"
    assert not marker.exists()
    _, found, _ = load(tmp_path / "m.pt", arch=f"{code}:make")
    assert found.num_classes == 10
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"schema_version": 2}, "record-version-unknown"),
        ({"sparsity": "much"}, "record-invalid"),
        ({"surprise": 1}, "record-invalid"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_description_that_cannot_be_read_is_refused(
    tmp_path: Path, suffix: str, change: dict[str, object], code: str
) -> None:
    text = json.dumps(json.loads(facts().model_dump_json()) | change)
    path = tmp_path / f"m{suffix}"
    state = {f"network.{name}": tensor for name, tensor in digits().state_dict().items()}
    if suffix == ".pt":
        torch.save({"format": "s2ap-deploy", "info": text, "state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path, metadata={"s2ap_deploy": text})
    with pytest.raises(CheckpointError, check=lambda error: error.code == code):
        load(path)


def test_a_description_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "checkpoint-description-missing"):
        load(foreign(tmp_path / "m.pt", {"format": "s2ap-deploy", "state_dict": digits().state_dict()}))


def test_a_tensor_too_many_in_a_file_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save(path, Classifier(digits()), facts(normalization=None))
    content = torch.load(path, weights_only=True)
    content["state_dict"]["surplus"] = torch.zeros(1)
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-mismatch"):
        load(foreign(path, content))


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "checkpoint-suffix-unknown"):
        save(tmp_path / "model.onnx", Classifier(digits()), facts())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model{suffix}"
    save(path, Classifier(digits()), facts(normalization=None))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, check=lambda error: error.code == "disk-full"):
        save(path, Classifier(digits(1)), facts(normalization=None))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        save(tmp_path / "absent" / "m.pt", Classifier(digits()), facts(normalization=None))


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    network[2].weight = network[1].weight  # type: ignore[union-attr]
    save(tmp_path / "m.safetensors", Classifier(network), facts())
    assert set(read_tensors(tmp_path / "m.safetensors").tensors) == {
        f"network.{n}.{k}" for n in (1, 2) for k in ("weight", "bias")
    }


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "bare": lambda state: state,
    "OrderedDict": OrderedDict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "net": lambda state: {"net": state, "acc": 0.9},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "model": lambda state: {"model": state},
    "ema": lambda state: {"ema": state},
    "module.": lambda state: {f"module.{n}": t for n, t in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{n}": t for n, t in state.items()},
    "_orig_mod.module.": lambda state: {f"_orig_mod.module.{n}": t for n, t in state.items()},
    "module.basic_model.": lambda state: {
        "state_dict": {f"module.basic_model.{n}": t for n, t in state.items()}
    },
    "averaged": lambda state: {n: t.float() for n, t in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_foreign_habits_load_into_the_matched_architecture(tmp_path: Path, wrapping: str) -> None:
    network = registry.build("cifar-resnet20").eval()
    loaded, info, notes = load(foreign(tmp_path / "m.pth", WRAPPINGS[wrapping](network.state_dict())))
    assert (info.arch, info.num_classes, info.stage) == ("cifar-resnet20", 10, "foreign")
    assert info.preprocessing == Preprocessing(size=(3, 32, 32))
    assert (info.threat, info.data) == (None, None)
    assert any("all names and shapes match" in note for note in notes)
    assert any("no normalization" in note for note in notes)
    image = torch.rand(2, 3, 32, 32)
    assert torch.allclose(loaded(image), network(image), atol=0)


def test_the_number_of_classes_is_read_from_the_weights(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.pt", registry.build("cifar-resnet20", 23).state_dict())
    assert load(path)[1].num_classes == 23
    assert load(path, num_classes=23)[1].num_classes == 23


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.pt", registry.build("cifar-resnet20", 23).state_dict())
    with pytest.raises(CheckpointError, check=lambda error: error.code == "class-count-mismatch"):
        load(path, num_classes=10)
    save(tmp_path / "named.pt", Classifier(digits()), facts(class_names=("cat", "dog"), normalization=None))
    with pytest.raises(CheckpointError, check=lambda error: error.code == "class-names-mismatch"):
        load(tmp_path / "named.pt")


def test_normalization_beside_the_weights_moves_into_the_classifier(tmp_path: Path) -> None:
    """RobustBench's habit: `mu` and `sigma` at the top, weights under `model.`."""
    network = registry.build("cifar-resnet20").eval()
    mean, std = (
        torch.tensor([0.5, 0.25, 0.75]).reshape(1, 3, 1, 1),
        torch.tensor([0.5, 0.25, 1.0]).reshape(1, 3, 1, 1),
    )
    state = {"mu": mean, "sigma": std, **{f"model.{n}": t for n, t in network.state_dict().items()}}
    loaded, info, notes = load(foreign(tmp_path / "m.pt", state))
    assert info.normalization == Normalization(mean=(0.5, 0.25, 0.75), std=(0.5, 0.25, 1.0))
    assert any("normalization found in the file" in note for note in notes)
    image = torch.rand(2, 3, 32, 32)
    assert torch.allclose(loaded(image), network((image - mean) / std))


def test_a_normalization_for_other_channels_is_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.pt", registry.build("cifar-resnet20").state_dict())
    with pytest.raises(CheckpointError, check=lambda error: error.code == "normalization-channel-mismatch"):
        load(path, normalization=Normalization(mean=(0.5, 0.5), std=(1, 1)))


def test_the_given_architecture_decides_which_prefix_belongs(tmp_path: Path) -> None:
    """`model.` is part of this network's names and `module.` is not."""
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.model = nn.Linear(4, 3)\n"
        "    def forward(self, x):\n        return self.model(x.flatten(1))\n"
        "Net.input_size = (1, 2, 2)\n"
    )
    state = {f"module.model.{n}": t for n, t in nn.Linear(4, 3).state_dict().items()}
    _, info, notes = load(foreign(tmp_path / "m.pt", state), arch=f"{code}:Net")
    assert info.num_classes == 3
    assert "prefix 'module.' stripped from every name" in notes


def test_a_factory_that_hides_its_input_size_needs_the_data(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))\n")
    path = foreign(tmp_path / "m.pt", nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).state_dict())
    with pytest.raises(CheckpointError, check=lambda error: error.code == "input-size-missing") as caught:
        load(path, arch=f"{code}:net")
    assert "--data" in str(caught.value.hint)
    _, info, _ = load(path, arch=f"{code}:net", preprocessing=Preprocessing(size=(1, 2, 2)))
    assert (info.arch, info.num_classes) == (f"{code}:net", 3)
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "network-cannot-run"):
        load(path, arch=f"{code}:net", preprocessing=Preprocessing(size=(3, 2, 2)))
    with pytest.raises(CheckpointError, check=lambda error: error.code == "class-count-mismatch"):
        load(path, arch=f"{code}:net", preprocessing=Preprocessing(size=(1, 2, 2)), num_classes=10)


def test_a_given_architecture_that_does_not_fit_lists_what_differs(tmp_path: Path) -> None:
    state = digits().state_dict()
    state["surprise"] = state.pop("7.bias")
    with pytest.raises(
        ArchitectureError, check=lambda error: error.code == "architecture-mismatch"
    ) as caught:
        load(foreign(tmp_path / "m.pt", state), arch="digits-conv")
    assert "1 missing: 7.bias; 1 unexpected: surprise" in caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["2.weight", "7.bias"])
def test_nonfinite_weights_are_named(tmp_path: Path, value: float, name: str) -> None:
    state = digits().state_dict()
    state[name].view(-1)[3] = value
    with pytest.raises(CheckpointError, match=name, check=lambda error: error.code == "weights-nonfinite"):
        load(foreign(tmp_path / "m.pt", state))


def test_weights_that_overflow_float32_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.double() for name, tensor in digits().state_dict().items()}
    state["0.bias"][0] = 1e300
    with pytest.raises(CheckpointError, check=lambda error: error.code == "weights-nonfinite"):
        load(foreign(tmp_path / "m.pt", state))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_become_float32_and_it_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in digits().state_dict().items()}
    loaded, _, notes = load(foreign(tmp_path / "m.pt", state))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert f"weights are stored in {str(dtype)[6:]} and computed in float32" in notes


def test_integers_where_weights_belong_are_refused(tmp_path: Path) -> None:
    state = digits().state_dict()
    state["0.weight"] = state["0.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "tensor-dtype-invalid"):
        load(foreign(tmp_path / "m.pt", state))


def test_old_files_without_batch_counters_load(tmp_path: Path) -> None:
    network = registry.build("cifar-resnet20")
    state = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert load(foreign(tmp_path / "m.pt", state))[1].arch == "cifar-resnet20"


@pytest.mark.parametrize("outputs", [0, 1])
def test_one_output_is_no_classifier(tmp_path: Path, outputs: int) -> None:
    network = nn.Sequential(*list(digits())[:-1], nn.Linear(128, outputs))  # type: ignore[call-overload]
    with pytest.raises(CheckpointError, check=lambda error: error.code == "class-count-too-small"):
        load(foreign(tmp_path / "m.pt", network.state_dict()))


def test_describe_ours_counts_zeros_of_prunable_weights(tmp_path: Path) -> None:
    network = digits()
    network.get_parameter("5.weight").data.zero_()
    network.get_parameter("5.bias").data.zero_()
    save(tmp_path / "m.safetensors", Classifier(network, facts().normalization), facts())
    found = describe(tmp_path / "m.safetensors")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["architecture"] == "digits-conv"
    assert (found["parameters"], found["prunable_weights"], found["zeros"]) == (151_306, 151_072, 131_072)
    assert found["sparsity"] == 131_072 / 151_072
    assert [layer["name"] for layer in found["layers"]] == ["0.weight", "2.weight", "5.weight", "7.weight"]
    assert [layer["sparsity"] for layer in found["layers"]] == [0, 0, 1, 0]
    assert found["info"]["threat"] == {"norm": "Linf", "eps": "8/255"}
    assert found["warnings"] == []
    assert (found["matched_by"], found["not_compared"]) == ("description", [])


def test_describe_lists_what_a_match_by_names_does_not_compare(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.pt", digits().state_dict())
    for arch, matched_by in ((None, "names"), ("digits-conv", "option")):
        found = describe(path, arch=arch)
        assert (found["architecture"], found["matched_by"]) == ("digits-conv", matched_by)
        assert "activation functions" in found["not_compared"]


def test_describe_what_fits_nothing_and_is_damaged(tmp_path: Path) -> None:
    state = {f"module.{n}": t for n, t in digits().state_dict().items()}
    state["module.0.weight"][0] = float("nan")
    state["module.extra"] = torch.zeros(2)
    found = describe(foreign(tmp_path / "m.pt", {"state_dict": state}))
    assert found["architecture"] is None
    assert found["wrapper"] == "state_dict"
    assert found["closest"][0] == {
        "architecture": "digits-conv",
        "exact": False,
        "differs": "1 unexpected: extra",
    }
    assert found["warnings"][0] == "module.0.weight: 9 of 288 values are NaN or infinite"
    assert found["warnings"][1].startswith(
        "no registered architecture fits the 9 tensors of this checkpoint; give it"
    )
    assert "--arch file.py:factory" in found["warnings"][1]
    assert found["prunable_weights"] == 151_072
    assert json.dumps(found, allow_nan=False)


def test_what_the_users_code_does_not_build_is_told_without_what_the_registry_has(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))\n")
    path = foreign(tmp_path / "m.pt", nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).state_dict())
    found = describe(path, arch=f"{code}:net")
    assert found["closest"] == []
    assert "1.weight [3, 4] instead of [2, 4]" in found["warnings"][0]
    assert "name a function that builds the file's network" in found["warnings"][0]


def test_describe_with_code_of_the_users(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))\n")
    path = foreign(tmp_path / "m.pt", nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).state_dict())
    found = describe(path, arch=f"{code}:net")
    assert (found["prunable_weights"], found["num_classes"]) == (12, None)
    assert "no input size" in found["denominator"]
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-unknown"):
        describe(path, arch="no-such-network")


def test_the_published_checkpoint_has_its_published_error(shared: Path) -> None:
    """Wong & Kolter give a clean error of 1.8% on the 10,000 test images."""
    classifier, info, _ = load(shared / "checkpoints" / "mnist_convex_eps0.1.pth")
    assert info.arch == "mnist-conv"
    raw = shared / "data" / "MNIST" / "raw"
    pixels = torch.frombuffer(
        bytearray((raw / "t10k-images-idx3-ubyte").read_bytes()[16:]), dtype=torch.uint8
    )
    labels = torch.frombuffer(bytearray((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:]), dtype=torch.uint8)
    images = pixels.reshape(-1, 1, 28, 28).float() / 255
    with torch.no_grad():
        wrong = torch.cat([classifier(batch).argmax(1) for batch in images.split(1000)]) != labels
    assert wrong.double().mean().item() == pytest.approx(0.018, abs=0.0005)


def test_a_plain_resnet50_is_compared_with_few_networks() -> None:
    """Of torchvision: itself and the two whose size the tables do not tell exactly."""
    with architecture.WithoutStorage():
        tensors = registry.build("torchvision/resnet50", 10).state_dict()
    architecture.registered_spec.cache_clear()
    assert only_match(tensors).architecture.name == "torchvision/resnet50"
    ours = sum(1 for name in registry.names() if "/" not in name)
    assert architecture.registered_spec.cache_info().currsize <= ours + 3


TIED = """
from torch import nn

def make():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    network[3].weight = network[1].weight
    return network

make.input_size = (1, 2, 2)
"""


def test_two_tensors_under_the_names_of_one_are_refused(tmp_path: Path) -> None:
    """The network would silently compute with one of them."""
    (tmp_path / "net.py").write_text(TIED)
    arch = f"{tmp_path / 'net.py'}:make"
    state = registry.resolve(arch).build(3).state_dict()
    torch.save(state, tmp_path / "same.pt")
    assert load(tmp_path / "same.pt", arch=arch)[0] is not None
    state["3.weight"] = state["3.weight"] + 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, check=lambda error: error.code == "tied-weights-differ"):
        load(tmp_path / "other.pt", arch=arch)


def module_file(path: Path, activation: nn.Module) -> Path:
    """A whole pickled module with the names of ``digits-conv``."""
    network = digits()
    assert isinstance(network, nn.Sequential)
    network[1] = activation
    torch.save({"model": network.double().train(), "epoch": 3}, path)
    return path


def test_a_trusted_module_is_the_function(tmp_path: Path) -> None:
    _, info, notes = load(module_file(tmp_path / "m.pt", nn.ReLU()), trust_pickle=True)
    assert info.arch == "digits-conv"
    assert any("not compared: activation functions" in note for note in notes)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "module-differs"):
        load(module_file(tmp_path / "other.pt", nn.Softplus()), trust_pickle=True)


def test_a_module_that_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "module-cannot-run"):
        load(module_file(tmp_path / "m.pt", nn.Unflatten(1, (3, 5))), trust_pickle=True)


def test_a_normalization_for_bytes_is_rescaled_with_a_note(tmp_path: Path) -> None:
    state = {**digits().state_dict(), "mean": torch.tensor([51.0]), "std": torch.tensor([25.5])}
    _, info, notes = load(foreign(tmp_path / "m.pt", state))
    assert info.normalization == Normalization(mean=(0.2,), std=(0.1,))
    assert any("divided by 255" in note for note in notes)
    with pytest.raises(CheckpointError, check=lambda error: error.code == "normalization-not-for-images"):
        load(tmp_path / "m.pt", normalization=Normalization(mean=(120.0,), std=(0.2,)))


def test_a_description_has_the_normalization_that_would_be_loaded(tmp_path: Path) -> None:
    state = {**digits().state_dict(), "mean": torch.tensor([51.0]), "std": torch.tensor([25.5])}
    found = describe(foreign(tmp_path / "m.pt", state))
    assert found["normalization"] == {"mean": [0.2], "std": [0.1]}
    assert any("divided by 255" in note for note in found["notes"])
    odd = describe(foreign(tmp_path / "odd.pt", {**state, "std": torch.tensor([0.5])}))
    assert any("neither in [0, 1] nor in [0, 255]" in warning for warning in odd["warnings"])


def test_a_family_with_constants_gets_them(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.pt", registry.build("deepmind-preact-resnet18-silu", 100).state_dict())
    info = load(path, arch="deepmind-preact-resnet18-silu")[1]
    assert info.normalization == registry.resolve("deepmind-preact-resnet18-silu").normalization[100]


def test_a_key_chooses_among_several(tmp_path: Path) -> None:
    first, second = digits(), digits()
    with torch.no_grad():
        second.get_parameter("0.weight").add_(1)
    torch.save({"state_dict": first.state_dict(), "ema": second.state_dict()}, tmp_path / "m.pt")
    loaded, _, notes = load(tmp_path / "m.pt")
    assert torch.equal(loaded.network.get_parameter("0.weight"), first.get_parameter("0.weight"))
    assert any("--key chooses another" in note for note in notes)
    loaded = load(tmp_path / "m.pt", key="ema")[0]
    assert torch.equal(loaded.network.get_parameter("0.weight"), second.get_parameter("0.weight"))


def test_of_student_and_teacher_under_one_roof_the_student_is_read(tmp_path: Path) -> None:
    student = {f"student.{name}": tensor for name, tensor in digits().state_dict().items()}
    teacher = {f"teacher.{name}": tensor + 1 for name, tensor in digits().state_dict().items()}
    loaded, _, notes = load(foreign(tmp_path / "m.pt", {**teacher, **student}))
    assert torch.equal(loaded.network.get_parameter("0.weight"), student["student.0.weight"])
    assert any("ignored" in note and "teacher.0.weight" in note for note in notes)
    twins = {f"{side}.{name}": t for side in ("left", "right") for name, t in digits().state_dict().items()}
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "networks-several"):
        load(foreign(tmp_path / "two.pt", twins))
