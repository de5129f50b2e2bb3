"""Random dead structure in every kind of network: the compacted graph computes the same."""

import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.dead_channels.compact import compact, compare_logits, probes
from s2ap_deploy.onnx_export.graph import check
from s2ap_deploy.onnx_export.inference import logits, session

Array = NDArray[np.generic]
NAMES = ("plain", "residual", "preactivation", "vgg", "depthwise", "concatenating")
shares = st.sampled_from((0.0, 0.2, 0.5, 0.8))


@pytest.fixture(scope="session")
def hold(traced, damaged, double, evaluate, images) -> Callable[[str, int, tuple[float, float, float]], None]:
    """Assert everything that must hold for a network with random dead structure."""

    def check_all(name: str, seed: int, shares: tuple[float, float, float]) -> None:
        model = damaged(traced(name), seed, *shares)
        exact = double(model)
        smaller, removal = compact(exact)
        expected = evaluate(exact, images.astype(np.float64))
        found = evaluate(smaller, images.astype(np.float64))
        assert np.abs(found - expected).max() <= 1e-10 * max(1, np.abs(expected).max())
        single, rounded = compact(model)
        assert rounded == removal
        check(single)
        expected = logits(session(model.SerializeToString()), images)
        found = logits(session(single.SerializeToString()), images)
        assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
        again, nothing = compact(smaller)
        assert again is smaller
        assert nothing.removed == 0
        assert removal.macs_after <= removal.macs_before
        if min(shares) >= 0.5:
            assert removal.removed > 0
        if name == "plain" and max(shares) == 0:
            assert smaller is exact

    return check_all


cases = st.tuples(st.integers(0, 2**32 - 1), st.tuples(shares, shares, shares))
EXAMPLES = 60 if os.environ.get("S2AP_SLOW") == "reduced" else 150
CAREFUL = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", NAMES)
@settings(CAREFUL, max_examples=4)
@given(case=cases)
def test_the_outputs_stay(name, hold, case) -> None:
    hold(name, *case)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(CAREFUL)
@given(case=cases)
def test_the_outputs_stay_for_many_more(name, hold, case) -> None:
    hold(name, *case)


@pytest.mark.parametrize("name", NAMES)
def test_most_of_a_very_sparse_network_goes(name, traced, damaged) -> None:
    model = damaged(traced(name), 1, 0.5, 0.5, 0.5)
    smaller, removal = compact(model)
    assert removal.removed >= removal.channels_before / 4
    assert removal.macs_after * 1.5 < removal.macs_before
    stored = [numpy_helper.to_array(tensor) for tensor in smaller.graph.initializer]
    floating = [array.size for array in stored if array.dtype == np.float32]
    assert removal.parameters_after == sum(floating) < removal.parameters_before
    assert removal.channels_after == removal.channels_before - removal.removed
    assert {row.name for row in removal.tensors} <= {tensor.name for tensor in model.graph.initializer}
    assert removal.skipped == ()


def test_a_graph_that_computes_something_else_is_refused(traced, damaged, images) -> None:
    model = damaged(traced("plain"), 3, 0.5, 0.0, 0.0)
    smaller, removal = compact(model)
    checked = compare_logits(model, smaller, images, removal)
    assert checked.max_logit_difference <= checked.tolerance
    assert checked.model_copy(update={"max_logit_difference": None, "tolerance": None}) == removal
    other = damaged(traced("plain"), 4, 0.5, 0.0, 0.0)
    with pytest.raises(VerificationError, check=lambda error: error.code == "compaction-logits-differ"):
        compare_logits(other, smaller, images, removal)
    for tensor in smaller.graph.initializer:
        if tensor.data_type == 1:
            array = np.full_like(numpy_helper.to_array(tensor), np.nan)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(VerificationError, check=lambda error: error.code == "compaction-logits-differ"):
        compare_logits(model, smaller, images, removal)


def test_the_probes_have_a_border_and_an_inside() -> None:
    images = probes((2, 5, 6))
    assert images.shape == (9, 2, 5, 6)
    border, inside = images[-2:]
    assert border[0].sum() == 5 * 6 - 3 * 4
    assert np.array_equal(border + inside, np.ones((2, 5, 6)))
    assert probes((1, 1, 1)).shape == (9, 1, 1, 1)
