"""Print the slowest tests, and how many passed, failed and were skipped; fail on a skip where ../shared is.

Tests of the reports after ``--may-skip`` need tools that a machine may lack.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SLOWEST = 20


def main(reports: list[str]) -> int:
    passed = failed = 0
    skipped: list[str] = []
    optional: list[str] = []
    noted = skipped
    seconds: dict[str, float] = {}
    for report in reports:
        if report == "--may-skip":
            noted = optional
            continue
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            seconds[name] = float(case.get("time", 0))
            outcomes = {child.tag: child.get("message", "") for child in case}
            if "failure" in outcomes or "error" in outcomes:
                failed += 1
            elif "skipped" in outcomes:
                noted.append(f"{name}: {outcomes['skipped']}")
            else:
                passed += 1
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:SLOWEST]:
        print(f"slow: {seconds[name]:6.1f} s {name}")
    for skip in (*skipped, *optional):
        print(f"skipped: {skip}")
    counts = f"{passed} passed, {failed} failed, {len(skipped)} skipped"
    print(f"{counts}, {len(optional)} skipped for want of optional tools")
    complete = (Path(__file__).resolve().parents[2] / "shared").is_dir()
    if skipped and complete:
        print("../shared is present, so no test may be skipped")
    return 1 if failed or not passed or (skipped and complete) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
