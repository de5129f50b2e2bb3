"""A verdict with one check of each answer and names that try to break out of every format."""

import pytest

from s2ap_deploy.gating.check import Check, Verdict

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
        Check(
            rule="file", name="file a.onnx", status="pass", message="file a.onnx is covered", path="a.onnx"
        ),
        Check(
            rule="robust-accuracy",
            name=floor,
            status="fail",
            message=missed,
            threshold=0.4,
            observed=0.05,
            bound=0.03,
        ),
        Check(
            rule="file",
            name=f"file {HOSTILE}",
            status="inconclusive",
            message=f"file {HOSTILE}: nothing covers it",
            path=HOSTILE,
        ),
        Check(rule="class-drop", name=worst, status="inconclusive", message="too few samples"),
    )
    return Verdict.of(checks, "exact bounds")
