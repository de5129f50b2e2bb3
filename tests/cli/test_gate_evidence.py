"""What the gate reads: every file that a certificate or a report names, and thresholds on what ships."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from s2ap_deploy.evaluation.certificate import PointsFile
from s2ap_deploy.evaluation.samples import Proven
from s2ap_deploy.spec import ThreatModel

Make = Callable[..., Path]
EASY = ["--min-robust", "0.5", "--max-drop", "0.1"]


def test_a_whole_run_passes_with_one_line_for_all_files_that_are_as_recorded(s2ap, make_run) -> None:
    folder = make_run()
    done = s2ap.ok("gate", *EASY, "--run", folder)
    assert "✓ 8 files are as recorded" in done.out
    assert done.out.splitlines()[-1] == "gate: PASSED"
    verdict = json.loads((folder / "gate" / "verdict.json").read_text())
    assert verdict["statistics"].startswith(
        "exact one-sided 95% bounds (Clopper-Pearson); drop: two one-sided"
    )


NAMED = [
    "pretrain/model.safetensors",
    "finetune/model.safetensors",
    "certify/dense.json",
    "certify/pruned.json",
    "certify/dense-points.safetensors",
    "certify/pruned-points.safetensors",
    "export/report.json",
    "export/model.onnx",
]


@pytest.mark.parametrize("name", NAMED)
def test_a_swapped_file_fails_and_a_missing_one_is_inconclusive(name, s2ap, make_run) -> None:
    folder = make_run()
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    swapped = s2ap("gate", *EASY, "--run", folder)
    assert swapped.code == 1, swapped.out + swapped.err
    assert f"✗ file {name} is not the one" in swapped.out
    path.unlink()
    missing = s2ap("gate", *EASY, "--run", folder)
    assert missing.code == 3, missing.out + missing.err
    assert f"? file {name} is missing" in missing.out
    path.write_bytes(content)
    assert s2ap("gate", *EASY, "--run", folder).code == 0


def test_a_report_that_speaks_of_another_file_than_the_manifest(s2ap, make_run) -> None:
    done = s2ap("gate", *EASY, "--run", make_run(report_changes={"sha256": "0" * 64}))
    assert done.code == 1
    assert "✗ file export/model.onnx is not the one recorded in export/report.json" in done.out


@pytest.mark.parametrize("name", ["../finetune/model.safetensors", "/etc/passwd", "a\\b", ""])
def test_a_name_in_a_report_that_leads_elsewhere(name, s2ap, make_run) -> None:
    s2ap.refused("path-outside", "gate", *EASY, "--run", make_run(report_changes={"file": name}))


@pytest.mark.parametrize("name", ["../export/model.onnx", "/etc/passwd", ".."])
def test_a_name_in_a_certificate_that_leads_elsewhere(name, s2ap, make_run) -> None:
    points = {"points": PointsFile(name=name, sha256="0" * 64)}
    folder, own = make_run(name="other", dense_changes=points), make_run()
    for options in (["--run", folder], ["--run", own, "--baseline", folder / "certify" / "dense.json"]):
        s2ap.refused("path-outside", "gate", *EASY, *options)


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_link_that_leads_out_of_the_folder(s2ap, make_run, tmp_path) -> None:
    folder = make_run()
    shutil.move(folder / "export" / "model.onnx", tmp_path / "elsewhere.onnx")
    (folder / "export" / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    s2ap.refused("path-outside", "gate", *EASY, "--run", folder)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any name")
@pytest.mark.parametrize(
    "name", [b"\xff.onnx", b"x\n::error::y.onnx", b"##[add-mask]x.onnx", b"\x1b[2J.onnx"]
)
def test_a_file_whose_name_is_an_attack_is_still_only_an_uncovered_file(
    name, s2ap, make_run, tmp_path
) -> None:
    folder = make_run()
    with open(os.path.join(os.fsencode(folder), name), "wb") as stream:
        stream.write(b"x")
    reports = ["--junit", tmp_path / "j.xml", "--sarif", tmp_path / "s.json", "--summary", tmp_path / "s.md"]
    done = s2ap("gate", *EASY, "--annotations", *reports, "--run", folder)
    assert done.code == 3, done.err
    assert "\x1b" not in done.out
    assert "##[" not in done.out
    commands = [line for line in done.out.splitlines() if line.startswith("::")]
    assert len(commands) == 1
    assert commands[0].startswith("::warning title=gate%3A file ")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--max-bytes", 1000], 0, "size of export/model.onnx: 1,000 bytes; allowed 1,000 bytes"),
        (["--max-bytes", 999], 1, "size of export/model.onnx: 1,000 bytes; allowed 999 bytes"),
        (["--min-sparsity", 0.9], 0, "900 zeros of 1,000 weights = 90.00%; required 90.00%"),
        (["--min-sparsity", 0.9009], 0, "required 90.09%"),  # 900.9 zeros: one weight may lack
        (["--min-sparsity", 0.902], 1, "900 zeros of 1,000 weights = 90.00%; required 90.20%"),
        (
            ["--max-latency-ratio", 1.04],
            0,
            "latency ratio of export/model.onnx: 1.04 of the dense file's time",
        ),
        (["--max-latency-ratio", 1], 1, "latency ratio of export/model.onnx: 1.04 of the dense file's time"),
        (["--max-latency-ms", 5], 3, "latency of export/model.onnx: was not measured"),
        (["--min-proven", 0.1], 3, "provably robust accuracy (lower bound): the certificate holds no proofs"),
        (["--max-class-drop", 0.1], 0, "drop of robust accuracy in the worst class: class 'zero'"),
        (["--max-clean-drop", 0.1], 0, "drop of clean accuracy: 0 lost and 0 gained of 1000"),
        (["--max-clean-drop", 0.001], 3, "drop of clean accuracy: too few samples: even none lost of 1000"),
        (["--max-class-drop", 0.001], 3, "too few samples: even none lost of 500"),
    ],
)
def test_thresholds_on_what_ships(options, code, words, s2ap, make_run) -> None:
    done = s2ap("gate", *options, "--run", make_run())
    assert done.code == code, done.out + done.err
    assert words in done.out


def test_a_measured_latency_is_read_where_a_report_has_one(s2ap, make_run) -> None:
    folder = make_run(report_changes={"latency_ms": 3.5})
    fast = s2ap("gate", "--max-latency-ms", 3.5, "--run", folder)
    assert (fast.code, "latency of export/model.onnx: 3.5 ms; allowed 3.5 ms" in fast.out) == (0, True)
    assert s2ap("gate", "--max-latency-ms", 3.4, "--run", folder).code == 1


def test_a_run_without_an_export_has_no_size(s2ap, make_run, without_stages) -> None:
    folder = without_stages(make_run(), "export")
    done = s2ap("gate", "--max-bytes", 9, "--min-sparsity", 0.1, "--run", folder)
    assert done.code == 3
    assert "size: there is no exported file" in done.out
    assert "sparsity: there is no exported file" in done.out


def certified_at(folder: Path, finished: str | None) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["certify"]["finished"] = finished
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("days", "allowed", "code"), [(3, "4d", 0), (3, "71h", 3), (3, "1w", 0), (40, "30d", 3), (-1, "9w", 3)]
)
def test_an_old_certificate_is_no_evidence(days, allowed, code, s2ap, make_run) -> None:
    made = datetime.now(UTC) - timedelta(days=days)
    folder = certified_at(make_run(), made.isoformat(timespec="seconds"))
    done = s2ap("gate", *EASY, "--max-age", allowed, "--run", folder)
    assert done.code == code, done.out
    assert "age of the certificate" in done.out


@pytest.mark.parametrize("finished", [None, "yesterday", "", "2020-01-01"])
def test_a_certificate_whose_age_nobody_knows(finished, s2ap, make_run) -> None:
    folder = certified_at(make_run(), finished)
    assert s2ap("gate", *EASY, "--max-age", "1w", "--run", folder).code == 3
    assert s2ap("gate", *EASY, "--run", folder).code == 0


def test_the_age_limit_joins_the_recipes_policy_instead_of_replacing_it(s2ap, make_run) -> None:
    from s2ap_deploy.recipe import catalog

    folder = make_run()
    text = catalog.dump(catalog.load("demo"))
    start = text.index("gate:")
    (folder / "recipe.yaml").write_text(
        text[:start] + "gate: {min_robust: 0.95, max_bytes: 1000, rule: point}\n"
    )
    done = s2ap("gate", "--max-age", "1w", "--run", folder)
    assert done.code == 1
    assert "required 95.0%" in done.out
    assert "✓ size of export/model.onnx" in done.out
    assert "✓ age of the certificate" in done.out
    assert s2ap("gate", "--min-robust", 0.5, "--run", folder).code == 0


class TestBaseline:
    """``--baseline``: another certificate in place of the run's dense one."""

    def test_the_drop_is_counted_against_it(self, s2ap, make_run) -> None:
        folder = make_run(dense=990, pruned=890)
        last = make_run(dense=900, pruned=900, name="last") / "certify" / "pruned.json"
        assert s2ap("gate", "--max-drop", 0.05, "--run", folder).code == 1
        done = s2ap.ok("gate", "--max-drop", 0.05, "--baseline", last, "--run", folder)
        assert "10 lost and 0 gained of 1000 = 1.0%" in done.out

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"threat": ThreatModel(eps="4/255")}, "eps"),
            ({"threat": ThreatModel(norm="L2", eps="8/255")}, "norm"),
            ({"sample_ids": [f"other/{i}" for i in range(1000)]}, "sample ids"),
            ({"protocol": "aa-adapted"}, "protocol"),
        ],
    )
    def test_pairs_that_cannot_be_compared_are_refused(self, change, named, s2ap, make_run) -> None:
        other = make_run(name="other", changes=change) / "certify" / "pruned.json"
        options = ["--max-drop", 0.5, "--max-class-drop", 0.5, "--baseline", other]
        done = s2ap("gate", *options, "--run", make_run())
        assert done.code == 3
        assert done.out.count(f"cannot be compared, they differ in {named}") == 2

    def test_it_may_travel_alone_but_not_beside_other_points(self, s2ap, make_run, tmp_path) -> None:
        folder, other = make_run(), make_run(name="other")
        alone = tmp_path / "dense.json"
        shutil.copy(other / "certify" / "dense.json", alone)
        assert s2ap("gate", *EASY, "--baseline", alone, "--run", folder).code == 0
        (tmp_path / "dense-points.safetensors").write_bytes(b"others")
        done = s2ap("gate", *EASY, "--baseline", alone, "--run", folder)
        assert done.code == 1
        assert "✗ file dense-points.safetensors is not the one" in done.out

    def test_a_doctored_one_contradicts_itself(self, s2ap, make_run, tmp_path) -> None:
        folder = make_run()
        content = json.loads((folder / "certify" / "dense.json").read_text())
        content["robust"]["k"] = 1
        (tmp_path / "dense.json").write_text(json.dumps(content))
        assert s2ap("gate", *EASY, "--baseline", tmp_path / "dense.json", "--run", folder).code == 2


@pytest.mark.parametrize(("count", "code"), [(800, 0), (705, 1), (600, 1)])
def test_proofs_are_read_where_a_certificate_has_them(count, code, s2ap, make_run) -> None:
    proven = Proven.of(range(count), 1000, method="test", tolerance=0.0)
    done = s2ap("gate", "--min-proven", 0.7, "--run", make_run(changes={"proven": proven}))
    assert done.code == code, done.out
    assert f"provably robust accuracy (lower bound): {count} of 1000" in done.out


def test_a_plan_says_before_the_work_what_samples_can_show(s2ap, tmp_path) -> None:
    done = s2ap.ok("gate", "--plan", 200, "--min-robust", 0.4, cwd=tmp_path)
    title, differ, drops, _ = done.out.splitlines()
    assert title == "what 200 images can show of a network that loses nothing, in 80% of cases:"
    assert differ.split()[-4:] == ["1%", "2%", "5%", "10%"]
    assert drops.split()[-4:] == ["3.6%", "4.3%", "6.3%", "8.4%"]
    assert "a floor of 40.0% needs 92 of 200 (46.0%) to survive" in done.out
    told = json.loads(s2ap("gate", "--plan", 3, "--min-robust", 0.4, "--json", cwd=tmp_path).out)
    assert (told["n"], told["needed"]) == (3, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "code"),
    [("pretrain", 3), ("search", 3), ("finetune", 3), ("certify", 3), ("export", 0), ("artifact", 0)],
)
def test_a_stage_removed_with_its_folder_is_missed_where_another_names_it(
    stage, code, own_run, s2ap, without_stages
) -> None:
    """Nothing names an export, or the certificate of a file: a gate that needs one asks for it."""
    content = json.loads((own_run / "manifest.json").read_text())
    if stage in content["stages"]:
        without_stages(own_run, stage)
    asks = ["gate", "--min-clean", 0, "--rule", "point"]
    assert s2ap(*asks, "--run", own_run).code == code
    assert s2ap(*asks, "--max-bytes", 10**9, "--run", own_run).code == (3 if stage == "export" else code)


@pytest.mark.parametrize(
    "name",
    [
        "deploy/snapshot.safetensors",
        "search/snapshot.safetensors",
        "certify/record-evil.safetensors",
        "certify/record-dense/block-00000-square.safetensors",
        "artifact/record/model.safetensors",
    ],
)
def test_a_network_that_is_named_like_unfinished_work_is_not_covered(name, own_run, s2ap) -> None:
    path = own_run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(own_run / "pretrain" / "model.safetensors", path)
    with path.open("ab") as stream:
        stream.write(b"\0")  # not the recorded network
    assert s2ap("gate", "--min-clean", 0, "--rule", "point", "--run", own_run).code == 3
