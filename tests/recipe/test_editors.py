"""The JSON schema for editors accepts what the tool accepts, and marks what it refuses."""

from typing import Any

import jsonschema
import pytest

from s2ap_deploy.recipe import catalog, yaml_document
from s2ap_deploy.recipe.catalog import json_schema


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", catalog.names())
def test_every_shipped_recipe_fits_as_it_is_written_and_resolved(validator, name) -> None:
    validator.validate(yaml_document.read(catalog.path_of(name)).content)
    validator.validate(catalog.load(name).model_dump(mode="json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"prnue": {}},
        {"prune": {"sparcity": 0.9}},
        {"prune": {"sparsity": 1.5}},
        {"threat": {"eps": -1}},
        {"seed": "x"},
    ],
)
def test_slips_are_marked(validator, changes) -> None:
    content = yaml_document.read(catalog.path_of("demo")).content | changes
    assert not validator.is_valid(content)


def test_an_extending_recipe_needs_its_name_alone(validator) -> None:
    assert validator.is_valid({"extends": "demo", "name": "mine"})
    assert not validator.is_valid({"extends": "demo"})
    assert not validator.is_valid({"name": "mine"})
