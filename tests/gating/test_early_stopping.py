"""The early decision against the gate itself, on every way in which the attacks could have ended."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import EarlyDecision, Progress, Proven, Robust
from s2ap_deploy.gating.early_stopping import answers, verdict_of
from s2ap_deploy.gating.policy import judge
from s2ap_deploy.recipe.thresholds import Thresholds

Make = Callable[..., Certificate]
OUTCOMES = st.sampled_from([True, False, None])
SHARES = st.sampled_from([0.02, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9])


def policies(**more: Any) -> st.SearchStrategy[Thresholds]:
    shares = dict.fromkeys(("min_robust", "max_drop", "max_class_drop"), SHARES)
    asked = st.fixed_dictionaries({}, optional=shares).filter(bool)
    rules = st.sampled_from(["lower", "point"])
    return st.builds(lambda asked, rule: Thresholds(**asked, rule=rule, **more), asked, rules)


def decide(policy: Thresholds, pruned: Progress, dense: Progress | None, labels: Sequence[int]) -> str | None:
    return verdict_of(answers(policy, pruned, dense, labels))


def progress(outcomes: Sequence[Robust]) -> Progress:
    return Progress(outcomes, clean=len(outcomes))


def certificate(make: Make, outcomes: Sequence[Robust]) -> Certificate:
    """The certificate of an attack that left ``outcomes``; an early one where something is undecided."""
    broken_by = ["apgd-t" if each is False else None for each in outcomes]
    undecided = tuple(index for index, each in enumerate(outcomes) if each is None)
    decision = None
    if undecided:
        decision = EarlyDecision(
            decided="fail", policy={"min_robust": 0.5}, rule="point", undecided=undecided
        )
    return make(broken_by, decision=decision)


def ends(outcomes: Sequence[Robust]) -> list[tuple[bool, ...]]:
    return list(product(*((True, False) if each is None else (each,) for each in outcomes)))


def counts(pruned: Sequence[bool], dense: Sequence[bool]) -> tuple[tuple[bool, bool, int], ...]:
    """What a verdict can depend on: outcomes and class of every sample, in any order."""
    return tuple(sorted((d, p, index % 2) for index, (d, p) in enumerate(zip(dense, pruned, strict=True))))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(OUTCOMES, OUTCOMES), min_size=1, max_size=12).filter(
        lambda pairs: sum(pair.count(None) for pair in pairs) <= 7
    ),
    policies(),
)
def test_the_decision_is_the_gates_verdict_on_every_completion(make_certificate, pairs, policy) -> None:
    dense, pruned = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    labels = [index % 2 for index in range(len(pairs))]  # those of make_certificate
    found = decide(policy, progress(pruned), progress(dense), labels)
    completions = {counts(p, d): (p, d) for p, d in product(ends(pruned), ends(dense))}
    verdicts = {
        judge(policy, pruned=certificate(make_certificate, p), dense=_other(make_certificate, d)).status
        for p, d in completions.values()
    }
    if found is not None:
        assert verdicts == {found}
    elif verdicts == {"pass"}:
        pytest.fail("a pass was overlooked")
    elif verdicts == {"fail"} and len(policy.asked) == 1 and policy.max_class_drop is None:
        pytest.fail("a failure was overlooked")
    early = judge(policy, pruned=certificate(make_certificate, pruned), dense=_other(make_certificate, dense))
    if None in pruned or None in dense:
        assert early.status == (found or "inconclusive")
    else:
        assert {early.status} == verdicts


def _other(make: Make, outcomes: Sequence[Robust]) -> Certificate:
    """Another network: equal outcomes alone must not make it the same one."""
    return certificate(lambda *args, **changes: make(*args, attack_seed=1, **changes), outcomes)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(OUTCOMES, min_size=1, max_size=200),
    SHARES,
    st.sampled_from(["lower", "point"]),
    st.randoms(use_true_random=False),
)
def test_a_decision_stands_however_the_attack_goes_on(outcomes, threshold, rule, draws) -> None:
    policy = Thresholds(min_robust=threshold, rule=rule)
    labels = [0] * len(outcomes)
    before = None
    undecided = [index for index, each in enumerate(outcomes) if each is None]
    draws.shuffle(undecided)
    for index in [*undecided, None]:
        now = decide(policy, progress(outcomes), None, labels)
        assert before is None or now == before
        before = now
        if index is not None:
            outcomes[index] = draws.random() < 0.5
    settled = decide(policy, progress(outcomes), None, labels)
    assert settled is not None or rule == "lower"


def test_what_attacks_cannot_change_is_decided_at_once() -> None:
    unknown = Progress([None] * 100, clean=80, proven=30)
    labels = [0] * 100
    point = {"min_robust": 0.5, "rule": "point"}
    assert decide(Thresholds(min_clean=0.9, **point), unknown, None, labels) == "fail"
    assert decide(Thresholds(min_clean=0.7, **point), unknown, None, labels) is None
    assert decide(Thresholds(min_proven=0.4, **point), unknown, None, labels) == "fail"
    robust = dataclasses.replace(unknown, robust=[True] * 60 + [None] * 40)
    assert decide(Thresholds(min_clean=0.7, min_proven=0.3, **point), robust, None, labels) == "pass"
    untried = dataclasses.replace(robust, proven=None)  # the gate will be inconclusive without proofs
    assert decide(Thresholds(min_proven=0.3, **point), untried, None, labels) is None


def test_too_few_samples_are_no_decision() -> None:
    policy = Thresholds(min_robust=0.9)
    assert decide(policy, progress([True] * 20), None, [0] * 20) is None
    assert decide(policy, progress([None] * 20), None, [0] * 20) is None
    assert decide(policy, progress([False] * 15 + [None] * 5), None, [0] * 20) == "fail"


def test_a_network_alone_loses_nothing_against_itself() -> None:
    alone = progress([None, True, False])
    policy = Thresholds(max_drop=0.1, max_class_drop=0.1, rule="point")
    assert decide(policy, alone, alone, [0, 0, 1]) == "pass"
    with pytest.raises(UsageError, check=lambda error: error.code == "dense-network-missing"):
        decide(policy, alone, None, [0, 0, 1])


def test_the_reasons_are_told() -> None:
    policy = Thresholds(min_robust=0.45, max_drop=0.1, rule="point")
    pruned, dense = progress([False] * 688 + [None] * 312), progress([True] * 500 + [None] * 500)
    found = {answer.status: answer.message for answer in answers(policy, pruned, dense, [0] * 1000)}
    assert found["fail"] == "the drop is at least 18.8%, 10.0% is allowed"
    floor = answers(Thresholds(min_robust=0.45, rule="point"), pruned, None, [0] * 1000)[0]
    assert floor.message == "at most 31.2% can be robust, 45.0% is required"
    settled = progress([True] * 500 + [None] * 500)
    message = answers(Thresholds(min_robust=0.45), settled, None, [0] * 1000)[0].message
    assert message == "at least 50.0% are robust (47.4% with 95%), 45.0% is required"


def test_flags_and_proofs_of_an_early_certificate_count_as_in_a_full_one(make_certificate) -> None:
    decision = EarlyDecision(decided="pass", policy={"min_robust": 0.2}, rule="point", undecided=(8, 9))
    proven = Proven.of([0, 1], 10, method="test", tolerance=0.0)
    early = make_certificate([None] * 10, decision=decision, proven=proven)
    assert judge(Thresholds(min_proven=0.2, rule="point"), pruned=early).status == "pass"
    flagged = make_certificate([None] * 10, decision=decision, flags=("zero_gradient",))
    assert judge(Thresholds(min_robust=0.2, rule="point"), pruned=flagged).status == "inconclusive"
