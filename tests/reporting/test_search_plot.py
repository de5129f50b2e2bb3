"""The search's picture: which panels there are, that nothing is clipped, and odd histories."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from s2ap_deploy.errors import InputError, StorageError
from s2ap_deploy.reporting import search_plot
from s2ap_deploy.reporting.search_plot import Row, draw_search, drawn, search_figure, short_names
from s2ap_deploy.runs.folder import Run

DENSITY = {"network.0.weight": 0.4, "network.2.weight": 0.1, "network.5.weight": 0.07}


def row(epoch: int, **others: float | None) -> dict[str, float | None]:
    base = {"loss": 1 / epoch, "clean_accuracy": 0.9, "robust_accuracy": 0.6, "replaced": 0.1 / epoch}
    return {"epoch": epoch, "seconds": 2.0, **base, **others}


def full(epochs: int) -> list[dict[str, float | None]]:
    extra = {"hamming": 0.02, "sharpness": 0.01, "eigenvalue": 3.0, "eigenvalue_residual": 0.2}
    return [row(e, flip_rate=None if e < 3 else 0.01, **extra) for e in range(1, epochs + 1)]


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """matplotlib warns where a layout does not fit or a scale is singular."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(autouse=True)
def _real_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other tests write a pixel instead: tests/conftest.py."""
    monkeypatch.setattr(search_plot, "drawn", drawn)


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.get_axes()]


def curve(figure: Figure, panel: int, label: str) -> list[float]:
    (line,) = [line for line in figure.get_axes()[panel].lines if line.get_label() == label]
    return [float(y) for y in line.get_ydata()]  # type: ignore[union-attr, arg-type]


def test_every_quantity_is_drawn_as_it_is(tmp_path: Path, figure: list[Figure]) -> None:
    search_figure(full(5), DENSITY, tmp_path / "search.png")
    (found,) = figure
    assert titles(found) == [panel.title for panel in search_plot.PANELS] + ["Density of every layer"]
    assert curve(found, 0, "loss") == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert curve(found, 1, "robust (PGD)") == [60] * 5
    flips = curve(found, 2, "flipped by S2AP's perturbation (of kept)")
    assert [math.isnan(y) for y in flips] == [True, True, False, False, False]
    assert flips[2:] == [1, 1, 1]
    assert curve(found, 3, "lower bound") == [0.01] * 5
    assert curve(found, 4, "eigenvalue ± residual") == [3] * 5
    bars = found.get_axes()[5].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([40, 10, 7])  # type: ignore[attr-defined]
    with Image.open(tmp_path / "search.png") as image:
        assert image.format == "PNG"
        assert image.size == tuple(int(120 * inches) for inches in found.get_size_inches())
    assert [path.name for path in tmp_path.iterdir()] == ["search.png"]


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


@pytest.mark.parametrize("case", CASES)
def test_no_text_is_clipped_or_hides_another(case: str, tmp_path: Path, figure: list[Figure]) -> None:
    history, density = CASES[case]
    search_figure(history, density, tmp_path / "search.png")
    (drawn,) = figure
    renderer = drawn.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = drawn.get_size_inches() * drawn.dpi
    labels = []
    for axes in drawn.get_axes():
        texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]  # type: ignore[attr-defined]
        texts += shown_ticks(axes)
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
        labels.append([text.get_window_extent(renderer) for text in shown_ticks(axes)])
    for boxes in labels:
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def shown_ticks(axes: Any) -> list[Text]:
    """Tick labels within the axes' limits; matplotlib keeps others that it does not draw."""
    found = []
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = min(limits), max(limits)
        found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text()]


def test_what_was_not_recorded_has_no_panel(tmp_path: Path, figure: list[Figure]) -> None:
    search_figure([row(1), row(2)], {}, tmp_path / "search.png")
    assert titles(figure[0]) == [panel.title for panel in search_plot.PANELS[:3]]
    search_figure([row(1, sharpness=None, eigenvalue=math.nan)], {}, tmp_path / "search.png")
    assert titles(figure[1]) == titles(figure[0])


def test_a_value_between_gaps_is_still_seen(tmp_path: Path, figure: list[Figure]) -> None:
    """Every tenth epoch of many: no segment joins them, and dots are left out where there are many."""
    history = [row(e, sharpness=0.5 if e % 10 == 0 else None) for e in range(1, 101)]
    search_figure(history, {}, tmp_path / "search.png")
    (line,) = figure[0].get_axes()[3].lines
    assert line.get_marker() == "o"
    assert line.get_markevery() == list(range(9, 100, 10))
    (loss,) = figure[0].get_axes()[0].lines
    assert loss.get_marker() == "None"


def test_a_finished_search_is_drawn(own_run: Path) -> None:
    with Run.open(own_run, create=False, command="test") as run:
        path = draw_search(run)
    with Image.open(path) as image:
        assert min(image.size) > 500


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        search_figure(full(4), DENSITY, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(io.BytesIO((tmp_path / "one.png").read_bytes())) as image:
        assert "Software" not in image.info


@pytest.mark.parametrize("history", [[], [{}], [{"epoch": 1, "seconds": 3.0, "loss": math.nan}]])
def test_nothing_to_draw(history: list[Row], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither an epoch nor a layer"):
        search_figure(history, {}, tmp_path / "search.png")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        search_figure([row(1)], {}, tmp_path / "nowhere" / "search.png")


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
        (["z" * 50], ["…" + "z" * 39]),
    ],
)
def test_names_are_cut_to_what_tells_them_apart(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    probe = "import sys, s2ap_deploy.reporting.search_plot as _\n"
    probe += "print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
