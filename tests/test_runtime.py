"""Device, threads and random streams."""

import ast
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy import runtime
from s2ap_deploy.errors import UsageError

STREAMS = ("generator", "derive_seed", "seed_layers")
STREAM_KEYS = (
    "augmentation", "bench", "calibrate", "choose", "clean", "compact", "compare", "coupling", "curvature",
    "diagnose", "evaluate", "fmn", "gradients", "image", "images", "initialise", "layers", "module",
    "order", "overfitting", "probe", "scores", "search", "sharpness", "untrain", "val", "validation",
    "verify", "weights",
)  # fmt: skip
KEYS = st.lists(st.one_of(st.integers(), st.text(max_size=8)), min_size=1, max_size=4)


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert runtime.derive_seed(0, "search", 3, 17) == 7_054_003_316_784_227_682


def test_the_keys_of_random_streams_are_as_ever() -> None:
    """A key that is renamed gives other weights, masks or attacks from the same seed."""
    found = set()
    for path in Path(runtime.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in STREAMS:
                words = [
                    ast.unparse(key) for key in call.args if isinstance(key, ast.Constant | ast.JoinedStr)
                ]
                found.update(word for word in words if not word.isdigit())
    assert found == {repr(key) for key in STREAM_KEYS}


@given(KEYS)
@settings(deadline=None, max_examples=50)
def test_every_seed_fits_every_generator(keys) -> None:
    assert 0 <= runtime.derive_seed(*keys) < 2**63
    runtime.generator(*keys)


def test_streams_differ_by_any_key_and_repeat_with_the_same() -> None:
    draws = [
        torch.rand(4, generator=runtime.generator(*keys)).tolist()
        for keys in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1))
    ]
    assert draws[0] == draws[4]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cpu:cpu", ""])
def test_a_device_that_is_not_here_is_a_usage_error(name) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "device-unusable") as caught:
        runtime.device(name)
    assert caught.value.hint == "try --device cpu"


def test_auto_takes_what_is_there() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert runtime.device().type == runtime.device("auto").type == expected


def test_versions_and_environment_name_what_a_result_depends_on_but_not_the_machine() -> None:
    assert {"python", "torch", "onnxruntime", "pyautoattack", "numpy"} <= runtime.versions().keys()
    facts = runtime.environment(torch.device("cpu"))
    assert facts["threads"] == torch.get_num_threads()
    assert {"device", "cores", "machine", "system"} <= facts.keys()
    assert platform.node() not in map(str, facts.values())
