"""The registry: every module of ``codecs.encodings`` is an encoding, and choices derive from it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from s2ap_deploy.codecs import encodings, registry
from s2ap_deploy.codecs.registry import AUTO, CODECS, DENSE, ENCODINGS, SMALLEST, ZEROS, candidates

MODULES = sorted(path.stem for path in Path(encodings.__path__[0]).glob("[a-z]*.py"))


def test_every_module_is_an_encoding_with_a_test() -> None:
    assert sorted(type(codec).__module__.rpartition(".")[2] for codec in CODECS.values()) == MODULES
    tests = (Path(__file__).parent / "encodings").glob("test_*.py")
    imports = re.findall(r"^from .*encodings.*$", "".join(map(Path.read_text, tests)), re.MULTILINE)
    tested = set(re.findall(r"\w+", " ".join(imports)))
    # Dense and zeros store no positions: the tests of all encodings are all there is to say of them.
    assert {type(codec).__module__.rpartition(".")[2] for codec in CODECS.values() if codec.sparse} <= tested


def test_choices_are_literals() -> None:
    assert get_args(registry.EncodingName) == ENCODINGS
    assert get_args(registry.StoredEncoding) == tuple(CODECS)


def test_no_two_encodings_share_a_place() -> None:
    assert len({codec.order for codec in CODECS.values()}) == len(CODECS) == len(MODULES)


def test_every_encoding_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "encodings.md").read_text(encoding="utf-8")
    for codec in CODECS.values():
        assert f"`{codec.name}`" in page
        assert codec.name in registry.describe() or not codec.selectable


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_candidates(encoding) -> None:
    sparse = candidates(encoding, 10, 1000)
    assert all(codec.name == encoding or encoding in (AUTO, SMALLEST) for codec in sparse)
    assert candidates(encoding, 0, 1000) == ((DENSE,) if encoding == DENSE.name else (ZEROS,))
    crowded = candidates(encoding, 751, 1000)
    assert crowded[-1] is DENSE
    any_density = sum(codec.any_density for codec in CODECS.values())
    assert len(crowded) == (any_density if encoding in (AUTO, SMALLEST) else 1)


def test_listing_encodings_needs_no_numpy() -> None:
    probe = (
        "import sys; from s2ap_deploy.codecs import registry; "
        "registry.Contents((registry.WeightTensor('w', (64, 64), 400),), ()).bytes('auto'); "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
