"""Sample sizes: the same values as the statistics, in words and as an object."""

import pytest

from s2ap_deploy.evaluation.statistics import DISCORDANCE_RATES, detectable_drop, lower_bound
from s2ap_deploy.gating.early_stopping import SampleSize


def test_a_plan_holds_what_the_statistics_say() -> None:
    plan = SampleSize.of(100, 0.4)
    assert plan.needed == 49
    assert lower_bound(49, 100) >= 0.4 > lower_bound(48, 100)
    assert [each.discordance for each in plan.drops] == list(DISCORDANCE_RATES)
    assert all(each.drop == detectable_drop(100, each.discordance) for each in plan.drops)
    assert "a floor of 40.0% needs 49 of 100 (49.0%) to survive" in str(plan)


def test_a_floor_that_no_outcome_shows() -> None:
    plan = SampleSize.of(2, 0.4)
    assert plan.needed is None
    assert "2 samples cannot show a floor of 40.0%, even if all survive" in str(plan)
    assert "floor" not in str(SampleSize.of(2))


def test_no_samples_are_no_plan() -> None:
    with pytest.raises(ValueError, match="is not a count"):
        SampleSize.of(0)
