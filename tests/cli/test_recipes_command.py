"""``recipes``: a list by data, one recipe as written or resolved, the schema, and the short forms."""

import json
import re

import pytest

from s2ap_deploy.recipe import catalog


def test_the_list_names_every_recipe_once_below_its_data(s2ap) -> None:
    done = s2ap.ok("recipes")
    lines = done.out.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(named) == sorted(catalog.names())
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings == ["digits", "mnist", "cifar10", "cifar100", "svhn", "imagefolder"]
    assert lines.index("  " + next(line for line in lines if "  demo " in line).strip()) < lines.index(
        "mnist"
    )
    assert s2ap("recipes", "list").out == done.out


def test_the_list_as_one_object(s2ap) -> None:
    for words in (["recipes", "--json"], ["recipes", "list", "--json"]):
        told = json.loads(s2ap(*words).out)
        assert sorted(told) == sorted(catalog.names())
        assert told["demo"] == catalog.load("demo").description


@pytest.mark.parametrize("words", [["recipes", "demo"], ["recipes", "show", "demo"]])
def test_a_recipe_is_shown_as_it_was_written(s2ap, words, tmp_path) -> None:
    shown = s2ap.ok(*words).out
    assert shown == catalog.path_of("demo").read_text()
    (tmp_path / "mine.yaml").write_text(shown)
    assert s2ap("recipes", tmp_path / "mine.yaml").out == shown


def test_resolved_it_says_where_every_value_comes_from(s2ap, tmp_path) -> None:
    done = s2ap.ok("recipes", "show", "cifar10-resnet18-2-4", "--resolved", "--set", "seed=3")
    assert "--set seed=3" in done.out
    assert "cifar10-resnet18-2-4.yaml, line" in done.out
    assert "cifar10-resnet18-hydra-s2ap-90.yaml, line" in done.out
    (tmp_path / "r.yaml").write_text(done.out)
    assert catalog.load(str(tmp_path / "r.yaml")) == catalog.load(
        "cifar10-resnet18-2-4", overrides=["seed=3"]
    )
    told = json.loads(s2ap("recipes", "show", "demo", "--resolved", "--json").out)
    assert told["recipe"]["name"] == "demo"
    assert told["sources"]["prune.sparsity"].startswith("demo.yaml, line")


def test_an_override_alone_shows_what_would_run(s2ap) -> None:
    done = s2ap("recipes", "show", "demo", "--set", "prune.sparsity=0.5")
    assert "sparsity: 0.5\n" in done.out
    assert "#" not in done.out


# What docs/results.md has figures of, at the settings of the recipe, or of a shortened one that says so.
MEASURED = {"demo", "demo-quick", "mnist", "mnist-harp-s2ap-99"}


@pytest.mark.parametrize("name", catalog.names())
def test_a_recipe_that_nobody_measured_says_so(name, s2ap) -> None:
    head = s2ap("recipes", "show", name).out.partition("\nname:")[0]
    assert (re.search("w(as|ere) not measured", head) is not None) == (name not in MEASURED)


def test_the_schema_is_json(s2ap) -> None:
    schema = json.loads(s2ap("recipes", "schema").out)
    assert "extends" in schema["properties"]
    assert schema["$schema"].endswith("2020-12/schema")
