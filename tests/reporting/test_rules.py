"""Every check that the gate makes belongs to a rule whose name stays."""

from __future__ import annotations

import pytest

from s2ap_deploy.evaluation.certificate import WORDS
from s2ap_deploy.gating import limits, thresholds
from s2ap_deploy.gating.check import Check
from s2ap_deploy.reporting.rules import file_of, rule_of


@pytest.mark.parametrize(
    ("name", "rule", "file"),
    [
        *((words, "robust-accuracy", None) for words in WORDS.values()),
        ("clean accuracy", "clean-accuracy", None),
        (thresholds.PROVEN, "proven-accuracy", None),
        (thresholds.DROP, "drop", None),
        (thresholds.CLASS_DROP, "class-drop", None),
        ("recorded files", "file", None),
        ("file export/model.onnx", "file", "export/model.onnx"),
        ("file a file of b.onnx", "file", "a file of b.onnx"),
        ("flag randomized", "reliability", None),
        (limits.size_limits(1, [])[0].name, "size", None),
        (limits.sparsity_floors(0.5, [])[0].name, "sparsity", None),
        (limits.latency_limits(1, [])[0].name, "latency", None),
        (limits.latency_ratio_limits(1, [])[0].name, "latency", None),
        (limits.age_limit("1d", None).name, "age", None),
        ("size of export/x.onnx", "size", "export/x.onnx"),
        ("latency ratio of a of b.onnx", "latency", "a of b.onnx"),
        ("something else", "gate", None),
    ],
)
def test_rules(name: str, rule: str, file: str | None) -> None:
    check = Check(name=name, status="fail", words="words")
    assert (rule_of(check).id, file_of(check)) == (rule, file)
