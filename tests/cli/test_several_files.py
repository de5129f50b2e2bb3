"""Several files of one run: each with its report, its certificate, its rows in gate and page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file

Command = Callable[..., Any]
POLICY = ("--min-clean", 0, "--min-robust", 0, "--rule", "point")
FILE = "export-int8/model-int8.onnx"


@pytest.fixture
def both(s2ap, own_run) -> Path:
    """A run with its float32 file and an int8 file."""
    done = s2ap("export", "--int8", "--run", own_run, "--threads", 1, "--json")
    assert done.code == 0, done.err
    assert (json.loads(done.out)["folder"], json.loads(done.out)["file"]) == tuple(FILE.split("/"))
    return own_run


def gate(s2ap: Command, run: Path) -> tuple[int, list[dict[str, Any]]]:
    done = s2ap("gate", *POLICY, "--run", run, "--json")
    return done.code, json.loads(done.out)["checks"]


def test_each_file_has_evidence_of_its_own(s2ap, both, files_in) -> None:
    float_file = files_in(both / "export")
    assert "model.onnx" in float_file
    code, checks = gate(s2ap, both)
    assert code == 3
    assert [check["path"] for check in checks if check["reason"] == "not-certified"] == [FILE]
    certified = s2ap("certify", "--artifact", both / FILE, "--run", both, "--threads", 1, "--workers", 1)
    assert certified.code == 0, certified.err
    assert (both / "artifact-int8" / "certificate.json").is_file()
    code, checks = gate(s2ap, both)
    assert code == 0, checks
    robust = {check["path"] for check in checks if check["rule"] == "robust-accuracy"}
    assert robust == {None, FILE}
    verified = s2ap("verify", both / "artifact-int8" / "certificate.json", "--files")
    assert verified.code == 0, verified.out + verified.err
    assert s2ap("report", both, "--output", both.parent / "page").code == 0
    page = next((both.parent / "page").glob("*.html")).read_text(encoding="utf-8")
    assert page.count("export/model.onnx</code></h3>") == page.count(f"{FILE}</code></h3>") == 1
    # A new int8 file discards its own certificate and nothing of the float32 file.
    again = s2ap("export", "--int8", "--overwrite", "--calibration-images", 16, "--run", both, "--threads", 1)
    assert again.code == 0, again.err
    assert files_in(both / "export") == float_file
    assert not (both / "artifact-int8").exists()


@pytest.mark.parametrize("name", ["export/model.onnx", FILE])
def test_a_changed_file_fails_by_its_own_name(s2ap, both, name) -> None:
    (both / name).write_bytes((both / name).read_bytes() + b" ")
    code, checks = gate(s2ap, both)
    assert code == 1
    assert [check["path"] for check in checks if check["status"] == "fail"] == [name]


def test_names_keep_two_files_of_one_form(s2ap, own_run) -> None:
    run = ("--run", own_run, "--threads", 1, "--json")
    refused = s2ap("export", "--encoding", "gaps", *run)
    assert json.loads(refused.out)["code"] == "stage-inputs-changed"
    named = s2ap("export", "--encoding", "gaps", "--name", "portable", *run)
    assert json.loads(named.out)["folder"] == "export-portable"
    dense = s2ap("export", "--encoding", "dense", *run)
    assert json.loads(dense.out)["folder"] == "export-dense"
    assert gate(s2ap, own_run)[0] == 0
    # Options of further files are not remembered, and work on the network discards all files.
    assert "skipped" in s2ap("export", "--onnx", *run).err
    stages = json.loads((own_run / "manifest.json").read_text())["stages"]
    assert {name for name in stages if name.startswith("export")} == {
        "export",
        "export-dense",
        "export-portable",
    }
    lost = s2ap("certify", "--n", 20, "--overwrite", "--run", own_run, "--threads", 1, "--workers", 1)
    assert lost.code == 0, lost.err
    assert not list(own_run.glob("export*"))


def test_a_name_that_is_no_name(s2ap, own_run) -> None:
    for name in ("../x", "A", ""):
        done = s2ap("export", "--name", name, "--run", own_run, "--json")
        assert (done.code, json.loads(done.out)["code"]) == (2, "option-invalid"), name


@pytest.mark.slow
def test_the_int8_file_has_the_ranges_and_the_mask_of_quantization_aware_training(
    s2ap, digits_model, tmp_path
) -> None:
    run = tmp_path / "s2ap-run"
    short = ("--search-epochs", 1, "--finetune-epochs", 2, "--loss", "at", "--batch-size", 512)
    common = ("--run", run, "--threads", 1)
    s2ap.ok("prune", digits_model, "--sparsity", 0.9, "--eps", "0.5", "--qat", 1, *short, *common)
    tuned, masks = (
        load_file(run / each) for each in ("finetune/model.safetensors", "search/masks.safetensors")
    )
    assert masks
    assert all(not tuned[name][mask == 0].any() for name, mask in masks.items())
    exported = s2ap.json("export", "--int8", *common)
    model = onnx.load(run / exported["folder"] / exported["file"])
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    trained = json.loads((run / "finetune" / "ranges.json").read_text(encoding="utf-8"))
    assert trained["weight_bits"] == 7
    # What a ReLU follows at once is not rounded by itself.
    kept = {name: limits for name, limits in trained["ranges"].items() if f"{name}_scale" in stored}
    assert len(kept) > 2
    for name, (low, high) in kept.items():
        scale = (max(high, 0.0) - min(low, 0.0)) / 255
        assert stored[f"{name}_scale"] == pytest.approx(scale, rel=1e-5)
    # Other bits than training had are told.
    other = s2ap.ok("export", "--int8", "--weight-bits", 8, "--name", "eight", *common)
    assert "fine-tuning rounded weights" in other.err
