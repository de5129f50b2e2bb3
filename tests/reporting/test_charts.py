"""Charts as files: which panels there are, what they show, and odd histories."""

import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.security_curve import security_curve
from s2ap_deploy.reporting import svg
from s2ap_deploy.reporting.charts import SEARCH, search_document, security_curves, short_names

DENSITY = {"network.0.weight": 0.4, "network.2.weight": 0.1, "network.5.weight": 0.07}
SVG = "{http://www.w3.org/2000/svg}"


def row(epoch: int, **others: float | None) -> dict[str, float | None]:
    base = {"loss": 1 / epoch, "clean_accuracy": 0.9, "robust_accuracy": 0.6, "replaced": 0.1 / epoch}
    return {"epoch": epoch, "seconds": 2.0, **base, **others}


def full(epochs: int) -> list[dict[str, float | None]]:
    extra = {"hamming": 0.02, "sharpness": 0.01, "eigenvalue": 3.0, "eigenvalue_residual": 0.2}
    return [row(e, flip_rate=None if e < 3 else 0.01, **extra) for e in range(1, epochs + 1)]


def long_names(n: int) -> dict[str, float]:
    return {f"network.stage{i // 9}.blocks.{i}.attention.projection.weight": 1 / (i + 1) for i in range(n)}


CASES: dict[str, tuple[list[Any], dict[str, float]]] = {
    "one epoch": ([row(1)], DENSITY),
    "sixty layers": (full(20), long_names(60)),
    "long names": (full(3), {"a" * 200: 0.5, "b": 1.0}),
    "many epochs": ([row(e) for e in range(1, 201)], DENSITY),
    "no epoch": ([], DENSITY),
    "no layer": (full(4), {}),
    "nothing kept": ([], {"0.weight": 0.0}),
    "empty row": ([{}, row(2)], DENSITY),
    "only loss": ([{"loss": 1.0}], {}),
    "not finite": ([row(1, loss=math.nan), row(2, loss=math.inf), row(3)], DENSITY),
    "all zero": ([row(1, loss=0.0, replaced=0.0), row(2, loss=0.0, replaced=0.0)], DENSITY),
    "negative": ([row(1, eigenvalue=-3.0), row(2, eigenvalue=-2.0)], DENSITY),
    "huge": ([row(1, eigenvalue=1e12, loss=1e-9), row(2, eigenvalue=1e12, loss=1e-9)], DENSITY),
    "odd residual": ([row(1, eigenvalue=1.0, eigenvalue_residual=-1.0), row(2, eigenvalue=1.0)], {}),
    "dollars": ([], {"a$x": 0.1, "b$_y$": 0.2, "$": 0.3}),
}


def texts(document: str, kind: str | None = None) -> list[str]:
    found = [each for each in ET.fromstring(document).iter() if each.tag == f"{SVG}text"]
    return [each.text or "" for each in found if kind is None or each.attrib.get("class") == kind]


@pytest.mark.parametrize("case", CASES)
def test_any_history_and_any_layers_are_drawn_inside_the_picture(case) -> None:
    history, density = CASES[case]
    root = ET.fromstring(search_document(history, density))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])

    def visit(element: ET.Element, left: float, top: float) -> None:
        if moved := re.match(r"translate\(([-\d.]+) ([-\d.]+)\)", element.attrib.get("transform", "")):
            left, top = left + float(moved[1]), top + float(moved[2])
        if element.tag == f"{SVG}text" and "transform" not in element.attrib:
            x, y = left + float(element.attrib["x"]), top + float(element.attrib["y"])
            size = svg.LETTER * len(element.text or "")
            start = x - {"start": 0.0, "middle": size / 2, "end": size}[element.attrib["text-anchor"]]
            assert start >= -2, element.text
            assert start + size <= width + 16, element.text
            assert 0 <= y <= height
        for child in element:
            visit(child, left, top)

    visit(root, 0.0, 0.0)


def test_every_quantity_has_its_panel() -> None:
    found = texts(search_document(full(5), DENSITY), "heading")
    assert found == [panel.title for panel in SEARCH] + ["Density of every layer: weights kept"]
    assert texts(search_document(full(5), DENSITY), "name") == ["0.weight", "2.weight", "5.weight"]


def test_what_was_not_recorded_has_no_panel() -> None:
    expected = [panel.title for panel in SEARCH[:3]]
    assert texts(search_document([row(1), row(2)], {}), "heading") == expected
    without = [row(1, sharpness=None, eigenvalue=math.nan)]
    assert texts(search_document(without, {}), "heading") == expected


def test_equal_input_gives_equal_files_that_need_nothing_else() -> None:
    document = search_document(full(4), DENSITY)
    assert document == search_document(full(4), DENSITY)
    assert "prefers-color-scheme: dark" in document
    assert not re.search(r"href|url\(|<script|@import", document)


@pytest.mark.parametrize("history", [[], [{}], [{"epoch": 1, "seconds": 3.0, "loss": math.nan}]])
def test_nothing_to_draw_is_an_error(history) -> None:
    with pytest.raises(InputError, check=lambda error: error.code == "chart-empty"):
        search_document(history, {})


def test_curves_of_different_norms_share_no_picture() -> None:
    linf, l2 = security_curve([0.0, 0.05, math.inf], norm="Linf"), security_curve([1.0], norm="L2")
    assert security_curves({}, {}) is None
    assert security_curves({"dense": linf, "pruned": l2}, {}) is None


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["network.a.weight", "network.b.weight"], ["a", "b"]),
        (["network.0.weight", "network.2.weight"], ["0.weight", "2.weight"]),
        (["0.weight"], ["0.weight"]),
        (["n.a.weight", "n.a.b.weight"], ["weight", "b.weight"]),
        (["a", "b"], ["a", "b"]),
        ([], []),
        (["x.layer1.conv.weight", "x.layer1.head.bias"], ["conv.weight", "head.bias"]),
        (["z" * 60], ["…" + "z" * 47]),
    ],
)
def test_names_are_cut_to_what_tells_them_apart(names, short) -> None:
    assert short_names(names) == short
