"""The users' literal commands, each on the run folder that the one before it left."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from s2ap_deploy.models.checkpoints import checkpoint

SHORT = ["--search-epochs", 1, "--finetune-epochs", 1, "--loss", "at", "--eps", "0.5"]


def stages(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["stages"]
    return found


def test_every_stage_records_inputs_outputs_seeds_threads_and_versions(finished_run) -> None:
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
        "tune_curve": False,
    }


def test_the_budget_is_kept_exactly_and_no_weight_outside_the_mask_lives(finished_run) -> None:
    found = stages(finished_run)
    assert found["search"]["results"]["kept"] == round(0.1 * 151_072)
    assert found["finetune"]["results"]["kept"] == round(0.1 * 151_072)
    assert found["finetune"]["results"]["nonzero"] <= found["finetune"]["results"]["kept"]
    assert found["search"]["results"]["perturbed_steps"] > 0
    assert found["search"]["results"]["last"]["flip_rate"] > 0


def test_dense_and_pruned_are_judged_on_the_same_images(finished_run) -> None:
    dense, pruned = (
        json.loads((finished_run / "certify" / f"{role}.json").read_text()) for role in ("dense", "pruned")
    )
    assert dense["sample_ids_sha256"] == pruned["sample_ids_sha256"]
    assert [s["id"] for s in dense["samples"]] == [s["id"] for s in pruned["samples"]]
    for certificate in (dense, pruned):
        assert certificate["formal_guarantee"] is False
        assert "upper bound" in certificate["statement"]


def test_a_finished_stage_is_skipped_and_left_alone(s2ap, digits_model, own_run, files_in) -> None:
    before = files_in(own_run)
    again = s2ap.ok("prune", digits_model, "--sparsity", 0.9, *SHORT, "--run", own_run)
    for name in ("pretrain", "search", "finetune"):
        assert f"{name}: already done with the same inputs, skipped" in again.err
    assert s2ap("certify", "--run", own_run).code == 0
    assert s2ap("export", "--run", own_run).code == 0
    after = files_in(own_run)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json", ".lock"}


def test_a_changed_output_is_noticed_and_made_again_by_resume(s2ap, digits_model, own_run) -> None:
    model = own_run / "finetune" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-4] + b"\0\0\0\1")
    refused = s2ap.refused("output-damaged", "export", "--run", own_run)
    assert "s2ap-deploy prune with --resume" in refused.answer["hint"]
    s2ap.ok("prune", digits_model, "--sparsity", 0.9, *SHORT, "--resume", "--run", own_run)
    assert model.read_bytes() == content
    assert "certify" not in stages(own_run)


def test_certify_and_export_of_an_unfinished_pruning_are_refused(s2ap, own_run, without_stages) -> None:
    """Otherwise the dense network alone would be attacked, and nobody would notice."""
    without_stages(own_run, "finetune", "certify", "export")
    for command in ("certify", "export"):
        s2ap.refused("stage-missing", command, "--run", own_run)


def test_certify_with_a_checkpoint_alone_then_export_and_gate(s2ap, digits_model, tmp_path) -> None:
    network = tmp_path / "network.pt"
    network.write_bytes(digits_model.read_bytes())
    answer = s2ap.json("certify", "network.pt", "--eps", "0.5", "--n", 20, "--first", cwd=tmp_path)
    assert answer["formal_guarantee"] is False
    assert set(answer["certify"]) == {"dense"}
    certificate = json.loads((tmp_path / "s2ap-run" / "certify" / "dense.json").read_text())
    assert certificate["sample_seed"] is None
    assert (certificate["n"], certificate["threat"]) == (20, {"eps": "0.5", "norm": "Linf"})
    assert s2ap("export", "--onnx", cwd=tmp_path).code == 0
    s2ap.ok("gate", "--min-robust", 0, "--rule", "point", "--max-drop", 0, cwd=tmp_path)


def test_what_certify_was_told_is_kept_for_the_next_time(s2ap, own_run) -> None:
    assert yaml.safe_load((own_run / "recipe.yaml").read_text())["certify"]["n"] == 40
    s2ap.ok("certify", "--n", 20, "--overwrite", "--run", own_run)
    assert yaml.safe_load((own_run / "recipe.yaml").read_text())["certify"]["n"] == 20
    assert "export" not in stages(own_run)


def test_out_of_time_is_inconclusive_and_resume_ends_with_the_same_points(
    s2ap, own_run, finished_run, files_in
) -> None:
    stopped = s2ap("certify", "--overwrite", "--time-budget", 0, "--run", own_run)
    assert stopped.code == 3
    assert "the time budget ran out while attacking the dense network" in stopped.err
    s2ap.refused("stage-unfinished", "certify", "--run", own_run)
    assert s2ap("gate", "--min-robust", 0.1, "--run", own_run).code == 3
    assert s2ap("certify", "--resume", "--run", own_run).code == 0
    for role in ("dense", "pruned"):
        name = f"certify/{role}-points.safetensors"
        assert files_in(own_run)[name] == files_in(finished_run)[name]
        assert not (own_run / "certify" / f"record-{role}").exists()


def test_the_time_left_is_told_before_the_work(s2ap, own_run) -> None:
    done = s2ap("certify", "--overwrite", "--run", own_run, "--workers", 1)
    lines = done.err.splitlines()
    cost = next(i for i, line in enumerate(lines) if "takes about" in line)
    assert lines[cost].startswith("AutoAttack on 40 images of both networks")
    assert " robust under PGD-10), at most " in lines[cost]
    assert cost < next(i for i, line in enumerate(lines) if line.startswith("certify: "))
    assert not any("passs" in line for line in lines)


def test_export_writes_a_copy_and_says_what_was_checked(s2ap, own_run, tmp_path) -> None:
    target = tmp_path / "robust.onnx"
    done = s2ap.ok("export", "--onnx", "--output", target, "--run", own_run)
    assert target.read_bytes() == (own_run / "export" / "model.onnx").read_bytes()
    for words in ("the file itself judged 40 points", "shrinks the file, not CPU latency"):
        assert words in done.out
    sparse = re.search(r"\((\d+\.\d\d)% sparse\)", done.out)
    assert sparse is not None
    assert float(sparse[1]) >= 90  # weights that only dead channels had are gone as well
    assert s2ap("export", "--output", target, "--run", own_run).code == 2


def test_export_before_certify_warns_and_the_gate_waits(s2ap, own_run, without_stages) -> None:
    without_stages(own_run, "certify", "export")
    done = s2ap.ok("export", "--onnx", "--run", own_run)
    assert "warning: nothing is certified yet" in done.err
    gate = s2ap("gate", "--min-robust", 0.1, "--json", "--run", own_run)
    assert (gate.code, gate.answer["code"]) == (3, "certificate-missing")


def test_a_checkpoint_of_this_tool_needs_nothing_else(s2ap, digits_model, tmp_path) -> None:
    info = checkpoint.read_tensors(digits_model).info
    assert info is not None
    assert (info.arch, info.data, str(info.threat)) == ("digits-conv", "digits", "Linf eps 0.1")
    assert info.preprocessing.size == (1, 8, 8)
    assert info.normalization is not None
    done = s2ap("inspect", digits_model, "--json")
    assert done.answer["info"]["threat"] == {"norm": "Linf", "eps": "0.1"}


def test_a_foreign_checkpoint_with_the_missing_facts_as_options(s2ap, digits_model, tmp_path) -> None:
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
    done = s2ap.ok("prune", "foreign.tar", "--sparsity", 0.9, *options, *SHORT, cwd=tmp_path)
    assert "architecture digits-conv: all names and shapes match" in done.err
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


def test_the_recipe_that_is_left_behind_repeats_the_run(s2ap, finished_run, tmp_path, files_in) -> None:
    done = s2ap.ok(
        "run", finished_run / "recipe.yaml", "--run", "again", "--threads", 1, "--json", cwd=tmp_path
    )
    first, second = files_in(finished_run), files_in(tmp_path / "again")
    for name in (
        "search/masks.safetensors",
        "finetune/model.safetensors",
        "certify/pruned-points.safetensors",
    ):
        assert first[name] == second[name]
    assert "gate" not in done.answer


def test_demo_is_the_recipe_of_that_name(s2ap, monkeypatch) -> None:
    from s2ap_deploy.cli import run_commands

    seen: dict[str, Any] = {}
    monkeypatch.setattr(run_commands.run_command, "callback", lambda **options: seen.update(options) or 0)
    assert s2ap("demo", "--sparsity", "0.999", "--run", "elsewhere", "--workers", 2).code == 0
    assert (seen["recipe"], seen["overrides"]) == ("demo", ("prune.sparsity=0.999",))
    assert (seen["run"], seen["workers"]) == (Path("elsewhere"), 2)
