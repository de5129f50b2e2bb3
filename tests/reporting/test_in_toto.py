"""The in-toto statement: its layout is the framework's, and it says no more than the certificate does."""

import json
from typing import Any

import jsonschema
import pytest

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.reporting.ci_formats import STATEMENT_TYPE, statement

# What spec/v1/statement.md of the in-toto Attestation Framework says, written down as a schema.
STATEMENT_V1 = {
    "type": "object",
    "required": ["_type", "subject", "predicateType"],
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["digest"],
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "digest": {
                        "type": "object",
                        "minProperties": 1,
                        "properties": {"sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
                        "additionalProperties": {"type": "string"},
                    },
                },
            },
        },
        "predicateType": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9+.-]*:.+$"},
        "predicate": {"type": "object"},
    },
}
FILES = [("finetune/model.safetensors", "a" * 64), ("export/model.onnx", "b" * 64)]


@pytest.fixture
def certificate(make_certificate) -> Certificate:
    """Of four samples, two stand."""
    found: Certificate = make_certificate([None, None, "apgd-ce", "clean"], recipe_sha256="d" * 64)
    return found


def test_the_layout_is_the_frameworks(certificate) -> None:
    found = json.loads(json.dumps(statement(certificate, subjects=FILES, verification={"seed": 1})))
    jsonschema.validate(found, STATEMENT_V1)
    assert found["_type"] == STATEMENT_TYPE
    assert [(each["name"], each["digest"]["sha256"]) for each in found["subject"]] == FILES
    names = [each["name"] for each in found["subject"]]
    assert len(set(names)) == len(names), "names are unique within subject"


def test_it_carries_the_result_and_what_binds_it(certificate) -> None:
    predicate: dict[str, Any] = statement(certificate, subjects=FILES)["predicate"]
    assert predicate["certificate"]["sha256"] == certificate.sha256
    assert predicate["formalGuarantee"] is False
    assert predicate["result"]["statement"] == "robust accuracy under AutoAttack (upper bound)"
    assert predicate["result"]["robust"]["k"] == 2
    assert predicate["result"]["threat"] == {"norm": "Linf", "eps": "0.1"}
    assert predicate["result"]["sample_ids_sha256"] == certificate.sample_ids_sha256
    assert predicate["result"]["recipe_sha256"] == "d" * 64
    assert "samples" not in predicate["result"]
    assert "verification" not in predicate


def test_nothing_to_speak_of_is_refused(certificate) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "certificate-without-file"):
        statement(certificate, subjects=[])
