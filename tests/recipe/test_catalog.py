"""Recipes: shipped ones are valid, a slip is named with its place and the nearest valid key."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.data import datasets
from s2ap_deploy.errors import RecipeError, UsageError
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.recipe import catalog, field_types, keys, schema, sections
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.schema import Recipe

MINIMAL = """\
name: mine
model:
  arch: digits-conv
  checkpoint: model.pt
data:
  name: digits
threat:
  eps: 8/255
prune:
  sparsity: 0.9
"""


def changed(recipe: Any, values: Any) -> Recipe:
    content = recipe.model_dump()
    for key, value in values.items():
        keys.assign(content, key, value)
    return Recipe.model_validate(content)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        catalog.load(str(path), overrides=overrides)
    assert caught.value.exit_code == 2
    return caught.value.message.replace(str(path), "mine.yaml")


# --- shipped recipes ----------------------------------------------------------------------------------


CONTROLS = {"cifar10-resnet18-random-90", "cifar10-resnet18-rst-90"}  # nobody releases them


@pytest.mark.parametrize("name", catalog.names())
def test_every_shipped_recipe_is_valid_and_can_give_a_verdict(name) -> None:
    shipped = catalog.load(name)
    assert shipped.name == name
    assert shipped.description
    assert shipped.prune is not None
    assert shipped.prune.perturbs == METHODS[shipped.prune.method].learns
    assert (shipped.gate is None) == (name in CONTROLS)
    assert shipped.pretrain is not None
    assert shipped.model.arch in registry.names()
    text = (catalog.shipped() / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"s2ap-deploy run {name}" in text


def test_descriptions_tell_the_recipes_apart() -> None:
    described = [catalog.load(name).description for name in catalog.names()]
    assert len(set(described)) == len(described)
    assert max(map(len, described)) <= 100


def test_there_is_a_recipe_for_every_data_set_method_granularity_and_for_int8() -> None:
    loaded = [catalog.load(name) for name in catalog.names()]
    assert {recipe.data.name.partition(":")[0] for recipe in loaded} == {
        each.partition(":")[0] for each in field_types.DATA_SETS
    }
    assert field_types.DATA_SETS == datasets.NAMES
    sections = [recipe.prune for recipe in loaded if recipe.prune is not None]
    assert {section.method for section in sections} == set(METHODS)
    assert {section.granularity for section in sections} >= {"weight", "channel", "2:4"}
    assert any(recipe.export.int8 for recipe in loaded)
    assert not catalog.load("ci-gate").certify.full


@pytest.mark.parametrize("percent", [90, 95, 99])
def test_the_cifar_recipes_follow_the_published_schedule(percent) -> None:
    shipped = catalog.load(f"cifar10-resnet18-hydra-s2ap-{percent}")
    assert shipped.prune.sparsity == percent / 100
    assert shipped.threat.eps == "8/255"
    trades = sections.ObjectiveSection(loss="trades", beta=6.0)
    assert shipped.prune.search == sections.SearchSection(objective=trades)
    # The fine-tuning is HYDRA's, with AWP as S2AP's paper has it.
    assert shipped.prune.finetune == sections.FinetuneSection(objective=trades, awp_gamma=0.005)
    assert changed(shipped, schema.preset("published")) == shipped


# --- defaults and presets -----------------------------------------------------------------------------


def test_defaults_are_the_published_schedule_with_adversarial_training(file) -> None:
    prune = catalog.load(str(file)).prune
    assert (prune.search.epochs, prune.search.learning_rate, prune.search.momentum) == (20, 0.1, 0.9)
    assert (prune.finetune.epochs, prune.finetune.learning_rate, prune.finetune.batch_size) == (
        100,
        0.01,
        128,
    )
    assert prune.search.objective == sections.ObjectiveSection(
        loss="at", attack_steps=None, step_size=None, beta=None, replays=4
    )
    assert prune.search.weight_decay == 0


@pytest.mark.parametrize("name", list(schema.PRESETS))
def test_a_preset_makes_a_recipe(name, file) -> None:
    """The published ones name every departure of docs/deviations.md that has an option."""
    prune = changed(catalog.load(str(file)), schema.preset(name)).prune
    published = name.startswith("published-")
    assert prune.perturbs is not published
    assert (prune.search.bn_affine, prune.search.cosine) == (
        ("learn", "epoch") if published else ("rest", "step")
    )
    assert prune.covers_classes is not published
    assert (prune.search.weight_decay > 0) is published
    if published:
        assert prune.search.recalibration == "none"
        assert prune.search.objective == prune.finetune.objective
        assert prune.search.objective.start == (
            "gaussian-unclamped" if prune.method == "hydra" else "uniform"
        )


def test_a_section_that_sets_one_key_keeps_the_other_defaults(file) -> None:
    assert catalog.load(str(file), overrides=["prune.finetune.epochs=7"]).prune.finetune.learning_rate == 0.01


def test_nothing_is_added_to_training_unless_asked_for(file) -> None:
    tune = catalog.load(str(file)).prune.finetune
    assert (tune.awp_gamma, tune.awp_warmup_epochs, tune.distillation.weight) == (0, 0, 0)
    asked = ["prune.finetune.awp_gamma=0.01", "prune.finetune.distillation={weight: 0.5, temperature: 4}"]
    tune = catalog.load(str(file), overrides=asked).prune.finetune
    assert (tune.awp_gamma, tune.distillation.weight, tune.distillation.temperature) == (0.01, 0.5, 4)


@pytest.mark.parametrize(("epochs", "warmup"), [(20, 5), (5, 1), (1, 0), (8, 2)])
def test_warm_up_is_a_quarter_of_the_search(file, epochs, warmup) -> None:
    assert catalog.load(str(file), overrides=[f"prune.search.epochs={epochs}"]).prune.warmup == warmup


def test_the_quick_preset_shortens_the_schedule_and_nothing_else(file) -> None:
    full = catalog.load(str(file), overrides=["prune.warmup_epochs=7", "prune.sparsity=0.99"])
    quick = changed(full, schema.preset("quick"))
    assert (quick.prune.search.epochs, quick.prune.finetune.epochs, quick.prune.warmup) == (5, 5, 1)
    restored = changed(quick, schema.preset("published"))
    assert restored.prune.model_copy(update={"warmup_epochs": 7}) == full.prune
    assert restored.model_copy(update={"prune": full.prune}) == full


def test_an_unknown_preset() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "preset-unknown"):
        schema.preset("fast")


# --- finding a recipe ---------------------------------------------------------------------------------


def test_a_suffix_or_a_separator_makes_a_path(file, monkeypatch) -> None:
    monkeypatch.chdir(file.parent)
    assert catalog.load("mine.yaml").name == catalog.load("./mine.yaml").name == "mine"
    (file.parent / "demo").write_text(MINIMAL)
    assert catalog.load("demo").name == "demo"
    assert catalog.load("./demo").name == "mine"


@pytest.mark.parametrize(
    ("reference", "code"),
    [("dmeo", "recipe-unknown"), ("absent.yaml", "recipe-missing"), (".", "recipe-not-a-file")],
)
def test_a_recipe_that_is_not_there(reference, code, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, check=lambda error: error.code == code):
        catalog.load("./" if reference == "." else reference)


@pytest.mark.parametrize("text", ["", "- a\n", "name\n"])
def test_a_document_that_is_no_mapping(tmp_path, text) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert "it must be a mapping" in refused(tmp_path / "mine.yaml")


# --- slips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sparsity: 0.9", "sparcity: 0.9", "line 10: unknown key prune.sparcity; did you mean prune.spars"),
        ("name: mine", "name: mine\nsparsity: 0.9", "line 2: unknown key sparsity; did you mean prune.spars"),
        ("name: mine", "name: mine\nepochs: 9", "line 2: unknown key epochs; did you mean pretrain.epochs"),
        ("eps: 8/255", "eps: 8/255\n  xyz: 1", "line 9: unknown key threat.xyz; threat has norm, eps"),
        ("name: mine", "name: mine\nxyz: 1", "line 2: unknown key xyz; a recipe has name, description, seed"),
        ("  sparsity: 0.9", "  s2ap: true", "prune: sparsity is missing"),
        ("name: mine\n", "", "mine.yaml: name is missing"),
        ("sparsity: 0.9", "sparsity: 1.0", "line 10: prune.sparsity: must be less than 1 (here: 1.0)"),
        ("sparsity: 0.9", "sparsity: -0.1", "prune.sparsity: must be greater than 0 (here: -0.1)"),
        ("sparsity: 0.9", "sparsity: abc", "prune.sparsity: must be a valid number (here: 'abc')"),
        ("sparsity: 0.9", "sparsity: '0.9'", "prune.sparsity: must be a valid number (here: '0.9')"),
        ("sparsity: 0.9", "sparsity: .nan", "prune.sparsity: must be"),
        ("sparsity: 0.9", "sparsity: true", "prune.sparsity: must be a valid number (here: True)"),
        ("eps: 8/255", "eps: 0", "line 8: threat.eps: must be positive, not 0"),
        ("eps: 8/255", "eps: 8/0", "line 8: threat.eps: not a number or a fraction"),
        ("eps: 8/255", "norm: Linff\n  eps: 1", "threat.norm: must be Linf or L2 or L1; did you mean Linf?"),
        ("sparsity: 0.9", "sparsity: 0.9\n  method: hidra", "or pwoa; did you mean hydra? (here: 'hidra')"),
        ("name: digits", "name: digit", "data.name: must be one of digits, mnist, cifar10, cifar100, svhn, "),
        ("name: digits", "name: 'imagefolder:'", "data.name: must be one of"),
        ("name: digits", "name: digits\n  size: [1, 8]", "data.size.2 is missing"),
        ("sparsity: 0.9", "sparsity: 0.9\n  search: 5", "prune.search: is a section and holds keys"),
        ("sparsity: 0.9", "sparsity: 0.9\n  gamma: 0", "prune: gamma 0 disables S2AP"),
        ("sparsity: 0.9", "sparsity: 0.9\n  warmup_epochs: 20", "warmup_epochs 20 leaves S2AP none of the"),
        ("name: mine", "name: mine\ngate: {rule: point}", "line 2: gate: a gate needs min_robust,"),
        ("name: mine", "name: mine\nseed: 1.5", "line 2: seed: must be a valid integer (here: 1.5)"),
        ("name: mine", "name: mine\nexport: {opset: 11}", "export.opset: must be greater than or equal"),
    ],
)  # fmt: skip
def test_a_slip_is_named_with_its_line_and_key(file, old, new, message) -> None:
    assert old in MINIMAL
    file.write_text(MINIMAL.replace(old, new))
    found = refused(file)
    assert message in found
    assert found.startswith("mine.yaml")
    assert "\n" not in found


def test_several_slips_are_told_together_up_to_five(file) -> None:
    file.write_text(MINIMAL + "".join(f"  wrong{i}: 1\n" for i in range(7)))
    lines = refused(file).splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [f"mine.yaml, line {n}" for n in range(11, 16)]
    assert lines[5:] == ["and 2 more"]


@pytest.mark.parametrize(
    "arch", ["evil.module:factory", "file.py:factory", "file.py", "../up", "/etc/x", "a/b/c", ""]
)
def test_import_paths_are_for_the_command_line_only(file, arch) -> None:
    file.write_text(MINIMAL.replace("arch: digits-conv", f"arch: '{arch}'"))
    assert "line 3: model.arch: an architecture in a recipe is a registered name" in refused(file)
    assert "only on the command line" in refused(file)


@pytest.mark.parametrize("arch", ["cifar-resnet18", "torchvision/resnet50", "my_plugin.net+v2"])
def test_names_are_accepted(file, arch) -> None:
    assert catalog.load(str(file), overrides=[f"model.arch={arch}"]).model.arch == arch


def test_a_recipe_never_executes_code(tmp_path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "mine.yaml"
    for attack in (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"!!python/object/new:os.system ['touch {marker}']",
        f"!!python/object/apply:subprocess.check_call [[touch, {marker}]]",
    ):
        path.write_text(MINIMAL + f"description: {attack}\n")
        assert "is not allowed" in refused(path)
        assert "is not allowed" in refused(path, f"description={attack}")
    assert not marker.exists()


# --- overrides ----------------------------------------------------------------------------------------


def test_overrides_apply_in_order_and_reach_optional_sections(file) -> None:
    loaded = catalog.load(
        str(file),
        overrides=[
            "prune.sparsity=0.5", "prune.sparsity=0.95", "pretrain.epochs=3", "data.size=[1, 8, 8]",
            "description=a=b", "threat={norm: L2, eps: 1/2}", "certify.n=null",
        ],
    )  # fmt: skip
    assert loaded.prune.sparsity == 0.95
    assert loaded.pretrain is not None
    assert loaded.pretrain.epochs == 3
    assert loaded.data.size == (1, 8, 8)
    assert loaded.description == "a=b"
    assert (loaded.threat.norm, loaded.threat.eps) == ("L2", "1/2")
    assert loaded.certify.n is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.sparcity=0.9", "--set prune.sparcity=0.9: unknown key prune.sparcity; did you mean"),
        ("bogus.key=1", "--set bogus.key=1: unknown key bogus; a recipe has"),
        ("prune.sparsity=2", "--set prune.sparsity=2: prune.sparsity: must be less than 1 (here: 2)"),
        ("model=null", "--set model=null: model: is a section"),
        ("prune={sparsity: 0.9, x: 1}", "--set prune={sparsity: 0.9, x: 1}: unknown key prune.x"),
        ("prune.sparsity.x=1", "--set prune.sparsity.x=1: prune.sparsity is a value, not a section"),
        ("prune.sparsity", "--set prune.sparsity: write it as key.path=value"),
        ("=1", "--set =1: write it as key.path=value"),
        ("prune..x=1", "--set prune..x=1: write it as key.path=value"),
        ("seed=[1", "--set seed=[1, line 1: expected"),
        ("seed=*x", "the alias *x is not allowed"),
        ("prune.search.objective={loss: fast, attack_steps: 10}", "loss fast has no attack_steps: leave"),
        ("pretrain.objective={loss: free, attack_steps: 7}", "loss free has no attack_steps: leave"),
        ("prune.search.objective.replays=0", "objective.replays: must be greater than or equal to 1"),
        ("prune.finetune={epochs: 5, awp_gamma: 0.01, awp_warmup_epochs: 5}", "AWP none of the 5 epochs"),
        ("prune.finetune.awp_gamma=-1", "prune.finetune.awp_gamma: must be greater than or equal to 0"),
        ("prune.finetune.distillation.weight=1.5", "distillation.weight: must be less than or equal to 1"),
        ("prune.finetune.distillation.temperature=0", "distillation.temperature: must be greater than 0"),
        ("pretrain.distillation.weight=0.5", "unknown key pretrain.distillation"),
    ],
)  # fmt: skip
def test_a_slip_in_an_override_names_the_override(file, override, message) -> None:
    assert message in refused(file, override)


# --- dump ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalog.names())
def test_shipped_recipes_survive_dump_and_load(name, tmp_path) -> None:
    original = catalog.load(name)
    (tmp_path / "r.yaml").write_text(catalog.dump(original))
    assert catalog.load(str(tmp_path / "r.yaml")) == original


@settings(deadline=None, max_examples=80)
@given(
    eps=st.sampled_from(["8/255", "0.1", "1e-2", ".5", "0.50", "1"]),
    sparsity=st.floats(1e-9, 1, exclude_max=True),
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    seed=st.integers(0, 2**31),
)
def test_dump_and_load_keep_every_value(tmp_path_factory, eps, sparsity, text, seed) -> None:
    content: dict[str, Any] = catalog.load("demo").model_dump()
    content |= {"description": text, "seed": seed, "threat": {"eps": eps}}
    content["prune"]["sparsity"] = sparsity
    original = Recipe.model_validate(content)
    path = tmp_path_factory.mktemp("dump") / "r.yaml"
    path.write_text(catalog.dump(original), encoding="utf-8")
    assert catalog.load(str(path)) == original
    assert original.threat.eps == eps


def test_the_dump_reads_in_the_order_of_the_pipeline() -> None:
    keys = re.findall(r"^(\w+):", catalog.dump(catalog.load("demo")), flags=re.MULTILINE)
    assert keys == list(Recipe.model_fields)
