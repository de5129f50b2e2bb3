"""Numbers as text."""

from datetime import timedelta

import pytest

from s2ap_deploy import formatting


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (1, "1.0/s"),
        (12.34, "12.3/s"),
        (0.075, "4.5/min"),
        (1234.5, "1234/s"),
        (99_999, "99999/s"),
        (99_999.7, "100k/s"),
        (123_456, "123k/s"),
        (1e9, "1000M/s"),
        (0.99, "59.4/min"),
    ],
)
def test_a_rate_is_short(per_second, text) -> None:
    assert formatting.rate(per_second) == text
    assert len(text) <= 8


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(1, "step", "1 step"), (2308400, "forward pass", "2,308,400 forward passes"), (0, "image", "0 images")],
)
def test_units_have_a_plural(number, unit, text) -> None:
    assert formatting.counted(number, unit) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (formatting.percent(0.12345), "12.3%"),
        (formatting.percent(0.12345, 2), "12.35%"),
        (formatting.percent(None), "n/a"),
        (formatting.mebibytes(1.5 * 2**20), "1.5 MiB"),
        (formatting.gibibytes(2**30), "1.0 GiB"),
        (formatting.gibibytes(None), "unknown"),
        (formatting.duration(2.51), "2.5 s"),
        (formatting.duration(119), "119 s"),
        (formatting.duration(1500), "25 min"),
        (formatting.duration(12_600), "3.5 h"),
        (formatting.age_text(timedelta(hours=36)), "36 hours"),
        (formatting.age_text(timedelta(hours=60)), "2.5 days"),
    ],
)
def test_quantities(found, text) -> None:
    assert found == text
