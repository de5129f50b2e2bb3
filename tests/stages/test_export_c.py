"""The C library of an exported file: what is written, built, judged and refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from s2ap_deploy.c_export.lowering import _STEPS
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.onnx_export.inference import logits, session

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
GATE = ("gate", "--min-robust", "0.0")
FILES = {
    "CMakeLists.txt",
    "Makefile",
    "model.c",
    "model.h",
    "model.json",
    "model.py",
    "selftest.c",
    "vectors.bin",
}


def exported(run) -> ExportReport:
    return ExportReport.load(run / "export-c" / "report.json")


@needs_compiler
def test_a_folder_that_answers_as_onnx_runtime(own_run, s2ap) -> None:
    s2ap.ok("export", "--c", "--run", own_run)
    folder, report = own_run / "export-c" / "c", exported(own_run)
    assert {path.name for path in folder.iterdir()} == FILES
    library = report.c_library
    assert library is not None
    assert library.agreement is not None
    assert library.agreement.passed
    assert [check.same_predictions for check in library.points_checks] == [True]
    # The files that were written build as their Makefile says, and answer bit for bit.
    make = ["make", "-C", str(folder), "CFLAGS=-O1", "MARCH=native"]
    subprocess.run([*make, "libmodel.so"], check=True, capture_output=True)
    tested = subprocess.run([*make, "test"], check=True, capture_output=True, text=True)
    assert "8 of 8 images as expected, bit for bit" in tested.stdout
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import model, numpy\n"
        "print(model.run(numpy.linspace(0, 1, 64).reshape(1, 8, 8)).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    expected = logits(session(own_run / "export-c" / report.file), image[None])[0]
    np.testing.assert_allclose(json.loads(said.stdout), expected, atol=1e-5 * max(1, np.abs(expected).max()))
    for name in ("libmodel.so", "selftest"):  # what was built here is no file of the run
        (folder / name).unlink()
    s2ap.ok(*GATE, "--run", own_run)
    # The folder is attacked itself; sources that are not those of the file are not built.
    s2ap.ok("certify", "--artifact", folder, "--run", own_run, "--n", "4")
    attacked = Certificate.load(own_run / "artifact-c" / "certificate.json").subject.artifact
    assert attacked is not None
    assert (attacked.format, attacked.twin.matches) == ("c", True)
    (folder / "model.c").write_text((folder / "model.c").read_text() + "\n")
    assert s2ap(*GATE, "--run", own_run).code == 1
    changed = s2ap("certify", "--artifact", folder, "--run", own_run, "--json")
    assert (changed.code, changed.answer["code"]) == (1, "c-sources-differ")


@needs_compiler
def test_a_benchmark_times_the_library_too(own_run, s2ap) -> None:
    s2ap.ok("export", "--c", "--bench", "--run", own_run)
    library = exported(own_run).c_library
    assert library is not None
    assert library.times is not None
    assert library.times.pairs >= 5
    assert 0 < library.times.ratio < 10


def test_without_a_compiler_nothing_is_judged(own_run, s2ap, monkeypatch) -> None:
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    s2ap.ok("export", "--c", "--run", own_run)
    library = exported(own_run).c_library
    assert library is not None
    assert (library.compiler, library.agreement, library.points_checks) == (None, None, ())
    assert (own_run / "export-c" / "c" / "model.c").is_file()
    assert s2ap(*GATE, "--run", own_run).code == 3


@pytest.mark.skipif(shutil.which("false") is None, reason="needs the program false")
def test_a_compiler_that_fails_leaves_no_file(own_run, s2ap, monkeypatch) -> None:
    monkeypatch.setenv("CC", "false")
    done = s2ap("export", "--c", "--run", own_run, "--json")
    assert (done.code, done.answer["code"]) == (1, "compiler-failed")
    assert not list((own_run / "export-c").glob("*.onnx"))


def test_an_unknown_operator_is_refused_before_anything_is_written(own_run, s2ap, monkeypatch) -> None:
    monkeypatch.delitem(_STEPS, "Relu")
    done = s2ap.refused("operator-unsupported", "export", "--c", "--run", own_run)
    assert "Relu" in done.answer["error"]
    assert not list((own_run / "export-c").glob("*"))


def test_a_folder_that_exists_is_kept_unless_it_may_be_overwritten(own_run, s2ap, monkeypatch) -> None:
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    s2ap.ok("export", "--c", "--run", own_run)
    source = own_run / "export-c" / "c" / "model.c"
    before = source.stat().st_mtime_ns
    assert s2ap("export", "--c", "--c-positions", "small", "--run", own_run, "--json").code == 2
    assert source.stat().st_mtime_ns == before
    s2ap.ok("export", "--c", "--c-positions", "small", "--overwrite", "--run", own_run)
    assert source.stat().st_mtime_ns > before


def test_a_microcontroller_has_limits(own_run, s2ap, monkeypatch) -> None:
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    for limit in ("--max-flash", "--max-ram"):
        words = ("--target", "cortex-m", limit, 1000, "--overwrite", "--run", own_run, "--json")
        missed = s2ap("export", *words)
        assert (missed.code, missed.answer["code"]) == (1, "budget-missed")
    assert not list(own_run.glob("export*/c/*"))
    limits = ("--max-flash", 200_000, "--max-ram", 40_960)
    s2ap.ok("export", "--target", "cortex-m", *limits, "--overwrite", "--run", own_run)
    (source,) = own_run.glob("export*/c/model.c")
    library = ExportReport.load(source.parents[1] / "report.json").c_library
    assert library is not None
    assert library.static
    assert (library.flash_bytes or 0) > 50_000
    assert (library.ram_bytes or 0) < 40_960
    names = {file.name for file in library.files}
    assert {"c/cortex-m.ld", "c/startup.c", "c/device.c"} <= names


def test_without_a_cross_compiler_only_weights_are_counted(own_run, s2ap, monkeypatch) -> None:
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    monkeypatch.setattr("s2ap_deploy.c_export.library.CROSS", ("there-is-no-such-compiler",))
    done = s2ap.ok("export", "--c", "--c-static", "--run", own_run)
    assert "the flash of the code is not counted" in done.err


@pytest.mark.parametrize("option", [("--c-static",), ("--max-flash", "9"), ("--max-ram", "9")])
def test_options_of_c_sources_need_c_sources(own_run, s2ap, option) -> None:
    s2ap.refused("c-option-without-c", "export", *option, "--run", own_run)


@needs_compiler
def test_int8_arithmetic_is_judged_like_any_file(own_run, s2ap) -> None:
    s2ap.ok("export", "--c", "--int8", "--run", own_run)
    folder = own_run / "export-int8-c" / "c"
    library = ExportReport.load(folder.parent / "report.json").c_library
    assert library is not None
    assert library.agreement is not None
    assert library.agreement.passed
    assert library.agreement.max_logit_difference <= library.agreement.largest_logit / 127
    assert "float *const" not in (folder / "model.c").read_text()
    s2ap.ok("certify", "--artifact", folder, "--run", own_run, "--n", "4")
    attacked = Certificate.load(own_run / "artifact-int8-c" / "certificate.json").subject.artifact
    assert attacked is not None
    assert (attacked.format, attacked.quantized, attacked.twin.matches) == ("c", True, True)
    (folder / "model.c").write_text((folder / "model.c").read_text() + "\n")
    assert s2ap(*GATE, "--run", own_run).code == 1
