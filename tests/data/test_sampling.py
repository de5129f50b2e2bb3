from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.data.splits import choose, hold_out
from s2ap_deploy.errors import UsageError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@given(LABELS, st.integers(1, 70), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_each_class_gets_its_share_within_one(labels, n, seed) -> None:
    chosen = choose(labels, n, seed=seed)

    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(n, len(labels))
    assert set(chosen) <= set(range(len(labels)))
    counts, sizes = Counter(labels[position] for position in chosen), Counter(labels)
    for label, size in sizes.items():
        assert abs(counts[label] - len(chosen) * size / len(labels)) < 1


@given(LABELS, st.integers(1, 70))
@settings(deadline=None, max_examples=30)
def test_without_a_seed_the_first_are_taken(labels, n) -> None:
    assert choose(labels, n, seed=None) == list(range(min(n, len(labels))))


def test_a_choice_is_the_same_on_every_machine() -> None:
    assert choose([0, 1, 2] * 10, 6, seed=0) == [7, 8, 9, 16, 24, 26]


def test_tensor_list_and_repetition_agree() -> None:
    labels = [0, 0, 1, 1, 2, 2] * 5
    assert choose(torch.tensor(labels), 7, seed=3) == choose(labels, 7, seed=3) == choose(labels, 7, seed=3)


def test_seeds_differ() -> None:
    assert len({tuple(choose(100, 10, seed=seed)) for seed in range(5)}) == 5


def test_a_tie_does_not_always_favor_the_same_class() -> None:
    picked = {choose([0, 1, 2, 3], 1, seed=seed)[0] for seed in range(40)}
    assert picked == {0, 1, 2, 3}


@pytest.mark.parametrize("n", [None, 5, 6])
def test_all_when_enough_are_asked_for(n) -> None:
    assert choose(5, n, seed=1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("code", "call"),
    [
        *(("sample-count-out-of-range", lambda n=n: choose(10, n, seed=0)) for n in (0, -3)),
        ("training-set-too-small", lambda: hold_out([0], 0.5, seed=0)),
        *(
            ("validation-fraction-out-of-range", lambda part=part: hold_out([0, 1], part, seed=0))
            for part in (0.0, 1.0, -0.1, 2.0, float("nan"))
        ),
    ],
)
def test_impossible_numbers_are_refused(code, call) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == code):
        call()


@given(st.lists(st.integers(0, 3), min_size=2, max_size=50), st.floats(0.01, 0.99), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_held_out_and_kept_are_a_partition(labels, fraction, seed) -> None:
    kept, held = hold_out(labels, fraction, seed=seed)
    assert sorted(kept + held) == list(range(len(labels)))
    assert kept
    assert held
    assert abs(len(held) - fraction * len(labels)) <= 1
