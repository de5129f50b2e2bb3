"""JUnit XML: valid for Jenkins, and nothing that a name can break out of."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.reporting.ci_formats import junit

xmlschema = pytest.importorskip("xmlschema")
XSD = Path(__file__).parent / "schemas" / "junit-10.xsd"


@pytest.fixture(scope="module")
def schema() -> object:
    return xmlschema.XMLSchema(str(XSD))


def test_a_verdict_is_valid_and_complete(schema, verdict) -> None:
    text = junit(verdict)
    schema.validate(text)
    (suite,) = ET.fromstring(text.encode())
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["4", "1", "2", "0"]
    cases = suite.findall("testcase")
    assert [[child.tag for child in case] for case in cases] == [
        ["system-out"], ["failure"], ["error"], ["error"]
    ]  # fmt: skip
    assert cases[0].get("classname") == "gate.file"
    assert cases[3].get("classname") == "gate.class-drop"
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.get("message") == failure.text == verdict.checks[1].message
    values = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert values == {"status": "fail", "exit_code": "1", "statistics": "exact bounds"}


def test_a_verdict_without_checks(schema) -> None:
    schema.validate(junit(Verdict.of([])))


@settings(deadline=None, max_examples=60)
@given(
    st.text(st.characters(exclude_categories=()), max_size=40),
    st.sampled_from(["pass", "fail", "inconclusive"]),
)
def test_whatever_stands_in_a_name_the_document_has_one_case(text, status) -> None:
    root = ET.fromstring(
        junit(Verdict.of([Check(rule="gate", name=text, status=status, message=text)])).encode()
    )
    assert len(root.findall("./testsuite/testcase")) == len(list(root.iter("testcase"))) == 1
