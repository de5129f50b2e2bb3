"""Recipes as text: what is written reads back, comments never become keys, every value has a source."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.recipe import catalog, yaml_document

ODD = "\ufeff\ufffe\uffff\x85\u2028\u2029"  # what YAML itself does not take unescaped
KEYS = st.from_regex(r"[a-z]{1,5}", fullmatch=True)

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-9, 9),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=ODD), max_size=12),
    ),
    lambda below: st.one_of(
        st.lists(below, max_size=3), st.dictionaries(KEYS, below, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(KEYS, values, min_size=1, max_size=4), st.text(max_size=20))
def test_what_is_written_reads_back_whatever_the_comments_say(content, comment) -> None:
    comments = {(key,): comment for key in content}
    text = catalog.annotated(content, comments, head=[comment, "second line"])
    assert yaml_document.parse(text, "test").content == content


def test_a_comment_cannot_end_early() -> None:
    text = catalog.annotated({"seed": 1}, {("seed",): "first\nname: second"}, head=["a\nseed: 2"])
    assert yaml_document.parse(text, "test").content == {"seed": 1}


@pytest.mark.parametrize("name", catalog.names())
def test_every_shipped_recipe_reads_back_from_its_resolved_text(name, tmp_path) -> None:
    recipe, document = catalog.resolved(name)
    text = catalog.annotated(recipe.model_dump(mode="json"), catalog.provenance(recipe, document))
    (tmp_path / "resolved.yaml").write_text(text)
    assert catalog.load(str(tmp_path / "resolved.yaml")) == recipe


def test_sources_name_file_and_line_override_target_and_default(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: mnist\nname: mine\nprune:\n  sparsity: 0.5\nexport: {target: microcontroller}\n"
    )
    recipe, document = catalog.resolved(str(path), overrides=["seed=7", "certify={n: 20}"])
    sources = catalog.provenance(recipe, document)
    assert sources[("name",)] == "mine.yaml, line 2"
    assert sources[("prune", "sparsity")] == "mine.yaml, line 4"
    assert sources[("model", "arch")] == "mnist.yaml, line 14"
    assert sources[("seed",)] == "--set seed=7"
    assert sources[("certify", "n")] == "--set certify={n: 20}"
    assert sources[("prune", "finetune", "weight_decay")] == "default"
    assert sources[("certify", "version")] == "default"
    assert sources[("export", "target")] == "mine.yaml, line 5"
    assert recipe.export.encoding == "dense"
    assert sources[("export", "encoding")] == "target microcontroller"
    assert "" not in sources.values()


def test_a_method_by_evidence_is_called_a_default(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\nname: mine\nprune: {method: null, budget: null}\n")
    recipe, document = catalog.resolved(str(path))
    assert recipe.prune is not None
    assert recipe.prune.method == "harp"
    assert catalog.provenance(recipe, document)[("prune", "method")].startswith(
        "default for this granularity"
    )
