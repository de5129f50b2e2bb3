"""The page: whole, self-contained, escaped, honest, and the same for the same facts."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from s2ap_deploy.onnx_export.export_report import Inference, PairedTimes, PeakMemory, Performance
from s2ap_deploy.reporting.report import page
from s2ap_deploy.reporting.run_facts import collect

ALL = ("pretrain", "search", "finetune", "certify", "export", "gate")
SECTIONS = (
    "verdict",
    "comparison",
    "curve",
    "classes",
    "density",
    "search",
    "training",
    "sizes",
    "latency",
    "images",
    "reproduction",
)
VOID = {"meta", "img", "br", "wbr"}


class Document(HTMLParser):
    """Checks that tags are balanced, and keeps elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rendered(folder: Path) -> tuple[str, Document]:
    text = page.render_page(collect(folder))
    return text, Document(text)


@pytest.mark.parametrize("stages", [(), ("pretrain",), ("search", "finetune"), ("certify",), ALL])
def test_every_section_shows_something_or_says_what_is_missing(stages, make_folder) -> None:
    text, document = rendered(make_folder(*stages))
    assert [attrs["id"] for tag, attrs in document.elements if tag == "section"] == list(SECTIONS)
    for section in re.split(r'<section id="', text)[1:]:
        signs = ("<svg", "<table", "<img", 'class="missing"', 'class="verdict', 'class="bar"', "<b>")
        assert any(sign in section for sign in signs), section[:80]


def test_a_finished_run_misses_nothing(make_folder) -> None:
    text, document = rendered(make_folder(*ALL))
    assert 'class="missing"' not in text
    assert text.index("Failed") < text.index("What was asked") < text.index("Dense against pruned")
    assert (
        sum(tag == "svg" for tag, _ in document.elements) == 1 + 1 + 2 + 5 + 4
    )  # comparison, curve, classes, search, training
    assert sum(tag == "img" for tag, _ in document.elements) > 12


def test_it_needs_no_network_and_no_script(make_folder) -> None:
    _, document = rendered(make_folder(*ALL))
    tags = {tag for tag, _ in document.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "a", "base", "video", "audio"}
    for _, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert "href" not in attributes
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    style = next(words for words in document.words if "prefers-color-scheme: dark" in words)
    assert "url(" not in style
    assert "@import" not in style


def test_names_of_strangers_stay_text(make_folder, hostile_text) -> None:
    text, document = rendered(make_folder(*ALL))
    assert "<script" not in text
    assert "evil.example" not in "".join(str(attrs) for tag, attrs in document.elements if tag != "svg")
    assert "\u202e" not in text
    assert hostile_text.replace("\u202e", "\ufffd") in "".join(document.words)
    assert "{{7*7}}" in "".join(document.words)
    assert [tag for tag, _ in document.elements].count("b") < 60  # the folder's name is no element


def test_honest_words(make_folder) -> None:
    _, document = rendered(make_folder(*ALL))
    for words in (
        "upper bound",
        "lower bound",
        "no latency gain",
        "not a formal guarantee",
        "at dense speed",
    ):
        assert words in document.text
    assert "3 of 12 images lost, 0 gained" in document.text


def test_equal_facts_give_equal_bytes(make_folder) -> None:
    folder = make_folder(*ALL)
    assert page.render_page(collect(folder)) == page.render_page(collect(folder))


def test_one_network_alone(make_folder) -> None:
    _, document = rendered(make_folder("certify", roles=("dense",)))
    assert "Only the dense network is certified" in document.text


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_of_any_number_of_channels(channels, make_folder) -> None:
    _, document = rendered(make_folder("certify", channels=channels))
    pictures = [attrs for tag, attrs in document.elements if tag == "img"]
    assert pictures
    assert all((attrs["width"], attrs["height"]) == ("4", "4") and attrs["alt"] for attrs in pictures)


def test_a_search_without_sharpness_says_so(make_folder) -> None:
    facts = collect(make_folder("search"))
    rows = tuple({**row, "sharpness": None} for row in facts.histories["search"])
    without = replace(facts, histories={"search": rows})
    assert "recorded no sharpness" in Document(page.render_page(without)).text
    assert "recorded no sharpness" not in Document(page.render_page(facts)).text


def test_a_long_measurement_is_shown_with_its_quartiles(make_folder) -> None:
    facts = collect(make_folder("export"))
    report = facts.exports["export"]
    times = PairedTimes(
        pairs=11, p50_ms=1.5, p95_ms=2.0, dense_p50_ms=3.0, dense_p95_ms=4.0,
        ratio=0.51, ratio_q1=0.48, ratio_q3=0.55, difference_ms=-1.5,
    )  # fmt: skip
    memory = PeakMemory(
        processes=3, batch=1, bare_bytes=0, load_bytes=2**20, run_bytes=2**21,
        dense_load_bytes=2**22, dense_run_bytes=0,
    )  # fmt: skip
    found = Performance(
        inference=(Inference(threads=1, batch=32, times=times),),
        load=times,
        memory=memory,
        processor="a chip",
    )
    measured = replace(facts, exports={"export": report.model_copy(update={"performance": found})})
    document = Document(page.render_page(measured))
    text = document.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "32 images, 1 thread",
        "1.5 ms 3 ms 0.51 [0.48, 0.55]",
        "1.0 MiB 4.0 MiB 0.25",
        "a chip",
        "computes unstructured zeros at dense speed",
    ):
        assert words in text, words
    assert "0.51" not in Document(page.render_page(facts)).text
    assert "0.51" in page.render_card(measured)


def test_an_interval_is_kept_whole_where_there_is_room(make_folder) -> None:
    text, _ = rendered(make_folder("certify"))
    assert re.search(r'<td>66\.7% <span class="whole">\[\d[^<>]+\]</span></td>', text)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("layer1.0.conv.weight", "layer1.<wbr>0.<wbr>conv.<wbr>weight"),
        ("1.5 ε", "1.5 ε"),
        ("a.<b>", "a.&lt;b&gt;"),
        ("", ""),
    ],
)
def test_names_break_after_a_dot(name, shown) -> None:
    assert page._dotted(name) == shown
