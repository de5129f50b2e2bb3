"""An exported file certified itself, from the command line: int8, and one from elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.onnx_export.export_report import ExportReport

Command = Callable[..., Any]
QUICK = ["--n", 80, "--protocol", "quick", "--threads", 1, "--workers", 1]


@pytest.fixture(scope="module")
def int8_run(digits_model, tmp_path_factory, s2ap) -> Path:
    """A network attacked in float32 at twice the radius it was trained for, then exported as int8."""
    run = tmp_path_factory.mktemp("int8") / "run"
    done = s2ap("certify", digits_model, "--eps", "0.2", *QUICK, "--run", run)
    assert done.code == 0, done.err
    done = s2ap("export", "--int8", "--calibration-images", 32, "--run", run, "--threads", 1)
    assert done.code == 0, done.err
    assert f"certify --artifact {run}/export/model-int8.onnx --run {run}" in done.err
    return run


@pytest.fixture(scope="module")
def certified(int8_run, tmp_path_factory, s2ap) -> Path:
    run = Path(shutil.copytree(int8_run, tmp_path_factory.mktemp("certified") / "run"))
    done = s2ap(
        "certify", "--artifact", "export/model-int8.onnx", "--run", run, "--threads", 1, "--workers", 1
    )
    assert done.code == 0, done.err
    return run


def test_the_report_says_what_int8_is(int8_run) -> None:
    report = ExportReport.load(int8_run / "export" / "report.json")
    assert report.quantization is not None
    assert report.quantization.calibration_images == 32
    assert report.bytes < report.quantization.float_bytes
    assert (report.agreement.tolerance, report.agreement.passed) == (None, True)
    assert any("does not cover" in warning for warning in report.warnings)


def test_a_float_certificate_does_not_pass_an_int8_file(int8_run, tmp_path, s2ap) -> None:
    run = shutil.copytree(int8_run, tmp_path / "run")
    done = s2ap("gate", "--min-clean", "0.5", "--rule", "point", "--run", run)
    assert done.code == 3
    assert f"certify the file itself with s2ap-deploy certify --artifact {run}/export/" in done.out


def test_transferred_accuracy_of_int8_is_higher_than_attacked_and_caught(certified) -> None:
    certificate = Certificate.load(certified / "artifact" / "certificate.json")
    file = certificate.subject.artifact
    assert file is not None
    assert file.quantized
    assert file.twin.matches
    assert file.transfer is not None
    float_certificate = Certificate.load(certified / "certify" / "dense.json")
    # What a judge of stored points would report, against what the certificate reports.
    assert file.transfer.survived > certificate.survivors[1]
    assert file.transfer.n == certificate.n == float_certificate.n
    assert {sample.broken_by for sample in certificate.samples} >= {"transfer", "apgd-ce"}


def test_the_file_is_covered_by_its_own_certificate(certified, tmp_path, s2ap) -> None:
    run = shutil.copytree(certified, tmp_path / "run")
    done = s2ap("gate", "--min-clean", "0.5", "--rule", "point", "--run", run)
    assert "file export/model-int8.onnx is the attacked file" in done.out
    with (run / "export" / "model-int8.onnx").open("ab") as stream:
        stream.write(b"\0")
    assert s2ap("gate", "--min-clean", "0.5", "--rule", "point", "--run", run).code == 1


def test_a_second_time_is_skipped(certified, tmp_path, s2ap) -> None:
    run = shutil.copytree(certified, tmp_path / "run")
    before = (run / "artifact" / "certificate.json").read_bytes()
    done = s2ap("certify", "--artifact", "export/model-int8.onnx", "--run", run, "--json")
    assert "already done" in done.err
    assert json.loads(done.out)["certify"]["file"]["quantized"] is True
    assert (run / "artifact" / "certificate.json").read_bytes() == before


def test_a_file_from_elsewhere(int8_run, certified, tmp_path, s2ap) -> None:
    file = Path(shutil.copy(int8_run / "export" / "model-int8.onnx", tmp_path / "robust.onnx"))
    run = tmp_path / "run"
    done = s2ap("certify", "--artifact", file, "--eps", "0.2", *QUICK, "--run", run)
    assert done.code == 0, done.err
    alone = Certificate.load(run / "artifact" / "certificate.json")
    at_home = Certificate.load(certified / "artifact" / "certificate.json")
    assert alone.subject.artifact is not None
    assert alone.subject.artifact.transfer is None
    assert (alone.clean, alone.data) == (at_home.clean, "digits")
    assert alone.subject.weights_sha256 == at_home.subject.weights_sha256
    done = s2ap("gate", "--min-clean", "0.5", "--rule", "point", "--run", run)
    assert "file artifact/model.onnx is the attacked file" in done.out


def test_what_does_not_go_together(int8_run, digits_model, tmp_path, s2ap) -> None:
    file = int8_run / "export" / "model-int8.onnx"
    for wrong in (["--provable"], [digits_model], ["--curve"]):
        done = s2ap("certify", *wrong, "--artifact", file, "--run", tmp_path / "run")
        assert done.code == 2
        assert "cannot be combined with --artifact" in done.err
    done = s2ap("certify", "--artifact", tmp_path / "none.onnx", "--run", tmp_path / "run")
    assert done.code == 2
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    done = s2ap("certify", "--artifact", tmp_path / "bad.onnx", "--run", tmp_path / "run")
    assert done.code == 2
    assert not (tmp_path / "run").exists()


def test_a_file_of_another_run(finished_run, int8_run, s2ap) -> None:
    file = int8_run / "export" / "model-int8.onnx"
    done = s2ap("certify", "--artifact", file, "--run", finished_run)
    assert done.code == 2
    assert "is not the file that the run in" in done.err


def verified(run: Path, s2ap: Command, *options: object) -> Any:
    done = s2ap(
        "verify", run / "artifact" / "certificate.json", "--k", 2, "--seed", 3,
        "--threads", 1, "--workers", 1, "--json", *options,
    )  # fmt: skip
    return done.code, json.loads(done.out) if done.out else done.err


def test_a_certificate_of_a_file_is_verified_on_the_file(certified, files_in, s2ap) -> None:
    before = files_in(certified)
    code, found = verified(certified, s2ap)
    assert code == 0, [check for check in found["checks"] if check["status"] != "pass"]
    assert found["attacked"] == 2
    assert files_in(certified) == before
    certificate = Certificate.load(certified / "artifact" / "certificate.json")
    assert certificate.subject.artifact is not None
    (subject,) = found["subjects"]
    assert subject == {"name": "export/model-int8.onnx", "sha256": certificate.subject.artifact.sha256}
    messages = [check["message"] for check in found["checks"]]
    assert f"answers: {certificate.n} of {certificate.n} attacked images as recorded" in messages
    assert any("new attacks: 2 of 2 images withstand again" in line for line in messages)


def test_a_file_that_was_changed_or_is_gone_is_not_verified(certified, tmp_path, s2ap) -> None:
    run = Path(shutil.copytree(certified, tmp_path / "run"))
    with (run / "export" / "model-int8.onnx").open("ab") as stream:
        stream.write(b"\0")
    code, found = verified(run, s2ap)
    assert code == 1
    assert any("export/model-int8.onnx is not the one" in check["message"] for check in found["checks"])
    (run / "export" / "model-int8.onnx").unlink()
    code, found = verified(run, s2ap)
    assert code == 3
    assert any("export/model-int8.onnx is missing" in check["message"] for check in found["checks"])


def test_the_run_s_own_settings_are_taken_over(certified, tmp_path, s2ap) -> None:
    """Also after another command has replaced the recipe; other options are warned of before the work."""
    run = Path(shutil.copytree(certified, tmp_path / "run"))
    again = ["certify", "--artifact", "export/model-int8.onnx", "--run", run, "--threads", 1, "--workers", 1]
    other = s2ap(*again, "--n", 20, "--attack-seed", 3, "--overwrite")
    assert other.code == 0, other.err
    warned, _, worked = other.err.partition("attacking the file itself on 20 test images")
    assert "number of images 20, not 80; attack seed 3, not 0; other images" in warned
    assert worked
    same = s2ap(*again, "--overwrite")
    assert same.code == 0, same.err
    assert "otherwise" not in same.err
    first, second = (each / "artifact" / "certificate.json" for each in (certified, run))
    assert Certificate.load(first).samples == Certificate.load(second).samples
