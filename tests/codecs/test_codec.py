import math

import numpy as np
import pytest

from s2ap_deploy.codecs.codec import check_positions, entropy_bits


@pytest.mark.parametrize("positions", [[3, 3], [4, 2], [-1, 2], [0, 10]])
def test_positions_increase_within_the_universe(positions) -> None:
    with pytest.raises(ValueError, match="strictly increasing"):
        check_positions(np.array(positions), 10)


def test_a_universe_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="32-bit"):
        check_positions(np.array([1]), 2**31)


def test_entropy_of_a_fair_coin_is_two_bits_per_position() -> None:
    assert math.isclose(entropy_bits(500, 1000), 2.0)
    assert entropy_bits(0, 10) == entropy_bits(10, 10) == 0.0
