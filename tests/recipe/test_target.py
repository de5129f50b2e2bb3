"""Targets: shipped ones are valid, files of others run nothing, a flag beats a target beats a recipe."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.errors import DeployError, RecipeError, UsageError
from s2ap_deploy.recipe import catalog, target
from s2ap_deploy.recipe.schema import ExportSection, Recipe
from s2ap_deploy.recipe.target import Target

ROOT = Path(__file__).parents[2]
KNOWN = ExportSection.model_fields
NOT_RUN = {"microcontroller", "tensorrt-2-4"}


def written(folder: Path, text: str) -> str:
    path = folder / "board.yaml"
    path.write_text(text)
    return str(path)


def section(**changes: Any) -> dict[str, Any]:
    return ExportSection.model_validate(changes).model_dump()


# --- shipped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", target.names())
def test_every_shipped_target_is_valid_and_says_what_its_runtime_does(name) -> None:
    found = target.find(name)
    assert found.target.name == name
    assert found.target.notes
    assert len(found.sha256) == 64
    assert f"--target {name}" in Path(found.path).read_text()
    if name in NOT_RUN:
        assert any("not run" in note.lower() for note in found.target.notes)


@pytest.mark.parametrize("name", target.names())
def test_every_shipped_target_takes_its_own_settings(name) -> None:
    wanted = target.find(name).target
    filled = target.fill({}, wanted, KNOWN, "weight")
    limits = {f"max_{budget}": 1 for budget in wanted.requires.budgets}
    target.check(wanted, section(**filled, **limits))


def test_the_wheel_and_the_source_archive_take_the_folder_along() -> None:
    """As for recipes: the folder is shipped whole, and is where :func:`target.shipped` looks."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    inside = build["wheel"]["force-include"]["export"]
    assert inside == "s2ap_deploy/shipped/export"
    assert "export" in build["sdist"]["include"]
    assert target.shipped() == ROOT / "export" / "targets"
    assert {path.suffix for path in target.shipped().iterdir()} == {".yaml"}


def test_an_installed_package_finds_its_own_copy(tmp_path, monkeypatch) -> None:
    package = tmp_path / "site" / "s2ap_deploy"
    own = package / "shipped" / "export" / "targets"
    own.mkdir(parents=True)
    monkeypatch.setattr(target, "__file__", str(package / "recipe" / "target.py"))
    assert target.shipped() == own


# --- files of others ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [("arm64", "onnxruntime-arm64"), ("tensorrt", "tensorrt-2-4"), ("opnevino", "openvino")],
)
def test_a_slip_is_answered_with_the_nearest_target(name, meant) -> None:
    with pytest.raises(RecipeError, match=meant) as caught:
        target.find(name)
    assert caught.value.code == "target-unknown"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\ndescription: d\ndtyp: int8\n", "line 3: unknown key dtyp; did you mean dtype?"),
        ("name: x\ndescription: d\nbatch: 0\n", "line 3: batch: must be dynamic or a number"),
        ("name: x\ndescription: d\nbatch: true\n", "line 3: batch: must be dynamic or a number"),
        ("name: x\ndescription: d\nopset: 16\n", "line 3: opset"),
        ("name: x\ndescription: d\nlayout: NHWC\n", "line 3: layout: must be NCHW"),
        ("name: x\ndescription: d\ngranularity: '4:2'\n", "line 3: granularity"),
        ("name: x\ndescription: d\nbudgets:\n  bytes: 1.5\n", "line 4: budgets.bytes"),
        ("name: x\ndescription: d\nbudgets:\n  byte: 1\n", "did you mean budgets.bytes?"),
        ("name: x\ndescription: d\nbudgets:\n  latency_ms: -1\n", "line 4: budgets.latency_ms"),
        ("name: x\ndescription: d\ndtype: int8\nrequires:\n  dtypes: [float32]\n", "not among requires"),
        ("name: x\ndescription: d\nrequires:\n  compact: false\n", "compact is not what requires"),
        ("name: x\ndescription: d\nfoo: 1\n", "a target has name"),
        ("description: d\n", "name is missing"),
        ("- name\n", "is not a target"),
        ("name: !!python/object/apply:os.system [id]\n", "line 1"),
        ("name: &a x\ndescription: *a\n", "line 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, text, words) -> None:
    with pytest.raises(RecipeError) as caught:
        target.find(written(tmp_path, text))
    assert words in caught.value.message
    assert "board.yaml" in caught.value.message


@pytest.mark.parametrize("name", ["nowhere.yaml", "some/where", ".", "./", "/dev/null/x.yaml", "", "none"])
def test_what_is_not_there_is_an_error_of_ours(name) -> None:
    with pytest.raises(DeployError) as caught:
        target.find(name)
    assert caught.value.exit_code == 2


@given(st.text(max_size=200))
def test_garbage_never_ends_in_anything_but_an_error_of_ours(text) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(text, encoding="utf-8", errors="ignore")
        with pytest.raises(DeployError):
            target.find(str(path))


# --- flag before target before recipe -----------------------------------------------------------------


def test_a_flag_beats_the_target() -> None:
    wanted = target.find("opencv").target
    filled = target.fill({"opset": 21, "encoding": None}, wanted, KNOWN, "weight")
    assert (filled["opset"], filled["encoding"], filled["batch"]) == (21, "dense", 1)


@pytest.mark.parametrize("said", [{"values": "float16"}, {"int8": False}])
def test_int8_and_the_type_of_values_are_one_choice(said) -> None:
    filled = target.fill(said, target.find("microcontroller").target, KNOWN, "weight")
    assert {key: filled.get(key) for key in said} == said
    assert filled.get("int8") is not True


def test_a_target_weighs_what_auto_weighs(tmp_path) -> None:
    text = "name: board\ndescription: folds nothing\ncost: {load_ms: 10, memory: 0.5, inference_ms: 20000}\n"
    found = target.find(written(tmp_path, text)).target
    filled = section(**target.fill({}, found, KNOWN, "weight"))
    assert filled["cost"] == {"load_ms": 10, "memory": 0.5, "inference_ms": 20000}
    assert target.fill({"cost": {"memory": 1.0}}, found, KNOWN, "weight")["cost"] == {"memory": 1.0}
    weighed = {
        name: target.find(name).target.cost.memory for name in ("onnxruntime-x86", "onnxruntime-arm64")
    }
    assert weighed["onnxruntime-arm64"] == 5 * weighed["onnxruntime-x86"]


def test_only_channels_are_aligned() -> None:
    wanted = target.find("onnxruntime-x86").target
    assert target.fill({}, wanted, KNOWN, "channel")["align"] == 8
    assert "align" not in target.fill({}, wanted, KNOWN, "weight")
    assert "align" not in target.fill({"compact": False}, wanted, KNOWN, "channel")
    assert target.fill({"align": 2}, wanted, KNOWN, "channel")["align"] == 2


def test_a_recipe_that_names_a_target_gets_what_it_leaves_out() -> None:
    content = catalog.load("demo").model_dump()
    content["export"] = {"target": "opencv", "opset": 22}
    found = Recipe.model_validate(content).export
    assert (found.opset, found.encoding, found.batch, found.target) == (22, "dense", 1, "opencv")
    again = Recipe.model_validate(Recipe.model_validate(content).model_dump())
    assert again.export == found


def test_a_recipe_that_was_written_down_needs_no_target_file_to_load(tmp_path) -> None:
    path = written(tmp_path, "name: board\ndescription: d\nopset: 19\n")
    content = catalog.load("demo", overrides=[f"export={{target: {path}}}"]).model_dump()
    assert content["export"]["opset"] == 19
    Path(path).unlink()
    assert Recipe.model_validate(content).export.opset == 19


def test_none_takes_a_target_back() -> None:
    assert ExportSection(target="none").target is None
    content = catalog.load("demo").model_dump()
    content["export"]["target"] = "none"
    assert Recipe.model_validate(content).export == catalog.load("demo").export


# --- what a target cannot take ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "code", "hint"),
    [
        ("microcontroller", {}, "target-dtype-unsupported", "--int8"),
        ("microcontroller", {"values": "int8"}, "target-dtype-unsupported", "--int8"),
        ("microcontroller", {"int8": True, "max_bytes": None}, "target-budget-missing", "--max-bytes"),
        ("openvino", {"encoding": "coo"}, "target-encoding-unsupported", "--encoding"),
        ("opencv", {"encoding": "ef"}, "target-encoding-unsupported", "--encoding"),
        ("tensorrt-2-4", {}, "target-compact-unsupported", "--no-compact"),
    ],
)
def test_a_contradiction_is_an_error_with_a_hint(name, changes, code, hint) -> None:
    asked = section(**{"encoding": "dense", "max_bytes": 9, **changes})
    with pytest.raises(UsageError, check=lambda error: error.code == code) as caught:
        target.check(target.find(name).target, asked)
    assert hint in (caught.value.hint or "")


def test_limits_of_the_options_come_before_the_targets() -> None:
    board = Target.model_validate(
        {"name": "b", "description": "d", "budgets": {"bytes": 10, "latency_ms": 2.5}}
    )
    assert target.budgets(board, section()) == {"bytes": 10, "macs": None, "latency_ms": 2.5}
    assert target.budgets(board, section(max_bytes=20, max_macs=5))["bytes"] == 20
    assert target.budgets(None, section(max_macs=5)) == {"bytes": None, "macs": 5, "latency_ms": None}
