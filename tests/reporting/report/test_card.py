"""The model card: every figure of the run, and no markup out of a stranger's name."""

import re

import pytest
import yaml

from s2ap_deploy.reporting.report import page
from s2ap_deploy.reporting.run_facts import collect

ALL = ("pretrain", "search", "finetune", "certify", "export", "gate")


def test_a_finished_run(make_folder) -> None:
    facts = collect(make_folder(*ALL))
    text = page.render_card(facts)
    assert text == page.render_card(facts)
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "s2ap-deploy"
    for words in ("**Verdict: Failed.**", "upper bound", "not a formal guarantee", "no latency gain"):
        assert words in text
    assert f"`{facts.hashes['pruned']}`" in text
    assert "66.7%" in text  # 8 of 12 stand in the dense network


def test_its_metadata_is_what_hugging_face_reads(make_folder) -> None:
    hub = pytest.importorskip(
        "huggingface_hub", reason="needs huggingface_hub: pip install 's2ap-deploy[test]'"
    )
    facts = collect(make_folder(*ALL))
    card = hub.ModelCard(page.render_card(facts))
    assert card.data.library_name == "s2ap-deploy"
    assert card.data.pipeline_tag == "image-classification"
    clean, robust = card.data.eval_results
    certificate = facts.certificates["pruned"]
    assert (clean.metric_name, clean.metric_value) == ("clean accuracy", certificate.clean.value)
    assert robust.metric_value == certificate.robust.value
    assert "upper bound" in robust.metric_name
    assert robust.dataset_split == certificate.split
    assert card.text.lstrip().startswith("# Model card")


@pytest.mark.parametrize("stages", [(), ("certify",), ALL])
def test_tables_have_the_same_number_of_cells_in_every_row(stages, make_folder) -> None:
    text = page.render_card(collect(make_folder(*stages)))
    for block in text.split("\n\n"):
        rows = [re.sub(r"\\.", "", line).count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1, block


def test_names_of_strangers_stay_text(make_folder) -> None:
    text = re.sub(r"\\.", "", page.render_card(collect(make_folder(*ALL))))
    assert "<" not in text
    assert "](" not in text
    assert "![" not in text


def test_what_is_missing_is_said(make_folder) -> None:
    text = page.render_card(collect(make_folder()))
    for words in ("Not judged yet", "have not been attacked yet", "Nothing is exported yet"):
        assert words in text
    assert "model-index" not in yaml.safe_load(text.split("---")[1])
