"""A verdict as JUnit XML, which Jenkins, GitLab and most CI systems show as tests.

The dialect is that of Jenkins' xUnit plugin (``junit-10.xsd``): one test case per check. A failed check is
a ``failure``, an inconclusive one an ``error``, because a ``skipped`` test would count as passed.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from s2ap_deploy.evaluation.statements import plain
from s2ap_deploy.gating.check import Check, Verdict

SUITE = "s2ap-deploy gate"


def junit(verdict: Verdict) -> str:
    """Render the document. It holds no time, so that equal verdicts give equal bytes."""
    statuses = [check.status for check in verdict.checks]
    counts = {
        "tests": str(len(statuses)),
        "failures": str(statuses.count("fail")),
        "errors": str(statuses.count("inconclusive")),
    }
    root = ET.Element("testsuites", {"name": SUITE, **counts})
    suite = ET.SubElement(root, "testsuite", {"name": SUITE, **counts, "skipped": "0"})
    properties = ET.SubElement(suite, "properties")
    facts = {"status": verdict.status, "exit_code": str(verdict.exit_code), "statistics": verdict.statistics}
    for name, value in facts.items():
        ET.SubElement(properties, "property", {"name": name, "value": plain(value)})
    for check in verdict.checks:
        _add_case(suite, check)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _add_case(suite: ET.Element, check: Check) -> None:
    message = plain(check.message)
    case = ET.SubElement(suite, "testcase", {"name": plain(check.name), "classname": f"gate.{check.rule}"})
    if check.status == "pass":
        ET.SubElement(case, "system-out").text = message
        return
    kind = "failure" if check.status == "fail" else "error"
    ET.SubElement(case, kind, {"type": check.status, "message": message}).text = message
