"""Pairs of outcomes while some are undecided: the ends that are judged speak for every completion."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.evaluation.samples import Robust
from s2ap_deploy.gating.sample_checks import PairRange, Pairs
from s2ap_deploy.recipe.thresholds import Rule

RULES: st.SearchStrategy[Rule] = st.sampled_from(["lower", "point"])
OUTCOMES = st.sampled_from([True, False, None])


def completions(outcomes: Robust) -> tuple[bool, ...]:
    return (True, False) if outcomes is None else (outcomes,)


def reachable(found: PairRange) -> set[Pairs]:
    return {
        Pairs(found.lost + lost + either_lost, found.gained + gained + either_gained, found.n)
        for lost in range(found.may_lose + 1)
        for gained in range(found.may_gain + 1)
        for either_lost in range(found.may_either + 1)
        for either_gained in range(found.may_either + 1 - either_lost)
    }


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(OUTCOMES, OUTCOMES), min_size=1, max_size=5))
def test_the_range_holds_exactly_the_counts_that_completions_lead_to(samples) -> None:
    found = PairRange.of([dense for dense, _ in samples], [pruned for _, pruned in samples])
    ended = set()
    for ends in product(*(tuple(product(completions(a), completions(b))) for a, b in samples)):
        ended.add(Pairs(ends.count((True, False)), ends.count((False, True)), len(samples)))
    assert reachable(found) == ended
    assert {found.worst, found.best} <= ended
    assert found.exact == (len(ended) == 1)


@st.composite
def ranges(draw: st.DrawFn) -> PairRange:
    n = draw(st.integers(1, 80))
    parts = []
    for _ in range(5):
        parts.append(draw(st.integers(0, min(8, n - sum(parts)))))
    lost, gained, may_lose, may_gain, may_either = parts
    return PairRange(lost, gained, n, may_lose, may_gain, may_either)


@settings(deadline=None, max_examples=100)
@given(ranges(), st.floats(0.005, 0.9), RULES)
def test_what_is_certain_is_what_every_completion_answers(found, threshold, rule) -> None:
    """Both ways: nothing is called certain that is not, and nothing certain is overlooked."""
    answers = {pairs.judged(threshold, rule) for pairs in reachable(found)}
    expected = answers.pop() if len(answers) == 1 else None
    assert found.certain(threshold, rule) == (None if expected == "inconclusive" else expected)


@settings(deadline=None, max_examples=100)
@given(ranges(), st.floats(0.005, 0.9), RULES, st.integers(0, 20))
def test_what_a_file_loses_beyond_is_allowed_for(found, threshold, rule, more) -> None:
    certain = found.certain(threshold, rule, more)
    if certain == "pass":
        for pairs in reachable(found):
            assert all(pairs.losing(extra).judged(threshold, rule) == "pass" for extra in (0, more))


def test_the_two_ends_alone_would_call_a_failure_too_early() -> None:
    """At both ends of ``gained`` the drop fails, between them no number of lost samples could pass."""
    found = PairRange(10, 0, 40, may_gain=7)
    answers = [Pairs(10, gained, 40).judged(0.03, "lower") for gained in range(8)]
    assert answers[0] == answers[-1] == "fail"
    assert "inconclusive" in answers
    assert found.certain(0.03, "lower") is None


def test_a_network_compared_with_itself_loses_nothing() -> None:
    outcomes = (True, None, False, None)
    assert PairRange.of(outcomes, outcomes) == PairRange(0, 0, 4)
    assert PairRange.by_class(outcomes, outcomes, [1, 0, 1, 1]) == {
        0: PairRange(0, 0, 1), 1: PairRange(0, 0, 3),
    }  # fmt: skip
    assert PairRange.of(outcomes, list(outcomes)).may_either == 2


def test_classes_are_told_apart() -> None:
    found = PairRange.by_class([True, True, None], [False, None, None], [7, 2, 7])
    assert found == {2: PairRange(0, 0, 1, may_lose=1), 7: PairRange(1, 0, 2, may_either=1)}
    assert list(found) == [2, 7]


def test_sequences_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        PairRange.of([True], [True, None])
