"""A sweep as text: means and deviations that can be checked by hand, CSV that reads back, names defused."""

import csv
import io
import re
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.reporting import sweep_report
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.sweeps.aggregate import (
    Count,
    Figures,
    Row,
    Setting,
    Spread,
    SweepReport,
    differences,
    groups,
)

HYDRA = Setting(method="hydra", s2ap=True, granularity="weight", budget="erk", sparsity=0.9, keep_ratio=None)


def count(k: int, n: int = 200) -> Count:
    return Count(k=k, n=n, interval=(0.0, 1.0))


def figures(robust: int = 140, **changes: Any) -> Figures:
    facts: dict[str, Any] = {
        "sparsity": 0.9, "clean_dense": count(190), "clean": count(186), "robust_dense": count(150),
        "robust": count(robust), "bytes": 50_000, "dense_bytes": 600_000, "latency_ratio": 1.02, "flags": (),
        "verdict": "pass", "dense_certificate_sha256": "d" * 64, "certificate_sha256": "c" * 64,
        "artifact_sha256": "a" * 64,
    }  # fmt: skip
    return Figures(**{**facts, **changes})


def row(seed: int, *, setting: Setting = HYDRA, shown: Figures | None = None, **changes: Any) -> Row:
    facts: dict[str, Any] = {
        "name": f"{setting.method}-{setting.sparsity}-seed-{seed}",
        "status": "finished" if shown else "waiting",
        "seed": seed,
        "values": {},
        "setting": setting,
        "figures": shown,
    }
    return Row(**{**facts, **changes})


def report(*rows: Row, **changes: Any) -> SweepReport:
    facts: dict[str, Any] = {
        "status": "finished", "recipe": "demo", "data": "digits", "arch": "digits-conv",
        "threat": ThreatModel(eps="0.1"), "protocol": "standard",
        "statement": "robust accuracy under AutoAttack (upper bound)", "axes": {}, "rows": rows,
        "groups": groups(rows),
    }  # fmt: skip
    return SweepReport(**{**facts, **changes})


def test_mean_and_deviation_over_seeds_by_hand() -> None:
    found = report(row(0, shown=figures(140)), row(1, shown=figures(144)), row(2, shown=figures(142)))
    (group,) = found.groups
    assert group.seeds == (0, 1, 2)
    assert group.robust.mean == pytest.approx(0.71)
    assert group.robust.deviation == pytest.approx(0.01)  # of 0.70, 0.72, 0.71, by n - 1
    line = next(line for line in sweep_report.markdown(found).splitlines() if line.startswith("| hydra"))
    assert line == (
        "| hydra + S2AP, erk | US | 90.00% | 95.00 ± 0.00 → 93.00 ± 0.00 "
        "| 75.00 ± 0.00 → 71.00 ± 1.00 | 50,000 | 3 |"
    )


def test_a_single_seed_has_no_deviation() -> None:
    (group,) = report(row(0, shown=figures())).groups
    assert group.robust.deviation is None
    assert sweep_report.cells(group, 1)[4] == "75.00 → 70.00"


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_a_spread_is_that_of_the_sample(values) -> None:
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(statistics.fmean(values))
    assert spread.deviation == pytest.approx(statistics.stdev(values))


def test_settings_stay_apart_and_in_order() -> None:
    other = HYDRA.model_copy(update={"sparsity": 0.95})
    found = report(
        row(0, shown=figures()),
        row(0, setting=other, shown=figures()),
        row(1, shown=figures()),
        row(1, setting=other),
    )
    assert [(group.setting, group.seeds) for group in found.groups] == [(HYDRA, (0, 1)), (other, (0,))]


def test_what_is_not_in_the_table_is_told_below() -> None:
    failed = row(1, status="failed", error="no space\nleft", exit_code=2)
    skipped = Row(
        name="magnitude-s2ap", status="skipped", seed=2, values={}, error="magnitude learns no scores"
    )
    text = sweep_report.markdown(report(row(0, shown=figures()), failed, skipped))
    assert "* hydra-0.9-seed-1: failed: no space\ufffdleft\n" in text
    assert "* magnitude-s2ap: impossible: magnitude learns no scores" in text
    assert "formal_guarantee: false" in text
    assert "upper bound" in text


def test_nothing_finished_is_an_empty_table() -> None:
    text = sweep_report.markdown(report(row(0), statement=None))
    assert "waiting" in text
    assert "| hydra" not in text


def test_comma_separated_values_read_back() -> None:
    failed = row(1, status="failed", error='a "quoted", odd one\nand a line', exit_code=70)
    found = report(row(0, shown=figures(latency_ratio=None)), failed)
    first, second = csv.DictReader(io.StringIO(sweep_report.comma_separated(found)))
    assert (first["status"], first["seed"], first["robust"], first["latency_ratio"]) == (
        "finished",
        "0",
        "0.7",
        "",
    )
    assert (first["certificate_sha256"], first["sparsity_requested"]) == ("c" * 64, "0.9")
    assert (second["status"], second["robust"]) == ("failed", "")
    assert second["error"] == 'a "quoted", odd one\ufffdand a line'


def test_structures_are_the_benchmarks_words() -> None:
    words = {"weight": "US", "channel": "S", "2:4": "2:4"}
    assert {name: HYDRA.model_copy(update={"granularity": name}).structure for name in words} == words


def test_a_report_reads_back(tmp_path) -> None:
    found = report(row(0, shown=figures()), row(1, status="failed", error="x", exit_code=3))
    found.save(tmp_path)
    assert SweepReport.load(tmp_path) == found


def test_a_strangers_name_does_not_break_the_table() -> None:
    text = sweep_report.markdown(
        report(row(0, shown=figures()), recipe="a | b\n# c", data="imagefolder:x\n| y |")
    )
    assert text.splitlines()[0].startswith("# a | b\ufffd# c: imagefolder:x\ufffd")
    assert sum(line.startswith("#") for line in text.splitlines()) == 1


def paired(counts: dict[int, tuple[int, int]], sparsity: float = 0.9) -> list[Row]:
    """Rows with S2AP off and on for every seed, by the number of robust images of 200."""
    found = []
    for seed, robust in counts.items():
        for s2ap, k in zip((False, True), robust, strict=True):
            setting = HYDRA.model_copy(update={"s2ap": s2ap, "sparsity": sparsity})
            found.append(row(seed, setting=setting, shown=figures(k, sparsity=sparsity)))
    return found


def test_the_effect_of_s2ap_is_that_of_pairs_of_seeds() -> None:
    (found,) = differences(paired({0: (140, 144), 1: (120, 122), 2: (100, 100)}))
    assert found.seeds == (0, 1, 2)
    assert found.mean == pytest.approx(0.01)
    # Differences of 0.02, 0.01 and 0: deviation 0.01; t at 97.5% with two degrees of freedom is 4.302653.
    assert found.interval == pytest.approx((0.01 - 0.0248414, 0.01 + 0.0248414), abs=1e-6)
    (alone,) = differences(paired({3: (140, 138)}))
    assert alone.mean == pytest.approx(-0.01)
    assert alone.interval is None
    off_only = [each for each in paired({0: (140, 144), 1: (1, 1)}) if not (each.setting.s2ap and each.seed)]
    assert [each.seeds for each in differences(off_only)] == [(0,)]
    assert differences([row(0, shown=figures())]) == ()


def test_fewer_seeds_and_pairs_are_told_below_the_table() -> None:
    rows = [*paired({0: (140, 144), 1: (120, 122)}), *paired({0: (90, 91)}, sparsity=0.95)]
    made = report(*rows, differences=differences(rows))
    assert [each[-1] for each in sweep_report.rows(made)] == ["2", "2", "1 of 2 *", "1 of 2 *"]
    notes = list(sweep_report.notes(made))
    assert any(note.startswith("rows marked *") for note in notes)
    told = [note for note in notes if note.startswith("S2AP on minus off")]
    assert told[0].startswith("S2AP on minus off, hydra, erk at 0.9: +1.50 points robust, 95% interval [")
    assert told[1] == "S2AP on minus off, hydra, erk at 0.95: +0.50 points robust, one pair"
    same = report(*paired({0: (140, 144)}))
    assert not any("fewer" in note for note in sweep_report.notes(same))


def test_latex_escapes_what_it_would_read_as_commands() -> None:
    odd = HYDRA.model_copy(update={"method": "own_method{50%}&"})
    lines = sweep_report.latex(report(row(0, setting=odd, shown=figures()))).splitlines()
    body = lines[lines.index("\\midrule") + 1]
    assert body.startswith(r"own\_method\{50\%\}\& + S2AP, erk & US & 90.00\% & 95.00 $\rightarrow$ 93.00 & ")
    assert body.endswith(r" \\")
    assert body.count(" & ") == len(sweep_report.COLUMNS) - 1
    assert "\\begin{tabular}{llrrrrr}" in lines


def test_accuracy_over_sparsity_has_a_line_per_method_and_error_bars(tmp_path) -> None:
    rows = [*paired({0: (140, 144), 1: (120, 122)}), *paired({0: (90, 91), 1: (95, 93)}, sparsity=0.99)]
    path = sweep_report.draw_accuracy(report(*rows), tmp_path)
    assert path is not None
    drawn = path.read_text()
    assert drawn.count('class="whisker') == 8
    assert drawn.count('<path class="line t1" d="M') >= 2
    assert "hydra + S2AP, erk" in drawn
    assert sweep_report.draw_accuracy(report(), tmp_path) is None


def test_the_front_is_drawn_over_costs_that_are_equal_in_practice(tmp_path) -> None:
    near = [
        row(0, shown=figures(bytes=50_000)),
        row(1, setting=HYDRA.model_copy(update={"s2ap": False}), shown=figures(bytes=50_010)),
    ]
    path = sweep_report.draw_pareto(report(*near), tmp_path)
    assert path is not None
    labels = re.findall(r">([\d.]+) kB<", path.read_text())
    assert len(set(labels)) == len(labels) >= 2
    assert max(map(float, labels)) - min(map(float, labels)) >= 4
