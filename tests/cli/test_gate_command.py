"""The verdict as CI sees it: an exit code, at once, that nothing in the folder can talk its way around."""

import json
import shutil

import pytest

EASY = ["--min-robust", "0", "--max-drop", "0.9", "--rule", "point"]
HARD = ["--min-robust", "0.4", "--max-drop", "0.05"]


def test_a_fair_policy_passes(s2ap, own_run) -> None:
    done = s2ap.ok("gate", *EASY, "--run", own_run)
    assert done.out.splitlines()[-1] == "gate: PASSED"
    assert "✓ file export/model.onnx gives the certificate's answers on all 40 samples" in done.out
    assert str(own_run) not in done.out  # a verdict is read on other machines too
    verdict = json.loads((own_run / "gate" / "verdict.json").read_text())
    assert verdict["status"] == "pass"


def test_a_policy_that_the_network_misses_fails(s2ap, own_run) -> None:
    done = s2ap("gate", *HARD, "--run", own_run)
    assert done.code == 1
    assert "✗ robust accuracy under AutoAttack (upper bound): 0 of 40 = 0.0%" in done.out
    assert done.out.splitlines()[-1] == "gate: FAILED"


def test_the_recipes_own_policy_applies_where_none_is_given(s2ap, own_run) -> None:
    recipe = (own_run / "recipe.yaml").read_text()
    assert recipe.rstrip().endswith("gate: null")
    (own_run / "recipe.yaml").write_text(recipe.replace("gate: null", "gate: {min_robust: 0.4, rule: point}"))
    assert s2ap("gate", "--run", own_run).code == 1
    assert s2ap("gate", "--min-robust", 0, "--rule", "point", "--run", own_run).code == 0


@pytest.mark.parametrize(
    "name",
    [
        *(
            "export/int8.onnx",
            "spare.onnx",
            "export/deep/x.ONNX",
            "export/model.tflite",
            "model.pte",
            "m.pt2",
        ),
        *("m.pth", "export/m.mlpackage/Data/weight.bin", "export/model.xml", "net.param", "net.bin"),
        *("net.mnn", "best.safetensors", "net.c", "net.h", "libnet.so", "libnet.a", "export/model.onnx.bak"),
        "export/.tmp-0123456789abcdef.onnx",
    ],
)
def test_an_artifact_that_nothing_covers_is_inconclusive(name, s2ap, own_run) -> None:
    stranger = own_run / name
    stranger.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(own_run / "export" / "model.onnx", stranger)
    done = s2ap("gate", *EASY, "--run", own_run)
    assert done.code == 3
    assert f"? file {name} is covered by no certificate" in done.out
    assert s2ap("gate", *HARD, "--run", own_run).code == 1  # a demonstrated miss stays one


def test_every_file_that_the_manifest_names_is_hashed(s2ap, own_run) -> None:
    """By the gate and by verify: zeroed fails, missing is inconclusive."""
    stages = json.loads((own_run / "manifest.json").read_text())["stages"]
    names = [output["path"] for record in stages.values() for output in record["outputs"]]
    assert {"search/masks.safetensors", "certify/recipe.yaml", "search/scores.safetensors"} <= set(names)
    commands = (["gate", *EASY], ["verify", own_run / "certify" / "pruned.json", "--files"])
    for name in names:
        path = own_run / name
        content = path.read_bytes()
        for command in commands:
            path.write_bytes(bytes(len(content)))
            zeroed = s2ap(*command, "--run", own_run)
            # verify reads a certificate before it hashes it
            unreadable = command[0] == "verify" and name == "certify/pruned.json"
            assert zeroed.code == (2 if unreadable else 1), (name, zeroed.out + zeroed.err)
            path.unlink()
            assert s2ap(*command, "--run", own_run).code == (2 if unreadable else 3), name
        path.write_bytes(content)
    assert all(s2ap(*command, "--run", own_run).code == 0 for command in commands)


@pytest.mark.parametrize("folder_too", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "search", "finetune", "certify", "export"])
def test_a_stage_that_was_cut_out_of_the_manifest_is_missed(stage, folder_too, s2ap, own_run) -> None:
    contents = json.loads((own_run / "manifest.json").read_text())
    del contents["stages"][stage]
    (own_run / "manifest.json").write_text(json.dumps(contents))
    if folder_too:
        shutil.rmtree(own_run / stage)
    done = s2ap("gate", *EASY, "--run", own_run)
    # Nothing speaks of an export that is gone with its folder: the run is one that exported nothing.
    assert done.code == (0 if folder_too and stage == "export" else 3), done.out + done.err
    if stage != "certify":
        verified = s2ap("verify", own_run / "certify" / "pruned.json", "--files")
        assert verified.code == done.code, verified.out


def test_a_doctored_certificate_is_no_evidence(s2ap, own_run) -> None:
    certificate = own_run / "certify" / "pruned.json"
    certificate.write_text(certificate.read_text().replace('"broken_by": "apgd-ce"', '"broken_by": null'))
    done = s2ap("gate", *EASY, "--run", own_run)
    assert done.code == 1
    assert (
        "✗ file certify/pruned.json is not the one recorded in manifest.json: its SHA-256 has changed"
        in done.out
    )
    assert "robust accuracy" not in done.out


def test_an_unfinished_export_covers_nothing(s2ap, own_run) -> None:
    manifest = json.loads((own_run / "manifest.json").read_text())
    manifest["stages"]["export"] |= {"status": "started", "outputs": []}
    (own_run / "manifest.json").write_text(json.dumps(manifest))
    assert s2ap("gate", *EASY, "--run", own_run).code == 3


def test_too_few_samples_are_told_from_a_defect(s2ap, own_run) -> None:
    done = s2ap("gate", "--max-drop", "0.05", "--run", own_run)
    assert done.code == 3
    assert "too few samples: even none lost of 40 would not show 5.0%" in done.out
    assert "hint: s2ap-deploy gate --plan N says what N images can show" in done.err


def test_quiet_says_nothing_and_json_says_it_in_one_object(s2ap, own_run) -> None:
    quiet = s2ap("gate", *EASY, "-q", "--run", own_run)
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    told = s2ap("gate", *HARD, "--json", "--run", own_run)
    verdict = told.answer
    assert (verdict["status"], verdict["exit_code"], told.code) == ("fail", 1, 1)
