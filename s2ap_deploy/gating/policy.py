"""The gate: certificates, thresholds and files in; pass, fail or inconclusive out.

With only two answers, a gate would either pass what was not shown or report a lack of samples as a defect. A
demonstrated miss is a failure, whatever else is wrong; anything that makes a pass doubtful makes it
inconclusive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from s2ap_deploy.evaluation import statistics
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.gating import file_checks, sample_checks
from s2ap_deploy.gating.check import Check, Verdict
from s2ap_deploy.gating.devices import Device
from s2ap_deploy.gating.devices import checks as device_checks
from s2ap_deploy.gating.file_checks import ShippedFile
from s2ap_deploy.gating.sample_checks import LEVEL
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.records import PointsCheck

DOUBTS = {
    "randomized": "the model's predictions for the same image vary",
    "not_logits": "the model returns probabilities, which hide the gradient from attacks",
    "batch_dependent": "the model's logits for an image depend on the other images in its batch",
    "dynamic_control_flow": "the model's control flow depends on the image, which gradients do not reflect",
    "loss_of_precision": "float32 is too coarse for the model's logits or loss, so gradients are inaccurate",
    "zero_gradient": "some input gradients are exactly zero, so gradient attacks could not make progress",
    "square_improves": "a black-box attack broke what white-box attacks could not: gradients may be masked",
    "twin_mismatch": "the file's predictions differ from those of the twin used by white-box attacks",
    "quick": "it was attacked only by a quick sweep, which can show a failure but not a pass",
}
"""Flags that make an attack's result too weak for a pass. The others are informational."""


def judge(
    policy: Thresholds,
    *,
    pruned: Certificate,
    dense: Certificate | None = None,
    others: Sequence[Certificate] = (),
    attacked: Mapping[str, Certificate] | None = None,
    shipped: Sequence[ShippedFile] = (),
    recorded: Sequence[Check] = (),
    devices: Sequence[Device] = (),
    age: timedelta | None = None,
) -> Verdict:
    """Compare the evidence with the policy.

    Args:
        policy: the thresholds.
        pruned: the certificate that is judged.
        dense: the certificate that drops are measured against.
        others: further certificates that may cover a file.
        attacked: certificates of further files by their paths; each must keep the thresholds as well.
        shipped: files that a certificate must cover. A file counts with its own answers where they are worse
            than the certificate's; those with an export report are also checked for size and speed.
        recorded: checks of files that were made before.
        devices: devices that ran a file; one counts with its own answers where they are worse. Where some are
            required, they and not the exported file have to keep the limit of latency in milliseconds.
        age: the age of the certificate.

    Raises:
        UsageError: a threshold that no number of samples can show.
    """
    policy.refuse_unprovable()
    own = attacked or {}
    covering = (pruned, *own.values(), *others)
    checks = [*recorded, *(file_checks.coverage(file, *covering) for file in shipped)]
    checks += device_checks(devices, policy.require_device, policy.max_latency_ms)
    answers = [each.judged for each in devices if each.judged is not None]
    checks += [_flag("the model", flag) for flag in _doubts(pruned)]
    # A file that was attacked itself is judged by its own answers only.
    checks += _sample_checks(
        policy,
        pruned,
        dense,
        [*answers, *(each for file in shipped if file.path not in own for each in file.points_checks)],
    )
    for path, certificate in own.items():
        checks += [_flag(path, flag) for flag in _doubts(certificate)]
        checks += (_of_file(path, each) for each in _sample_checks(policy, certificate, dense, answers))
    if policy.needs_dense and dense is not None:
        checks += [_flag("the dense model", flag) for flag in _doubts(dense)]
    checks += _file_checks(policy, [file for file in shipped if file.export is not None])
    if policy.max_age is not None:
        checks.append(file_checks.age_limit(policy.max_age, age))
    return Verdict.of(checks, method(policy))


def _of_file(path: str, check: Check) -> Check:
    """Name the file in a check of its certificate."""
    names = {"name": f"{check.name} of {path}", "message": f"{path}: {check.message}", "path": path}
    return check.model_copy(update=names)


def method(policy: Thresholds) -> str:
    """Describe how bounds are computed, for reports."""
    if policy.rule == "point":
        return "observed shares, without an allowance for the choice of samples"
    message = f"exact one-sided {LEVEL:.0%} bounds (Clopper-Pearson)"
    return f"{message}; drop: {statistics.DROP_METHOD}" if policy.needs_dense else message


def _sample_checks(
    policy: Thresholds, pruned: Certificate, dense: Certificate | None, given: Sequence[PointsCheck]
) -> Iterator[Check]:
    rule = policy.rule
    answers = [check for check in given if check.certificate_sha256 == pruned.sha256]
    if policy.min_clean is not None:
        k = min([pruned.clean.k, *(answer.clean_correct for answer in answers)])
        yield sample_checks.floor("clean-accuracy", "clean accuracy", k, pruned.n, policy.min_clean, rule)
    if policy.max_clean_drop is not None:
        wrong = max([0, *(pruned.clean.k - answer.clean_correct for answer in answers)])
        yield sample_checks.clean_drop(policy.max_clean_drop, rule, pruned, dense, wrong)
    settled, possible = pruned.survivors
    # The points file has the clean image of an undecided sample, so a file "survives" it too.
    more = possible - min([possible, *(answer.survived for answer in answers)])
    if policy.min_robust is not None:
        low, high = max(0, settled - more), possible - more
        yield sample_checks.floor_between(pruned.statement, low, high, pruned.n, policy.min_robust, rule)
    if policy.min_proven is not None:
        yield sample_checks.proven_floor(pruned, policy.min_proven, rule)
    if policy.max_drop is not None:
        yield sample_checks.drop(policy.max_drop, rule, pruned, dense, more)
    if policy.max_class_drop is not None:
        yield sample_checks.class_drop(policy.max_class_drop, rule, pruned, dense, more)


def _file_checks(policy: Thresholds, exported: Sequence[ShippedFile]) -> list[Check]:
    asked = policy.asked
    checks = [
        check
        for name in file_checks.LIMITS
        if name in asked and not (name == "max_latency_ms" and policy.require_device)
        for check in file_checks.limits(name, asked[name], exported)
    ]
    if policy.min_sparsity is not None:
        checks += file_checks.sparsity_floors(policy.min_sparsity, exported)
    return checks


def _doubts(certificate: Certificate) -> list[str]:
    """List the flags against a pass. The protocol ``rand`` is made for randomized models."""
    made_for = {"randomized"} if certificate.protocol.startswith("rand") else set()
    return [flag for flag in certificate.flags if flag in DOUBTS and flag not in made_for]


def _flag(subject: str, flag: str) -> Check:
    return Check(
        rule="reliability",
        name=f"flag {flag}",
        status="inconclusive",
        message=f"{subject}: {DOUBTS[flag]}",
        reason="flagged",
    )
