"""Names in sentences: one line, no control characters, nothing that a CI system obeys."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.formatting import exact_percent, plain


@given(st.text(st.characters(exclude_categories=())))
def test_plain_text_is_one_printable_line(text) -> None:
    shown = plain(text, 20)
    assert len(shown) <= 20
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert "##[" not in plain(text)
    shown.encode("utf-8")
    assert plain(plain(text)) == plain(text)


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("export/model.onnx", "größe 3:1.onnx", "模型.onnx", "a b%20c.onnx"):
        assert plain(name) == name


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0%"),
        (1.0, "100.0%"),
        (0.4, "40.0%"),
        (0.9999, "99.99%"),
        (0.00004, "0.004%"),
        (-0.02, "-2.0%"),
    ],
)
def test_rounding_hides_no_difference_from_nothing_and_everything(share, text) -> None:
    assert exact_percent(share) == text
