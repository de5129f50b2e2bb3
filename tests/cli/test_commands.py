"""The users' literal commands, each on the run folder that the one before it left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from s2ap_deploy.models.checkpoints import checkpoint

SHORT = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--eps", "0.5"]


def stages(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["stages"]
    return found


def test_every_stage_records_inputs_outputs_seeds_threads_and_versions(finished_run: Path) -> None:
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert [command.split()[1] for command in manifest["commands"]] == ["prune", "certify", "export"]
    assert list(manifest["stages"]) == ["certify", "export", "finetune", "pretrain", "search"]
    for name, record in manifest["stages"].items():
        (session,) = record["sessions"]
        assert record["status"] == "finished"
        assert session["environment"]["threads"] == 1
        assert {"python", "torch", "onnxruntime", "pyautoattack"} <= session["environment"]["versions"].keys()
        for output in record["outputs"]:
            assert (finished_run / output["path"]).stat().st_size == output["bytes"]
            assert output["path"].startswith(f"{name}/")
        assert not list((finished_run / name).glob("snapshot*"))
    assert manifest["stages"]["search"]["inputs"]["seed"] == 0
    assert manifest["stages"]["certify"]["inputs"]["certify"] == {
        "n": 40,
        "attack_seed": 0,
        "sample_seed": 0,
        "version": "standard",
        "provable": False,
        "curve": False,
    }


def test_the_budget_is_kept_exactly_and_no_weight_outside_the_mask_lives(finished_run: Path) -> None:
    found = stages(finished_run)
    assert found["search"]["results"]["kept"] == round(0.1 * 151_072)
    assert found["finetune"]["results"]["kept"] == round(0.1 * 151_072)
    assert found["finetune"]["results"]["nonzero"] <= found["finetune"]["results"]["kept"]
    assert found["search"]["results"]["perturbed_steps"] > 0
    assert found["search"]["results"]["last"]["flip_rate"] > 0


def test_dense_and_pruned_are_judged_on_the_same_images(finished_run: Path) -> None:
    dense, pruned = (
        json.loads((finished_run / "certify" / f"{role}.json").read_text()) for role in ("dense", "pruned")
    )
    assert dense["sample_ids_sha256"] == pruned["sample_ids_sha256"]
    assert [s["id"] for s in dense["samples"]] == [s["id"] for s in pruned["samples"]]
    for certificate in (dense, pruned):
        assert certificate["formal_guarantee"] is False
        assert "upper bound" in certificate["statement"]


def test_a_finished_stage_is_skipped_and_left_alone(
    s2ap: Callable[..., Any],
    digits_model: Path,
    own_run: Path,
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    before = files_in(own_run)
    again = s2ap("prune", digits_model, "--sparsity", 0.9, *SHORT, "--run", own_run)
    assert again.code == 0
    for name in ("pretrain", "search", "finetune"):
        assert f"{name}: already done with the same inputs, skipped" in again.err
    assert s2ap("certify", "--run", own_run).code == 0
    assert s2ap("export", "--run", own_run).code == 0
    after = files_in(own_run)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json", ".lock"}


def test_a_changed_output_is_noticed_and_made_again_by_resume(
    s2ap: Callable[..., Any], digits_model: Path, own_run: Path
) -> None:
    model = own_run / "finetune" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-4] + b"\0\0\0\1")
    refused = s2ap("export", "--run", own_run)
    assert refused.code == 2
    assert "finetune/model.safetensors has changed since" in refused.err
    assert "s2ap-deploy prune with --resume" in refused.err
    again = s2ap("prune", digits_model, "--sparsity", 0.9, *SHORT, "--resume", "--run", own_run)
    assert again.code == 0, again.err
    assert model.read_bytes() == content
    assert "certify" not in stages(own_run)


def test_certify_and_export_of_an_unfinished_pruning_are_refused(
    s2ap: Callable[..., Any], own_run: Path
) -> None:
    """Otherwise the dense network alone would be attacked, and nobody would notice."""
    manifest = json.loads((own_run / "manifest.json").read_text())
    for later in ("finetune", "certify", "export"):
        del manifest["stages"][later]
        shutil.rmtree(own_run / later)
    (own_run / "manifest.json").write_text(json.dumps(manifest))
    for command in ("certify", "export"):
        done = s2ap(command, "--run", own_run)
        assert done.code == 2
        assert "holds no finished finetune" in done.err
        assert "run s2ap-deploy prune first" in done.err


def test_certify_with_a_checkpoint_alone_then_export_and_gate(
    s2ap: Callable[..., Any], digits_model: Path, tmp_path: Path
) -> None:
    network = tmp_path / "network.pt"
    network.write_bytes(digits_model.read_bytes())
    done = s2ap("certify", "network.pt", "--eps", "0.5", "--n", 20, "--first", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["formal_guarantee"] is False
    assert set(answer["certify"]) == {"dense"}
    certificate = json.loads((tmp_path / "s2ap-run" / "certify" / "dense.json").read_text())
    assert certificate["sample_seed"] is None
    assert (certificate["n"], certificate["threat"]) == (20, {"eps": "0.5", "norm": "Linf"})
    assert s2ap("export", "--onnx", cwd=tmp_path).code == 0
    gate = s2ap("gate", "--min-robust", 0, "--rule", "point", "--max-drop", 0, cwd=tmp_path)
    assert gate.code == 0, gate.out


def test_what_certify_was_told_is_kept_for_the_next_time(s2ap: Callable[..., Any], own_run: Path) -> None:
    assert yaml.safe_load((own_run / "recipe.yaml").read_text())["certify"]["n"] == 40
    done = s2ap("certify", "--n", 20, "--overwrite", "--run", own_run)
    assert done.code == 0, done.err
    assert yaml.safe_load((own_run / "recipe.yaml").read_text())["certify"]["n"] == 20
    assert "export" not in stages(own_run)


def test_out_of_time_is_inconclusive_and_resume_ends_with_the_same_points(
    s2ap: Callable[..., Any], own_run: Path, finished_run: Path, files_in: Callable[[Path], dict[str, bytes]]
) -> None:
    stopped = s2ap("certify", "--overwrite", "--time-budget", 0, "--run", own_run)
    assert stopped.code == 3
    assert "the time budget ran out while attacking the dense network" in stopped.err
    refused = s2ap("certify", "--run", own_run)
    assert refused.code == 2
    assert "--resume" in refused.err
    assert s2ap("gate", "--min-robust", 0.1, "--run", own_run).code == 3
    assert s2ap("certify", "--resume", "--run", own_run).code == 0
    for role in ("dense", "pruned"):
        name = f"certify/{role}-points.safetensors"
        assert files_in(own_run)[name] == files_in(finished_run)[name]
        assert not (own_run / "certify" / f"record-{role}").exists()


def test_the_time_left_is_told_before_the_work(s2ap: Callable[..., Any], own_run: Path) -> None:
    done = s2ap("certify", "--overwrite", "--run", own_run, "--workers", 1)
    lines = done.err.splitlines()
    cost = next(i for i, line in enumerate(lines) if "takes at most about" in line)
    assert lines[cost].startswith("AutoAttack on 40 images")
    assert "for each of the two networks" in lines[cost]
    assert cost < next(i for i, line in enumerate(lines) if line.startswith("certify: "))
    assert not any("passs" in line for line in lines)


def test_export_writes_a_copy_and_says_what_was_checked(
    s2ap: Callable[..., Any], own_run: Path, tmp_path: Path
) -> None:
    target = tmp_path / "robust.onnx"
    done = s2ap("export", "--onnx", "--output", target, "--run", own_run)
    assert done.code == 0, done.err
    assert target.read_bytes() == (own_run / "export" / "model.onnx").read_bytes()
    for words in ("the file itself judged 40 points", "shrinks the file, not CPU latency"):
        assert words in done.out
    sparse = re.search(r"\((\d+\.\d\d)% sparse\)", done.out)
    assert sparse is not None
    assert float(sparse[1]) >= 90  # weights that only dead channels had are gone as well
    assert s2ap("export", "--output", target, "--run", own_run).code == 2


def test_export_before_certify_warns_and_the_gate_waits(s2ap: Callable[..., Any], own_run: Path) -> None:
    manifest = json.loads((own_run / "manifest.json").read_text())
    for later in ("certify", "export"):
        del manifest["stages"][later]
        shutil.rmtree(own_run / later)
    (own_run / "manifest.json").write_text(json.dumps(manifest))
    done = s2ap("export", "--onnx", "--run", own_run)
    assert done.code == 0, done.err
    assert "warning: nothing is certified yet" in done.err
    gate = s2ap("gate", "--min-robust", 0.1, "--run", own_run)
    assert gate.code == 3
    assert "run s2ap-deploy certify" in gate.err


def test_a_checkpoint_of_this_tool_needs_nothing_else(
    s2ap: Callable[..., Any], digits_model: Path, tmp_path: Path
) -> None:
    info = checkpoint.read_tensors(digits_model).info
    assert info is not None
    assert (info.arch, info.data, str(info.threat)) == ("digits-conv", "digits", "Linf eps 0.1")
    assert info.preprocessing.size == (1, 8, 8)
    assert info.normalization is not None
    done = s2ap("inspect", digits_model, "--json")
    assert json.loads(done.out)["info"]["threat"] == {"norm": "Linf", "eps": "0.1"}


def test_a_foreign_checkpoint_with_the_missing_facts_as_options(
    s2ap: Callable[..., Any], digits_model: Path, tmp_path: Path
) -> None:
    state = torch.load(digits_model, weights_only=True)["state_dict"]
    plain = {
        f"module.{name.removeprefix('network.')}": value
        for name, value in state.items()
        if name.startswith("network.")
    }
    torch.save({"state_dict": plain, "epoch": 3}, tmp_path / "foreign.tar")
    facts = checkpoint.read_tensors(digits_model).info
    assert facts is not None
    assert facts.normalization is not None
    mean, std = facts.normalization.mean[0], facts.normalization.std[0]
    options = ["--data", "digits", "--mean", mean, "--std", std]
    done = s2ap("prune", "foreign.tar", "--sparsity", 0.9, *options, *SHORT, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "architecture digits-conv: every name and shape agrees" in done.err
    assert "prefix 'module.' stripped" in done.err
    adopted = checkpoint.read_tensors(tmp_path / "s2ap-run" / "pretrain" / "model.safetensors").info
    pruned = checkpoint.read_tensors(tmp_path / "s2ap-run" / "finetune" / "model.safetensors").info
    assert adopted is not None
    assert pruned is not None
    assert adopted.normalization == pruned.normalization == facts.normalization
    assert pruned.preprocessing == facts.preprocessing
    assert (pruned.data, pruned.stage) == ("digits", "finetune")
    # The same network in the same wrapping of normalization as the checkpoint of our own: the same masks.
    results = stages(tmp_path / "s2ap-run")["pretrain"]["results"]["best"]
    assert results["clean_accuracy"] > 0.4


def test_the_recipe_that_is_left_behind_repeats_the_run(
    s2ap: Callable[..., Any],
    finished_run: Path,
    tmp_path: Path,
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    done = s2ap("run", finished_run / "recipe.yaml", "--run", "again", "--threads", 1, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    first, second = files_in(finished_run), files_in(tmp_path / "again")
    for name in (
        "search/masks.safetensors",
        "finetune/model.safetensors",
        "certify/pruned-points.safetensors",
    ):
        assert first[name] == second[name]
    assert "gate" not in json.loads(done.out)


def test_demo_is_the_recipe_of_that_name(s2ap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from s2ap_deploy.cli import run_commands

    seen: dict[str, Any] = {}
    monkeypatch.setattr(run_commands.run_command, "callback", lambda **options: seen.update(options) or 0)
    assert s2ap("demo", "--sparsity", "0.999", "--run", "elsewhere", "--workers", 2).code == 0
    assert (seen["recipe"], seen["overrides"]) == ("demo", ("prune.sparsity=0.999",))
    assert (seen["run"], seen["workers"]) == (Path("elsewhere"), 2)


def test_recipes_lists_and_shows(s2ap: Callable[..., Any], tmp_path: Path) -> None:
    listed = s2ap("recipes")
    assert listed.code == 0
    for name in ("demo", "mnist", "cifar10-resnet18-hydra-s2ap-90", "cifar10-resnet18-hydra-s2ap-99"):
        assert any(line.strip().startswith(f"{name} ") for line in listed.out.splitlines())
    shown = s2ap("recipes", "demo")
    (tmp_path / "mine.yaml").write_text(shown.out)
    assert yaml.safe_load(shown.out)["name"] == "demo"
    assert s2ap("recipes", tmp_path / "mine.yaml").out == shown.out
    assert json.loads(s2ap("recipes", "--json").out).keys() >= {"demo", "mnist"}
