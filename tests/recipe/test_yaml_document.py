"""The YAML reader keeps lines, reads core-schema scalars, and refuses everything that can run or grow."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.errors import RecipeError
from s2ap_deploy.recipe import yaml_document

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
    | st.sampled_from(
        ["1e-3", "8/255", "yes", "null", "~", "", "0x1f", "2024-01-01", "1_000", "1:30", ".5", "=", "<<"]
    )
)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3)
    ),
    max_leaves=10,
)


def test_content_and_the_line_of_every_key() -> None:
    text = "# a comment\nname: demo\nprune:\n  sparsity: 0.9\n  sizes: [1,\n    2]\nlast: {a: x}\n"
    document = yaml_document.parse(text, "r.yaml")
    assert document.content == {
        "name": "demo", "prune": {"sparsity": 0.9, "sizes": [1, 2]}, "last": {"a": "x"},
    }  # fmt: skip
    assert document.origins == {
        ("name",): "r.yaml, line 2",
        ("prune",): "r.yaml, line 3",
        ("prune", "sparsity"): "r.yaml, line 4",
        ("prune", "sizes"): "r.yaml, line 5",
        ("prune", "sizes", 0): "r.yaml, line 5",
        ("prune", "sizes", 1): "r.yaml, line 6",
        ("last",): "r.yaml, line 7",
        ("last", "a"): "r.yaml, line 7",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1", 1), ("-7", -7), ("010", 10), ("1.", 1.0), (".5", 0.5), ("+1.5E3", 1500.0),
        ("true", True), ("False", False), ("NULL", None), ("~", None), ("", None), (".inf", math.inf),
        ("-.inf", -math.inf), ("yes", "yes"), ("no", "no"), ("8/255", "8/255"), ("1:30", "1:30"),
        ("0x1f", "0x1f"), ("2024-01-01", "2024-01-01"), ("'1'", "1"), ('"true"', "true"), ("tRue", "tRue"),
        ("1" * 30, float("1" * 30)),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text, value) -> None:
    found = yaml_document.parse(f"a: {text}", "r.yaml").content["a"]
    assert found == value
    assert type(found) is type(value)


@settings(deadline=None, max_examples=150)
@given(documents)
def test_dump_is_read_back_equal(content) -> None:
    found = yaml_document.parse(yaml_document.dump(content), "r.yaml").content
    assert found == content
    assert repr(found) == repr(content)  # 1 and True and 1.0 are equal, but not the same


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_document_is_none(text) -> None:
    assert yaml_document.parse(text, "r.yaml").content is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: !!python/object/apply:os.system ['x']",
            "line 2: the tag !!python/object/apply:os.system is not",
        ),
        ("a: !!python/name:os.system", "line 1: the tag !!python/name:os.system is not allowed"),
        ("a: !custom 1", "the tag !custom is not allowed"),
        ("a: !!binary aGk=", "the tag !!binary is not allowed"),
        ("? !!str a\n: 1", "the tag !!str is not allowed"),
        ("a: &big [1, 2]\nb: 1", "line 1: the anchor &big is not allowed"),
        ("a: 1\nb: *big", r"line 2: the alias \*big is not allowed"),
        ("*big : 1", "the alias"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3", r"line 5: b\.c is repeated, first in r\.yaml, line 3"),
        ("a: 1\n---\nb: 1", "line 2: a second document"),
        ("? [1]\n: 2", "a key must be a word"),
        ("a:\n\tb: 1", "line 2: a tab; YAML indents with spaces"),
        ("a: [1, 2", "line 1: expected ',' or ']'"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a: \x01", "r.yaml is not YAML: unacceptable character"),
        ("[" * 100_000, "nested more than 16 levels deep"),
        ("? " * 100_000, "a key must be a word"),
        ("a:\n" + "".join(" " * i + "- \n" for i in range(1, 30)), "line 18: nested more than"),
    ],
)
def test_what_is_refused(text, message) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        yaml_document.parse(text, "r.yaml")
    assert caught.value.message.startswith("r.yaml")


@settings(deadline=None, max_examples=300)
@given(st.text("ab:-[]{}'\"!&*#|>%@`,? \n\t1.~<", max_size=40))
def test_any_text_is_read_or_refused(text) -> None:
    try:
        ours = yaml_document.parse(text, "r.yaml").content
    except RecipeError:
        return
    # A second opinion on the structure, from a reader that constructs everything as text.
    assert as_text(ours, keep=False) == as_text(yaml.load(text, Loader=yaml.BaseLoader), keep=True)


def as_text(value: Any, *, keep: bool) -> Any:
    if isinstance(value, dict):
        return {key: as_text(inner, keep=keep) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_text(inner, keep=keep) for inner in value]
    if keep:
        return yaml_document.scalar(value) if value is not None else None
    return yaml_document.scalar(value) if isinstance(value, str) else value


def test_read_names_the_file_and_the_line_of_bad_bytes(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml, line 2: not UTF-8"):
        yaml_document.read(path)


def test_read_takes_a_byte_order_mark_and_refuses_a_huge_file(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert yaml_document.read(path).content == {"a": 1}
    path.write_bytes(b"#" * (yaml_document.SIZE_LIMIT + 1))
    with pytest.raises(RecipeError, match="larger than 256 KB"):
        yaml_document.read(path)


def test_override_replaces_makes_sections_and_takes_over_the_origin() -> None:
    document = yaml_document.parse("a: {b: {c: 1}}\nd: null\n", "r.yaml")
    document.override(("a", "b"), 5, "--set a.b=5")
    document.override(("d", "e", "f"), 6, "--set d.e.f=6")
    assert document.content == {"a": {"b": 5}, "d": {"e": {"f": 6}}}
    assert document.origins[("a", "b")] == "--set a.b=5"
    assert ("a", "b", "c") not in document.origins
    assert document.origins[("a",)] == "r.yaml, line 1"
    with pytest.raises(RecipeError, match=r"--set x: a\.b is a value, not a section"):
        document.override(("a", "b", "c"), 1, "--set x")
