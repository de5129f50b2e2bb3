"""JSON schema of recipes, for completion and checks in editors."""

from __future__ import annotations

from typing import Any

from s2ap_deploy.recipe.extends import KEY, OWN
from s2ap_deploy.recipe.schema import Recipe

_RADIUS = [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]
_ABSENT: dict[str, list[dict[str, Any]]] = {"eps": [], "step_size": [{"type": "null"}]}
_RADII = (("ThreatModel", "eps"), ("ObjectiveSection", "step_size"))  # 0.1 is as good as "0.1"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe file.

    A recipe that ``extends`` another one requires only its name.
    """
    schema = Recipe.model_json_schema()
    required = schema.pop("required", [])
    described = "A shipped recipe's name, or a path beside this file: what is left out here comes from there."
    schema["properties"] = {KEY: {"type": "string", "description": described}, **schema["properties"]}
    for where, key in _RADII:
        schema["$defs"][where]["properties"][key] |= {"anyOf": [*_RADIUS, *_ABSENT[key]]}
        schema["$defs"][where]["properties"][key].pop("type", None)
    own = [key for key in required if key in OWN]
    schema["if"] = {"required": [KEY]}
    schema["then"] = {"required": own}
    schema["else"] = {"required": required}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
