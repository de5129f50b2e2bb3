"""Runs on channels, exported with smaller layers: through the command, and into plain PyTorch."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from s2ap_deploy.data import datasets
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.channels.narrowing import check_equal
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.onnx_export.encoding import decode

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(own_channel_run) -> Path:
    """A copy that a test may spoil."""
    return own_channel_run


def report(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "export" / "report.json").read_text())
    return content


def conv_widths(path: Path) -> list[int]:
    model = decode(onnx.load(path))
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return [weights[node.input[1]][0] for node in model.graph.node if node.op_type == "Conv"]


def real_images(n: int = 64) -> np.ndarray[Any, np.dtype[np.float32]]:
    test = datasets.load("digits", root=None, download=False, size=None, validation_fraction=0.1, seed=0).test
    pixels: np.ndarray[Any, np.dtype[np.float32]] = test.tensors()[0].numpy()[:n]
    return pixels


def test_the_certificates_network_is_exported_with_half_the_layers(channel_run) -> None:
    told = report(channel_run)
    assert conv_widths(channel_run / "export" / "model.onnx") == [16, 32]
    assert told["points_checks"][0]["clean_disagreements"] == 0
    narrowed = told["narrowed"]
    assert [group["kept"] for group in narrowed["groups"]] == [16, 32, 64]
    assert narrowed["keep_ratio"] is None
    assert narrowed["classifier"] == ["network.7.weight"]
    assert narrowed["macs"]["achieved"] == narrowed["macs"]["wanted"] == told["compaction"]["macs_after"]
    assert {file["name"] for file in narrowed["files"]} == {"compact.safetensors", "compact.json"}
    assert [tensor["channels_after"] for tensor in told["compaction"]["tensors"]] == [16, 32, 64]


def test_the_pair_is_the_masked_network_on_real_and_random_images(channel_run) -> None:
    masked, _, _ = checkpoint.load(channel_run / "finetune" / "model.safetensors")
    small, info, _ = checkpoint.load(channel_run / "export" / "compact.safetensors")
    assert info.stage == "finetune"
    for images in (torch.from_numpy(real_images()), torch.rand(16, 1, 8, 8)):
        check_equal(masked, small, images)
        check_equal(masked.double(), small.double(), images.double())
        masked.float(), small.float()
    assert sum(p.numel() for p in small.parameters()) * 3 < sum(p.numel() for p in masked.parameters())


def test_the_pages_ten_lines_of_pytorch(channel_run) -> None:
    text = (ROOT / "docs" / "compact.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    lines = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    space: dict[str, Any] = {"make_network": lambda: registry.build("digits-conv")}
    with contextlib.chdir(channel_run / "export"):
        exec(block, space)
    normal = space["plan"]["normalization"]
    images = real_images()
    with torch.no_grad():
        found = space["network"]((torch.from_numpy(images) - normal["mean"][0]) / normal["std"][0])
    session = ort.InferenceSession(channel_run / "export" / "model.onnx")
    np.testing.assert_allclose(found.numpy(), session.run(None, {"image": images})[0], atol=1e-4)


def test_inspect_and_certify_read_the_pair(s2ap, own, tmp_path) -> None:
    pair = own / "export" / "compact.safetensors"
    seen = s2ap.ok("inspect", pair, "--json")
    assert [layer["shape"][0] for layer in seen.answer["layers"]] == [16, 32, 64, 10]
    certify = ["--eps", "0.5", "--n", 10, "--run", tmp_path / "alone", "--threads", 1, "--json"]
    done = s2ap.ok("certify", pair, *certify)
    assert done.answer["certify"]


def test_alignment_fills_up_and_keeps_the_function(s2ap, own) -> None:
    done = s2ap.ok("export", "--align", 24, "--overwrite", "--json", cwd=own.parent)
    told = done.answer
    assert [group["kept"] for group in told["narrowed"]["groups"]] == [24, 48, 72]
    assert conv_widths(own / "export" / "model.onnx") == [24, 48]
    assert told["points_checks"][0]["adversarial_disagreements"] == 0
    assert "in multiples of 24 (without alignment" in done.err
    weights = checkpoint.load(own / "export" / "compact.safetensors")[0].get_parameter("network.2.weight")
    assert weights.shape == (48, 24, 3, 3)


def test_fewer_channels_are_another_network(s2ap, own) -> None:
    done = s2ap.ok("export", "--keep-ratio", 0.25, "--align", 8, "--overwrite", "--json", cwd=own.parent)
    told = done.answer
    assert told["file"] == "model-compact.onnx"
    assert conv_widths(own / "export-compact" / "model-compact.onnx") == [8, 16]
    assert told["points_checks"] == []
    assert "s2ap-deploy certify --artifact" in done.err
    narrowed = told["narrowed"]
    assert narrowed["macs"]["achieved"] <= narrowed["macs"]["wanted"]
    written = onnx.load(own / "export-compact" / told["file"])
    facts = {entry.key: entry.value for entry in written.metadata_props}
    assert "s2ap.certificate_sha256" not in facts
    assert float(facts["s2ap.sparsity"]) == pytest.approx(told["sparsity"], abs=1e-4)
    small, _, _ = checkpoint.load(own / "export-compact" / "compact.safetensors")
    session = ort.InferenceSession(own / "export-compact" / "model-compact.onnx")
    with torch.no_grad():
        expected = small(torch.from_numpy(real_images())).numpy()
    np.testing.assert_allclose(session.run(None, {"image": real_images()})[0], expected, atol=1e-4)
    # The run's own scores decide, and only among channels that it kept.
    kept = small.get_parameter("network.0.weight")
    whole, _, _ = checkpoint.load(own / "finetune" / "model.safetensors")
    rows = [bool((whole.get_parameter("network.0.weight") == row).flatten(1).all(1).any()) for row in kept]
    assert all(rows)
    assert kept.flatten(1).any(1).all()


def test_the_gate_does_not_pass_what_no_certificate_covers(s2ap, own) -> None:
    policy = ["gate", "--min-robust", 0, "--rule", "point"]
    assert s2ap(*policy, cwd=own.parent).code == 0
    s2ap.ok("export", "--keep-ratio", 0.25, "--overwrite", cwd=own.parent)
    assert s2ap(*policy, cwd=own.parent).code == 3
    file = own / "export-compact" / "model-compact.onnx"
    s2ap.ok("certify", "--artifact", file, "--run", own, "--threads", 1)
    assert s2ap(*policy, cwd=own.parent).code == 0


def test_a_further_file_leaves_the_options_of_the_first_alone(s2ap, own) -> None:
    before = (own / "recipe.yaml").read_bytes()
    assert s2ap("export", "--keep-ratio", 0.25, cwd=own.parent).code == 0
    assert (own / "recipe.yaml").read_bytes() == before
    again = s2ap("export", "--json", cwd=own.parent)
    assert "already done with the same inputs" in again.err
    assert again.answer["file"] == "model.onnx"
    assert again.answer["points_checks"] != []


def test_scores_of_another_network_are_refused(s2ap, own, finished_run) -> None:
    from s2ap_deploy import files

    scores = own / "search" / "scores.safetensors"
    shutil.copy(finished_run / "search" / "scores.safetensors", scores)
    manifest = json.loads((own / "manifest.json").read_text())
    for output in manifest["stages"]["search"]["outputs"]:
        if output["path"] == "search/scores.safetensors":
            output |= {"sha256": files.sha256(scores), "bytes": scores.stat().st_size}
    (own / "manifest.json").write_text(json.dumps(manifest))
    s2ap.refused("scores-not-matching", "export", "--keep-ratio", 0.25, "--overwrite", cwd=own.parent)


def test_a_pair_that_cannot_be_read_again_leaves_nothing(s2ap, own, monkeypatch) -> None:
    from s2ap_deploy.stages import export_channels

    monkeypatch.setattr(export_channels, "weights_hash", lambda network: str(id(network)).zfill(64)[-64:])
    done = s2ap("export", "--align", 8, "--overwrite", cwd=own.parent)
    assert done.code == 1, done.err
    assert {path.name for path in (own / "export").glob("*") if not path.name.startswith(".")} <= {
        "recipe.yaml"
    }
