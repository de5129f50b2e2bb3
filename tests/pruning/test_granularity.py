"""What a score stands for: a weight, or a weight among m neighbors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.errors import UsageError
from s2ap_deploy.pruning.granularity import NOfM, Weights

patterns = st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)])


@settings(deadline=None, max_examples=60)
@given(
    pattern=patterns,
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    kernel=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_group_along_the_input_channels_keeps_its_n_largest(
    pattern, rows, groups, kernel, seed
) -> None:
    n, m = pattern
    values = torch.rand(rows, groups * m, kernel, kernel, generator=torch.Generator().manual_seed(seed))
    mask = NOfM(["w"], n, m).select({"w": values}, {})["w"]
    for row in range(rows):
        for first in range(0, groups * m, m):
            for y in range(kernel):
                for x in range(kernel):
                    chosen = mask[row, first : first + m, y, x]
                    group = values[row, first : first + m, y, x]
                    assert int(chosen.sum()) == n
                    assert group[chosen].min() >= group[~chosen].max()


def test_ties_go_to_the_lower_channel() -> None:
    mask = NOfM(["w"], 2, 4).best(torch.ones(3, 8))
    assert mask.tolist() == [[True, True, False, False] * 2] * 3


def test_layers_whose_inputs_m_does_not_divide_stay_dense() -> None:
    shapes = {"stem": (16, 3, 3, 3), "body": (8, 16, 3, 3), "head": (10, 6)}
    fitting, dense = NOfM.divide(shapes, 2, 4)
    assert (fitting, dense) == (("body",), ("stem", "head"))
    assert NOfM(fitting, 2, 4).kept(shapes) == {"body": 8 * 16 * 9 // 2}
    with pytest.raises(UsageError, check=lambda error: error.code == "pattern-fits-no-layer"):
        NOfM.divide({"stem": (16, 3, 3, 3), "head": (10, 6)}, 2, 4)


def test_weights_select_the_counts_they_are_given() -> None:
    importance = {"a": torch.tensor([[3.0, 1.0], [2.0, 0.0]])}
    assert Weights(["a"]).select(importance, {"a": 2})["a"].tolist() == [[True, False], [True, False]]
