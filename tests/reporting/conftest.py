"""A verdict with one check of each answer and names that try to break out of every format."""

from __future__ import annotations

import pytest

from s2ap_deploy.gating.check import Check
from s2ap_deploy.gating.policy import Verdict

HOSTILE = (
    "x]]>&<b>\"'`|\\%0A::error::\n::error::pwned\r\x00\x1b[2J\ud800\u202e##[add-mask]\ufffe[a](http://b)@all"
)


@pytest.fixture(scope="session")
def hostile() -> str:
    """A file name that every format must defuse."""
    return HOSTILE


@pytest.fixture(scope="session")
def verdict() -> Verdict:
    floor = "robust accuracy under AutoAttack (upper bound)"
    missed = "robust accuracy: 10 of 200 = 5.0%; required 40.0%"
    worst = "drop of robust accuracy in the worst class"
    checks = (
        Check(name="file export/model.onnx", status="pass", words="file export/model.onnx is covered"),
        Check(name=floor, status="fail", words=missed, threshold=0.4, observed=0.05, bound=0.03),
        Check(name=f"file {HOSTILE}", status="inconclusive", words=f"file {HOSTILE}: nothing covers it"),
        Check(name=worst, status="inconclusive", words="too few samples"),
    )
    return Verdict.of(checks, "exact bounds")
