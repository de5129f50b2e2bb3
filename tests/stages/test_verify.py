"""Verify: what was changed is found, what was overstated falls, and what is not there is no verdict."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError
from s2ap_deploy.evaluation.autoattack import protocols
from s2ap_deploy.evaluation.certificate import Certificate, PointsFile
from s2ap_deploy.evaluation.points import load_points, save_points
from s2ap_deploy.evaluation.samples import Proven, rows
from s2ap_deploy.recorder import Silent
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.manifest import Manifest
from s2ap_deploy.stages.certified_files import Verification, tensor_names, verify_files
from s2ap_deploy.stages.context import ExecutionConfig
from s2ap_deploy.stages.verify import verify

CPU = ExecutionConfig(device=torch.device("cpu"), workers=1)


def checked(run: Path, *, k: int = 4, role: str = "pruned") -> Verification:
    return verify(run / "certify" / f"{role}.json", None, k=k, seed=7, machine=CPU, recorder=Silent())


def words(found: Verification, status: str) -> str:
    return "\n".join(check.message for check in found.checks if check.status == status)


def relist(run: Path) -> None:
    """The manifest as a forger would leave it: with the hashes of what lies there now, inputs included."""
    text = (run / "manifest.json").read_text()
    for record in json.loads(text)["stages"].values():
        for output in record["outputs"]:
            text = text.replace(output["sha256"], files.sha256(run / output["path"]))
    content = json.loads(text)
    for record in content["stages"].values():
        record["inputs_sha256"] = manifest.digest(record["inputs"])
        for output in record["outputs"]:
            output["bytes"] = (run / output["path"]).stat().st_size
    (run / "manifest.json").write_text(json.dumps(content))


def issue(**facts: Any) -> Certificate:
    """Build a certificate from columns of samples and the other fields."""
    columns = [facts.pop(name) for name in inspect.signature(rows).parameters]
    return Certificate.of(rows(*columns), **facts)


def forge(run: Path, *, attacked: torch.Tensor | None = None, relisted: bool = True, **changes: Any) -> None:
    """Replace the pruned network's certificate by one that does not contradict itself."""
    path = run / "certify" / "pruned.json"
    old = Certificate.load(path)
    assert old.points is not None
    points_path = run / "certify" / old.points.name
    if attacked is not None:
        clean, _ = load_points(points_path, old.points)
        changes["points"] = save_points(points_path, clean, attacked)
    columns = {
        "sample_ids": "id",
        "labels": "label",
        "clean_prediction": "clean_prediction",
        "adversarial_prediction": "adversarial_prediction",
        "broken_by": "broken_by",
    }
    facts = {name: [getattr(sample, of) for sample in old.samples] for name, of in columns.items()}
    kept = (
        "subject",
        "threat",
        "data",
        "split",
        "attacks",
        "protocol",
        "flags",
        "attack_seed",
        "sample_seed",
    )
    kept += ("block_size", "points", "versions", "environment", "seconds", "mask_sha256", "recipe_sha256")
    facts |= {name: getattr(old, name) for name in kept} | {"class_names": ()}
    issue(**{**facts, **changes}).save(path)
    if relisted:
        relist(run)


def overstated(run: Path) -> dict[str, Any]:
    """Everything that an attack broke is called robust."""
    old = Certificate.load(run / "certify" / "pruned.json")
    assert old.points is not None
    clean, _ = load_points(run / "certify" / old.points.name, old.points)
    return {
        "attacked": clean,
        "broken_by": [by if (by := sample.broken_by) == "clean" else None for sample in old.samples],
        "adversarial_prediction": [sample.clean_prediction for sample in old.samples],
        "attacks": [row.model_copy(update={"n_in": old.clean.k, "n_broken": 0}) for row in old.attacks],
    }


@pytest.mark.parametrize("role", ["dense", "pruned"])
def test_an_honest_run_is_confirmed_and_left_alone(role, own_run, files_in) -> None:
    before = files_in(own_run)
    found = checked(own_run, role=role)
    assert (found.status, found.exit_code) == ("pass", 0), words(found, "fail")
    assert found.attacked == 0, "at this radius nothing stands"
    assert files_in(own_run) == before
    certificate = Certificate.load(own_run / "certify" / f"{role}.json")
    assert found.certificate_sha256 == certificate.sha256
    assert (certificate.mask_sha256 is not None) == (role == "pruned")
    assert (
        "search/masks.safetensors has the SHA-256 recorded in manifest.json and the certificate"
        in words(found, "pass")
    ) == (role == "pruned")
    assert "file certify/recipe.yaml has the SHA-256" in words(found, "pass")
    broken = certificate.clean.k
    assert f"breaks: {broken} of {broken} reproduce" in words(found, "pass")
    named = {subject.name for subject in found.subjects}
    stage = {"dense": "pretrain", "pruned": "finetune"}[role]
    assert named == {f"{stage}/model.safetensors", *(["export/model.onnx"] if role == "pruned" else [])}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("finetune/model.safetensors", "file finetune/model.safetensors is not the one"),
        ("certify/pruned-points.safetensors", "file certify/pruned-points.safetensors is not the one"),
        ("search/masks.safetensors", "file search/masks.safetensors is not the one"),
        ("certify/recipe.yaml", "file certify/recipe.yaml is not the one"),
    ],
)
def test_a_file_that_was_changed_contradicts(name, told, own_run) -> None:
    path = own_run / name
    data = bytearray(path.read_bytes())
    if not name.endswith(".yaml"):
        data[-3] ^= 1  # in the last tensor
    path.write_bytes(data)
    if name.endswith(".yaml"):  # a recipe that still is one
        path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    for relisted in (False, True):
        if relisted:
            relist(own_run)
        found = checked(own_run)
        assert found.exit_code == 1
        assert told in words(found, "fail")


@pytest.mark.parametrize(
    "name", ["finetune/model.safetensors", "certify/pruned-points.safetensors", "search/masks.safetensors"]
)
def test_a_file_that_is_gone_leaves_the_answer_open(name, own_run) -> None:
    (own_run / name).unlink()
    found = checked(own_run)
    assert (found.status, found.exit_code) == ("inconclusive", 3)
    assert f"file {name} is missing" in words(found, "inconclusive")


def test_a_survivor_that_falls_now_is_told_with_its_attack_seed(own_run) -> None:
    forge(own_run, **overstated(own_run))
    found = checked(own_run, k=4)
    assert found.exit_code == 1
    assert found.attacked == 4
    told = words(found, "fail")
    assert "new attacks: 0 of 4 images withstand again" in told
    assert "(seed 7)" in told
    assert "digits/" in told
    assert "Attacks are random" in told
    assert "breaks: 0 of 0 reproduce" in words(found, "pass"), "everything else agrees"
    assert checked(own_run, k=0).status == "pass", "without attacks, an overstatement is consistent"


def test_a_survivor_that_withstands_again(own_run, monkeypatch) -> None:
    few = {name: 40 if name == "square" else 4 for name in protocols.ITERATIONS}
    monkeypatch.setattr(protocols, "ITERATIONS", few)
    old = Certificate.load(own_run / "certify" / "pruned.json")
    for path in (own_run / "manifest.json", own_run / "certify" / "recipe.yaml"):
        path.write_text(re.sub(r"""("?eps"?: )['"]?0.5['"]?""", r'\1"1/100000"', path.read_text()))
    recipe = files.sha256(own_run / "certify" / "recipe.yaml")
    changes = {"threat": old.threat.model_copy(update={"eps": "1/100000"}), "recipe_sha256": recipe}
    forge(own_run, **overstated(own_run), **changes)
    found = checked(own_run, k=3)
    assert (found.status, found.attacked) == ("pass", 3), words(found, "fail")
    assert "new attacks: 3 of 3 images withstand again" in words(found, "pass")


def test_stored_points_that_break_nothing(own_run) -> None:
    old = Certificate.load(own_run / "certify" / "pruned.json")
    assert old.points is not None
    clean, attacked = load_points(own_run / "certify" / old.points.name, old.points)
    index = next(i for i, sample in enumerate(old.samples) if sample.broken_by == "apgd-ce")
    attacked[index] = clean[index]
    forge(own_run, attacked=attacked)
    found = checked(own_run)
    assert found.exit_code == 1
    assert f"breaks: {old.clean.k - 1} of {old.clean.k} reproduce" in words(found, "fail")
    assert f"not for {old.samples[index].id}" in words(found, "fail")


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), None])
def test_stored_points_outside_of_the_threat_model(value, own_run) -> None:
    old = Certificate.load(own_run / "certify" / "pruned.json")
    assert old.points is not None
    clean, attacked = load_points(own_run / "certify" / old.points.name, old.points)
    index = next(i for i, sample in enumerate(old.samples) if sample.broken_by == "apgd-ce")
    # Without a value: a pixel that goes from one end of [0, 1] to the other, farther than eps.
    attacked[index, 0, 0, 0] = 1 - clean[index, 0, 0, 0].round() if value is None else value
    forge(own_run, attacked=attacked)
    found = checked(own_run)
    assert found.exit_code == 1
    assert "points: 1 are not within Linf eps 0.5 and [0, 1]" in words(found, "fail")


def test_images_that_are_not_the_data_sets(own_run) -> None:
    old = Certificate.load(own_run / "certify" / "pruned.json")
    assert old.points is not None
    path = own_run / "certify" / old.points.name
    clean, attacked = load_points(path, old.points)
    forge(own_run, points=save_points(path, clean * 0.999, attacked * 0.999))
    assert "images: the stored ones are not those of the data set" in words(checked(own_run), "fail")


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("sample_ids", "test/99999", "1 are not in digits: test/99999"),
        ("labels", 99, "1 have another label in the data"),
    ],
)
def test_samples_that_are_not_the_data_sets(column, value, told, own_run) -> None:
    old = Certificate.load(own_run / "certify" / "pruned.json")
    index = next(i for i, sample in enumerate(old.samples) if sample.broken_by == "clean")
    name = {"sample_ids": "id", "labels": "label"}[column]
    values = [getattr(sample, name) for sample in old.samples]
    values[index] = value
    forge(own_run, **{column: values})
    found = checked(own_run)
    assert found.exit_code == 1
    assert told in words(found, "fail")


def test_answers_that_were_made_up(own_run) -> None:
    old = Certificate.load(own_run / "certify" / "pruned.json")
    index = next(i for i, sample in enumerate(old.samples) if sample.broken_by == "apgd-ce")
    made_up = [sample.adversarial_prediction for sample in old.samples]
    made_up[index] = 12345  # no class at all
    forge(own_run, adversarial_prediction=made_up)
    assert f"{old.n - 1} of {old.n} attacked images as recorded" in words(checked(own_run), "fail")
    forge(own_run, flags=("randomized",))
    found = checked(own_run)
    assert found.exit_code == 3, "a network that answers at random proves nothing either way"


def test_weights_outside_of_the_mask(own_run) -> None:
    masks = own_run / "search" / "masks.safetensors"
    tensors = safetensors.torch.load(masks.read_bytes())
    name = next(iter(tensors))
    tensors[name] = torch.zeros_like(tensors[name])
    masks.write_bytes(safetensors.torch.save(tensors))
    forge(own_run, mask_sha256=files.sha256(masks))
    assert "weights outside of them are not zero" in words(checked(own_run), "fail")


def test_weights_that_are_not_the_certified_ones(own_run) -> None:
    old = Certificate.load(own_run / "certify" / "pruned.json")
    forge(own_run, subject=old.subject.model_copy(update={"weights_sha256": "0" * 64}))
    found = checked(own_run)
    assert "weights: differ from those attacked" in words(found, "fail")
    assert found.attacked == 0


def test_a_certificate_that_the_run_does_not_know(own_run) -> None:
    forge(own_run, relisted=False, attack_seed=99)
    assert "not the one that the run recorded" in words(checked(own_run), "fail")
    path = own_run / "certify" / "pruned.json"
    path.write_text(path.read_text().replace("\n", "\n "))
    assert "not the canonical form" in words(checked(own_run), "fail")


def test_a_certificate_without_masks_and_recipe_is_verified(own_run) -> None:
    (own_run / "certify" / "recipe.yaml").unlink()
    content = json.loads((own_run / "manifest.json").read_text())
    outputs = content["stages"]["certify"]["outputs"]
    content["stages"]["certify"]["outputs"] = [o for o in outputs if not o["path"].endswith(".yaml")]
    (own_run / "manifest.json").write_text(json.dumps(content))
    forge(own_run, mask_sha256=None, recipe_sha256=None)
    found = checked(own_run)
    assert found.status == "pass", words(found, "fail")


def test_a_name_in_a_certificate_that_leads_elsewhere(own_run) -> None:
    forge(own_run, points=PointsFile(name="../../secret", sha256="0" * 64))
    with pytest.raises(DeployError, check=lambda error: error.code == "path-outside"):
        checked(own_run)


def test_data_that_are_not_here_leave_the_answer_open(own_run) -> None:
    """The stored points are judged all the same."""
    for path in (own_run / "recipe.yaml", own_run / "certify" / "recipe.yaml"):
        path.write_text(path.read_text().replace("name: digits", "name: mnist"))
    listed = own_run / "manifest.json"
    listed.write_text(listed.read_text().replace('"name": "digits"', '"name": "mnist"'))
    forge(own_run, data="mnist", recipe_sha256=files.sha256(own_run / "certify" / "recipe.yaml"))
    found = verify(
        own_run / "certify" / "pruned.json",
        own_run,
        k=2,
        seed=0,
        machine=ExecutionConfig(device=torch.device("cpu"), data_root=own_run / "nowhere"),
        recorder=Silent(),
    )
    assert found.exit_code == 3
    assert "samples: the data cannot be read" in words(found, "inconclusive")
    assert "reproduce from their stored points" in words(found, "pass")


def test_the_manifest_is_read_without_a_lock(own_run) -> None:
    from s2ap_deploy.runs.folder import Run

    with Run.open(own_run, create=False, command="somebody at work"):
        assert checked(own_run).status == "pass"
    assert Manifest.load(own_run).commands[-1] == "somebody at work"


def test_files_alone_confirm_an_honest_run(own_run, files_in) -> None:
    before = files_in(own_run)
    path = own_run / "certify" / "pruned.json"
    found = verify_files(path, None)
    assert (found.status, found.scope, found.seed, found.attacked) == ("pass", "files", None, 0)
    assert {"certificate", "stage", "recipe", "points", "sparsity"} <= {check.name for check in found.checks}
    assert found.subjects == checked(own_run).subjects
    assert files_in(own_run) == before


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Set dotted keys (``__`` for a dot) of a certificate."""

    def change(content: dict[str, Any]) -> None:
        for dotted, value in values.items():
            *way, last = dotted.split("__")
            place = content
            for key in way:
                place = place[key]
            place[last] = value

    return change


def as_plus(content: dict[str, Any]) -> None:
    content |= {"protocol": "plus", "statement": "robust accuracy under AutoAttack plus (upper bound)"}


def as_plus_with_its_attacks(content: dict[str, Any]) -> None:
    as_plus(content)
    found = {row["name"]: row for row in content["attacks"]}
    left, rows = content["clean"]["k"], []
    for name in protocols.names("plus", 10):
        rows.append({"n_broken": 0, **found.get(name, {}), "name": name, "n_in": left, "seconds": 1.0})
        left -= rows[-1]["n_broken"]
    content["attacks"] = rows


def nothing_broken(content: dict[str, Any]) -> None:
    for row in content["attacks"]:
        row["n_broken"] = 0


def proven(content: dict[str, Any]) -> None:
    content["proven"] = Proven.of([], content["n"], method="wishes", tolerance=0.0).model_dump(mode="json")


def left_out(content: dict[str, Any]) -> None:
    """Leave the first sample out, as a certificate of fewer images would be."""
    old = Certificate.model_validate(content)
    kept = old.samples[1:]
    broken = {row.name: sum(each.broken_by == row.name for each in kept) for row in old.attacks}
    left, rows = sum(each.clean_prediction == each.label for each in kept), []
    for row in old.attacks:
        rows.append(row.model_copy(update={"n_in": left, "n_broken": broken[row.name]}))
        left -= broken[row.name]
    facts = {name: getattr(old, name) for name in type(old).model_fields}
    derived = ("samples", "statement", "n", "sample_ids_sha256", "clean", "robust", "per_class", "attacks")
    facts = {name: value for name, value in facts.items() if name not in derived}
    content |= Certificate.of(kept, attacks=rows, **facts).model_dump(mode="json")


REWRITINGS = {
    "eps": changed(threat__eps="0.505"),
    "norm": changed(threat__norm="L2"),
    "protocol": as_plus,
    "protocol and its attacks": as_plus_with_its_attacks,
    "n_broken": nothing_broken,
    "robust interval": changed(robust__interval=[0.0, 0.5]),
    "clean interval": changed(clean__interval=[0.4, 0.6]),
    "interval level": changed(robust__level=0.5),
    "statement": changed(statement="provably robust accuracy"),
    "sparsity": changed(subject__sparsity=0.99),
    "no sparsity": changed(subject__sparsity=None),
    "proofs": proven,
    "fewer samples": left_out,
    "attack seed": changed(attack_seed=99),
    "sample seed": changed(sample_seed=99),
    "data": changed(data="mnist"),
    "no recipe": changed(recipe_sha256=None),
    "network": changed(subject__checkpoint_sha256="0" * 64),
    "masks": changed(mask_sha256="0" * 64),
}


@pytest.mark.parametrize("rewriting", REWRITINGS)
def test_a_rewritten_certificate_that_everything_lists_is_refused(rewriting, own_run, s2ap) -> None:
    """Manifest, inputs and export report name the new file; what it says follows from nothing."""
    path, report = own_run / "certify" / "pruned.json", own_run / "export" / "report.json"
    before = files.sha256(path)
    content = json.loads(path.read_text())
    REWRITINGS[rewriting](content)
    files.write_json(path, content)
    report.write_text(report.read_text().replace(before, files.sha256(path)))
    relist(own_run)
    for command in (["gate", "--min-clean", 0, "--rule", "point"], ["verify", path, "--files"]):
        done = s2ap(*command, "--run", own_run)
        assert done.code in ((3,) if rewriting == "no recipe" else (1, 2)), done.out + done.err
    report = s2ap.json("report", own_run)
    assert report["problems"]
    assert report["status"] != "pass"


@pytest.mark.parametrize("damage", ["shorter", "header"])
def test_a_points_file_with_another_number_of_points(damage, own_run) -> None:
    old = Certificate.load(own_run / "certify" / "pruned.json")
    assert old.points is not None
    path = own_run / "certify" / old.points.name
    clean, attacked = load_points(path, old.points)
    if damage == "shorter":
        forge(own_run, points=save_points(path, clean[1:], attacked[1:]))
    else:
        path.write_bytes((3).to_bytes(8, "little") + b"no!")
        forge(own_run, points=PointsFile(name=path.name, sha256=files.sha256(path)))
    found = verify_files(own_run / "certify" / "pruned.json", None)
    assert [check.name for check in found.checks if check.status == "fail"] == ["points"]


def test_files_that_are_missing_leave_the_answer_open(own_run) -> None:
    (own_run / "certify" / "pruned-points.safetensors").unlink()
    found = verify_files(own_run / "certify" / "pruned.json", None)
    assert (found.status, found.exit_code) == ("inconclusive", 3)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([3], [0, 3]),  # of four bytes each
        ([1], [0, 2**60]),
        ([1], [-4, 0]),
        ([-1], [4, 0]),
        ([2**40, 2**40], [0, 4]),
        ([1], [0]),
    ],
)
def test_a_tensor_that_its_file_cannot_hold_is_none(shape, offsets, tmp_path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert tensor_names(path) == set()
