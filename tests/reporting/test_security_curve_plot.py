"""The picture of security curves: a PNG that is drawn from the curves alone."""

from __future__ import annotations

import builtins
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.minimum_norm.security_curve import security_curve
from s2ap_deploy.reporting.security_curve_plot import save_png

DENSE = security_curve([0.0, 0.05, 0.1, 0.12, math.inf], norm="Linf")
PRUNED = security_curve([0.0, 0.02, 0.07, 0.1], norm="Linf")


@pytest.fixture(autouse=True, scope="module")
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def colors(path: Path) -> set[tuple[int, ...]]:
    """The colors of a picture's pixels that are neither gray nor nearly so."""
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        assert picture.format == "PNG"
        assert picture.size == (960, 630)
        found = picture.convert("RGB").getcolors(1 << 20)
    assert found is not None
    return {color for _, color in found if max(color) - min(color) > 60}


def test_two_curves_with_autoattack_in_one_picture(tmp_path: Path) -> None:
    save_png(
        tmp_path / "curves.png",
        {"dense": DENSE, "pruned": PRUNED},
        mark=(8 / 255, "8/255"),
        autoattack={"dense": 0.8, "pruned": 0.5},
    )
    assert {(0x1F, 0x4E, 0x79), (0xC1, 0x44, 0x0E)} <= colors(tmp_path / "curves.png")
    save_png(tmp_path / "dense.png", {"dense": DENSE})
    assert (0xC1, 0x44, 0x0E) not in colors(tmp_path / "dense.png")


def test_equal_curves_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, {"dense": DENSE})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("curves", "options", "message"),
    [
        ({}, {}, "1 to 4 curves"),
        (dict.fromkeys("abcde", DENSE), {}, "not 5"),
        ({"dense": DENSE, "pruned": security_curve([1.0], norm="L2")}, {}, "L2 and Linf"),
        ({"dense": DENSE}, {"mark": (math.inf, "inf")}, "positive and finite"),
        ({"dense": DENSE}, {"autoattack": {"dense": 0.5}}, "needs the radius"),
        ({"dense": DENSE}, {"mark": (0.1, "0.1"), "autoattack": {"prunned": 0.5}}, "prunned"),
    ],
)
def test_what_cannot_be_drawn(
    tmp_path: Path, curves: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        save_png(tmp_path / "curves.png", curves, **options)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError) as caught:
        save_png(tmp_path / "curves.png", {"dense": DENSE})
    assert caught.value.hint == "pip install matplotlib"


@pytest.mark.parametrize(
    "name",
    [
        "reporting.security_curve_plot",
        "evaluation.minimum_norm.security_curve",
        "evaluation.minimum_norm.ap_benchmark",
    ],
)
def test_neither_torch_nor_matplotlib_is_imported_before_it_is_needed(name: str) -> None:
    heavy = {"torch", "numpy", "matplotlib"}
    probe = f"import sys, s2ap_deploy.{name}; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
