"""Networks of timm and of Hugging Face's transformers: the libraries' own functions and names."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures import libraries, registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.spec import Normalization

SMALL = "+img_size=32+patch_size=8+embed_dim=32+depth=2+num_heads=2"
TIMM = {
    "timm/resnet18": {},
    "timm/convnext_atto": {},
    f"timm/vit_tiny_patch16_224{SMALL}": {},
    f"timm/deit_tiny_patch16_224{SMALL}": {},
}
ORGANIZED = {
    "vit": {
        "model_type": "vit",
        "image_size": 8,
        "num_channels": 1,
        "patch_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "resnet": {
        "model_type": "resnet",
        "num_channels": 1,
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "convnext": {
        "model_type": "convnext",
        "num_channels": 1,
        "patch_size": 2,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_stages": 2,
        "image_size": 8,
    },
}


def organized(folder: Path, kind: str, *, shards: bool = False) -> Path:
    """Write the folder of a Hugging Face classifier of the digits with random weights."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    torch.manual_seed(0)
    facts = dict(ORGANIZED[kind])
    config = transformers.AutoConfig.for_model(facts.pop("model_type"), num_labels=10, **facts)
    network = transformers.AutoModelForImageClassification.from_config(config)
    network.save_pretrained(folder, max_shard_size="8KB" if shards else "5GB")
    return folder


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_is_the_librarys(name, tmp_path) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    base, *options = name.removeprefix("timm/").split("+")
    numbers = {key: int(value) for key, _, value in (each.partition("=") for each in options)}
    torch.manual_seed(0)
    theirs = timm.create_model(base, pretrained=False, num_classes=10, **numbers).eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    classifier, info, notes = checkpoint.load(tmp_path / "model.pt", arch=name)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(classifier(images), theirs(images))
    assert (info.arch, info.num_classes) == (name, 10)
    assert any("--mean" in note for note in notes)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", ORGANIZED)
def test_a_hugging_face_classifier_returns_its_logits_alone(kind, shards, tmp_path) -> None:
    folder = organized(tmp_path / "model", kind, shards=shards)
    import transformers

    theirs = transformers.AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager" if kind == "vit" else None
    ).eval()
    file = folder / ("model.safetensors.index.json" if shards else "model.safetensors")
    assert file.is_file()
    size = None
    if kind == "resnet":  # its config states none
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"crop_size": 8, "image_mean": [0.5], "image_std": [0.25]})
        )
        size = Normalization(mean=(0.5,), std=(0.25,))
    classifier, info, _ = checkpoint.load(file, arch=f"transformers:{folder}")
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        expected = theirs((images - 0.5) / 0.25 if size else images).logits
        assert torch.equal(classifier(images), expected)
    assert (info.num_classes, info.normalization) == (10, size)
    assert info.preprocessing.size == (1, 8, 8)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({"image_mean": [0.5], "image_std": [0.5]}, ((0.5,), (0.5,))),
        ({"image_mean": [0.0], "image_std": [1.0]}, None),
        ({"image_mean": [0.5], "image_std": [0.5], "do_normalize": False}, None),
        ({"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True}, ((0.5,), (0.5,))),
        ({"image_mean": [127.5], "image_std": [51.0], "do_rescale": False}, ((0.5,), (0.2,))),
        ({}, None),
    ],
)
def test_a_preprocessor_is_read_as_a_normalization_of_images_in_0_1(shown, expected) -> None:
    found = libraries._normalization(shown)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (*found.mean, *found.std) == pytest.approx((*expected[0], *expected[1]))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "architecture-file-missing"),
        ("{", "architecture-needs-code"),
        ('{"model_type": "vit", "patch_size": 0}', "architecture-needs-code"),
        ('{"model_type": "bert"}', "architecture-needs-code"),
        ('{"model_type": "nobodys", "auto_map": {"AutoConfig": "code.Config"}}', "architecture-needs-code"),
        ('{"model_type": "timm_wrapper", "architecture": "resnet18"}', "architecture-needs-code"),
    ],
)
def test_a_folder_without_a_classifier_is_refused_and_its_code_not_run(content, code, tmp_path) -> None:
    pytest.importorskip("transformers", reason="needs the extra transformers")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArchitectureError, check=lambda error: error.code == code):
        registry.resolve(f"transformers:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_network_of_timm_gets_the_nearest() -> None:
    pytest.importorskip("timm", reason="needs the extra timm")
    with pytest.raises(ArchitectureError, check=lambda error: error.code == "architecture-unknown") as caught:
        registry.resolve("timm/resnet19")
    assert "timm/resnet18" in str(caught.value.hint)


@pytest.mark.parametrize("extra", ["timm", "transformers"])
def test_a_missing_extra_says_how_to_install_it(extra, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "model.pt")
    asked = {"timm": "timm/resnet18", "transformers": f"transformers:{tmp_path}"}[extra]
    script = (
        f"import sys; sys.modules[{extra!r}] = None; from s2ap_deploy.cli.main import run_cli; "
        f"sys.exit(run_cli(['inspect', 'model.pt', '--arch', {asked!r}, '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["code"]) == (2, "extra-missing")
    assert f'pip install "{extra}>=' in answer["hint"]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_network_of_a_library_is_pruned_certified_exported_and_gated(
    library: str, s2ap: Callable[..., Any], tmp_path: Path
) -> None:
    if library == "timm":
        timm = pytest.importorskip("timm", reason="needs the extra timm")
        arch = "timm/vit_tiny_patch16_224+img_size=8+patch_size=2+in_chans=1+embed_dim=32+depth=2+num_heads=2"
        numbers = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
        network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **numbers)
        torch.save(network.state_dict(), tmp_path / "model.pt")
        file, here = tmp_path / "model.pt", []
    else:
        folder = organized(tmp_path / "model", "vit")
        file, arch = folder / "model.safetensors", f"transformers:{folder}"
        here = ["--arch", arch]
    short = [
        "--search-epochs",
        1,
        "--finetune-epochs",
        1,
        "--warmup-epochs",
        0,
        "--loss",
        "at",
        "--threads",
        1,
    ]
    task = ["--data", "digits", "--eps", "0.05", "--sparsity", 0.9]
    for command in (
        ["prune", file, "--arch", arch, *task, *short],
        ["certify", "--n", 10, "--workers", 1, "--threads", 1, *here],
        ["export", "--onnx", *here],
        ["gate", "--min-clean", 0, "--rule", "point"],
    ):
        s2ap.ok(*command, cwd=tmp_path)
    subject = json.loads((tmp_path / "s2ap-run" / "certify" / "pruned.json").read_text())["subject"]
    assert subject["sparsity"] == pytest.approx(0.9, abs=0.002)
    assert subject["weights"]["outside"] == []
