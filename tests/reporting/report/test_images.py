"""Pictures: what a decoder gets back is what was put in."""

from __future__ import annotations

import base64
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s2ap_deploy.reporting.figure_data import Picture
from s2ap_deploy.reporting.report.images import data_uri, png


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.data())
def test_a_decoder_gets_the_pixels_back(width: int, height: int, channels: int, data: st.DataObject) -> None:
    size = width * height * channels
    pixels = data.draw(st.binary(min_size=size, max_size=size))
    uri = data_uri(Picture(width, height, channels, pixels))
    head, body = uri.split(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert (image.size, image.mode) == ((width, height), "L" if channels == 1 else "RGB")
    assert image.tobytes() == pixels


@pytest.mark.parametrize(
    "picture", [Picture(2, 2, 1, b"abc"), Picture(1, 1, 2, b"ab"), Picture(0, 0, 1, b"")]
)
def test_what_is_no_picture_is_refused(picture: Picture) -> None:
    with pytest.raises(ValueError, match="are no"):
        png(picture)
