"""The gallery: a mix of fates, classes in turn, and pictures of any image."""

import base64
import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.evaluation.samples import Sample
from s2ap_deploy.reporting.figure_data import (
    LONGEST_SIDE,
    ORDER,
    Picture,
    choose_points,
    data_uri,
    fate,
    picture,
)

FATES = st.lists(st.tuples(st.sampled_from(ORDER), st.integers(0, 3)), max_size=40)


@given(FATES, st.integers(0, 20))
def test_as_many_as_there_are_each_once_and_no_fate_left_out(samples, most) -> None:
    fates = [kind for kind, _ in samples]
    chosen = choose_points(fates, [label for _, label in samples], most)  # type: ignore[arg-type]
    assert len(chosen) == len(set(chosen)) == min(most, len(samples))
    if most >= len(ORDER):
        assert {fates[index] for index in chosen} == set(fates)
    assert [ORDER.index(fates[i]) for i in chosen] == sorted(ORDER.index(fates[i]) for i in chosen)  # type: ignore[arg-type]


def test_new_classes_come_first() -> None:
    labels = [0, 0, 0, 1, 1, 2]
    assert Counter(labels[i] for i in choose_points(["broken"] * 6, labels, 3)) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("dense", "pruned", "expected"),
    [
        (None, None, "held"),
        (None, "square", "lost"),
        (None, "clean", "lost"),
        ("square", None, "gained"),
        ("square", "apgd-ce", "broken"),
        ("square", "clean", "broken"),
        ("clean", "clean", "wrong"),
        ("undecided", None, "undecided"),
    ],
)
def test_fates(dense, pruned, expected) -> None:
    samples = [
        Sample(id="a", label=0, clean_prediction=0, adversarial_prediction=0, broken_by=by)
        for by in (dense, pruned)
    ]
    assert fate(samples) == expected


@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 300))
def test_a_picture_of_any_shape_is_small_and_complete(channels, height, width) -> None:
    found = picture(np.full((channels, height, width), 0.5, dtype=np.float32))
    assert max(found.width, found.height) <= LONGEST_SIDE
    assert found.channels == (channels if channels in (1, 3) else 1)
    assert found.pixels == bytes([128]) * (found.width * found.height * found.channels)


def test_values_out_of_range_and_nothing_at_all() -> None:
    odd = np.array([[[-1.0, 2.0, np.nan, np.inf]]], dtype=np.float32)
    assert picture(odd).pixels == bytes([0, 255, 0, 255])
    with pytest.raises(RunFolderError, check=lambda error: error.code == "image-empty"):
        picture(np.zeros((1, 0, 3), dtype=np.float32))


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.data())
def test_a_decoder_gets_the_pixels_back(width, height, channels, data) -> None:
    size = width * height * channels
    pixels = data.draw(st.binary(min_size=size, max_size=size))
    uri = data_uri(Picture(width, height, channels, pixels))
    head, body = uri.split(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert (image.size, image.mode) == ((width, height), "L" if channels == 1 else "RGB")
    assert image.tobytes() == pixels
