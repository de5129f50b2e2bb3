"""Convert an exported file for the runtime of a device, run the result, and compare its answers."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError, VerificationError
from s2ap_deploy.onnx_export import onnx_file
from s2ap_deploy.onnx_export.encoding import decode
from s2ap_deploy.onnx_export.export_onnx import ExportSource, export_onnx
from s2ap_deploy.onnx_export.export_report import CompactFile, DeviceFile, ExportReport
from s2ap_deploy.onnx_export.onnx_file import OnnxFile
from s2ap_deploy.onnx_export.verification import check_answers, compare_logits, compare_rounded
from s2ap_deploy.recipe.field_types import ArtifactFormat
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.records import Agreement, PointsCheck
from s2ap_deploy.runs.folder import ABOUT
from s2ap_deploy.runtimes import convert
from s2ap_deploy.runtimes.runtime import DeviceAnswers, Runtime, find
from s2ap_deploy.stages.export_c import open_library


@dataclass(frozen=True, eq=False)
class DeviceArtifact(OnnxFile):
    """Files of a runtime: gradients are those of the ONNX file beside them, answers those of the runtime.

    ``content`` and ``sha256`` are those of ``model.json``, which holds the hashes of all files.
    """

    device: DeviceFile
    run: DeviceAnswers

    @property
    def format(self) -> ArtifactFormat:
        return self.device.runtime

    @property
    def answers(self) -> DeviceAnswers:  # type: ignore[override]
        return self.run

    @property
    def software(self) -> dict[str, str]:
        """The versions that answers depend on, those of the runtime as it is installed here."""
        return find(self.device.runtime).versions()

    @property
    def precision(self) -> str:
        return self.device.precision


def refuse_unfit(section: ExportSection) -> Runtime | None:
    """Return the runtime that a file is converted for; refuse one that is missing. Raises UsageError."""
    if section.convert is None:
        return None
    runtime = find(section.convert)
    kind = "int8" if section.int8 else "float32"
    if kind not in runtime.bits:
        raise UsageError(
            f"files of {runtime.title} are made in {' and '.join(runtime.bits)} here, not in {kind}",
            code="runtime-dtype-unsupported",
            hint="leave out --int8",
        )
    runtime.require()
    return runtime


def add_device_file(
    file: Path,
    runtime: Runtime,
    source: ExportSource,
    section: ExportSection,
    report: ExportReport,
    recorder: Recorder,
) -> tuple[ExportReport, list[Path]]:
    """Convert ``file`` into a folder beside it that has the runtime's name; return its report and the files.

    Raises VerificationError where the converter or the runtime fails, or other answers come back.
    """
    opened = onnx_file.load(file)
    recorder.note(f"converting for {runtime.title}, in a process of its own")
    calibration = source.calibration if runtime.quantizes else None
    made = convert.convert(runtime, _source(opened, runtime, source, section), calibration)
    if not made.isolated:
        recorder.warn(f"the converter of {runtime.title} could not be cut off from the network here")
    expected = opened.answers(source.images)
    agreement: Agreement | None = None
    checks: tuple[PointsCheck, ...] = ()
    if runtime.runs_here:
        answers = DeviceAnswers(runtime.name, made.files, expected.shape[1])
        found = answers(source.images)
        if section.int8 and runtime.quantizes:
            agreement = compare_rounded(expected, found)
        else:
            agreement = compare_logits(found, expected, quantized=section.int8)
        if not agreement.passed:
            raise VerificationError(
                f"{runtime.title} differs from ONNX Runtime by up to {agreement.max_logit_difference:.3g}, "
                f"and gives {agreement.argmax_agree} of {agreement.n} images the same class",
                code="device-logits-differ",
            )
        checks = tuple(
            check_answers(answers(points.clean), answers(points.adversarial), points)
            for points in source.certified
        )
    else:
        recorder.warn(
            f"{runtime.title} predicts on {' and '.join(runtime.systems)} only: the file was converted, and "
            "nothing of it was judged"
        )
    about = _about(opened, runtime, made.files, expected.shape[1])
    content = {**made.files, ABOUT: about}
    record = DeviceFile(
        runtime=runtime.name,
        folder=runtime.name,
        main=runtime.main,
        files=tuple(
            CompactFile(name=f"{runtime.name}/{name}", sha256=hashlib.sha256(data).hexdigest())
            for name, data in sorted(content.items())
        ),
        sha256=hashlib.sha256(about).hexdigest(),
        bytes=sum(map(len, made.files.values())),
        classes=expected.shape[1],
        precision="int8" if section.int8 else runtime.precision,
        rounded=report.quantization is not None or report.rounding is not None,
        agreement=agreement,
        points_checks=checks,
        versions=runtime.versions(),
        seconds=made.seconds,
        isolated=made.isolated,
    )
    return report.model_copy(update={"device": record}), _write(file.parent / runtime.name, content)


def open_artifact(path: Path) -> OnnxFile:
    """Open what can be attacked: an ONNX file, a folder of C sources, or the files of a runtime.

    The latter two may be named by their folder or by a file in it. Raises what opening them raises.
    """
    folder = path if path.is_dir() else path.parent
    for around in (folder, *folder.parents[:3]):
        report = around.parent / "report.json"
        # Other programs write files of that name too; the folders of an export hold model.json.
        if not report.is_file() or not (around / ABOUT).is_file():
            continue
        known = ExportReport.load(report)
        if known.device is not None and known.device.folder == around.name:
            return _open_device(around, known, known.device)
        if known.c_library is not None and known.c_library.folder == around.name:
            return open_library(around)
    return open_library(path) if path.is_dir() else onnx_file.load(path)


def _open_device(folder: Path, report: ExportReport, device: DeviceFile) -> DeviceArtifact:
    """Open the files of a runtime that an export wrote, as they were written.

    Raises UsageError without the runtime, and VerificationError where a file is missing or changed.
    """
    find(device.runtime).require()
    content = {}
    for each in device.files:
        path = files.within(folder.parent, each.name)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != each.sha256:
            raise VerificationError(
                f"{path} is not the file that was exported; nothing was run",
                code="device-file-differs",
                hint="export again with --overwrite",
            )
        content[path.relative_to(folder).as_posix()] = data
    opened = onnx_file.load(files.within(folder.parent, report.file))
    about = content.pop(ABOUT)
    known = {each.name: getattr(opened, each.name) for each in dataclasses.fields(OnnxFile)}
    known |= {"path": folder / ABOUT, "content": about, "sha256": device.sha256}
    known["quantized"] = opened.quantized or device.precision == "int8"
    answers = DeviceAnswers(device.runtime, content, device.classes)
    return DeviceArtifact(**known, device=device, run=answers)


def _source(opened: OnnxFile, runtime: Runtime, source: ExportSource, section: ExportSection) -> bytes:
    """Return the ONNX file that the converter reads: encoded, decoded, or before its int8 arithmetic."""
    if runtime.encoded:
        return opened.content
    if not section.int8:
        return bytes(decode(opened.model).SerializeToString())
    plain = dataclasses.replace(source, calibration=None, ranges=None, certified=[])
    wanted = section.model_copy(update={"int8": False, "encoding": "dense"})
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(plain, wanted, path, Silent())
        return path.read_bytes()


def _about(opened: OnnxFile, runtime: Runtime, made: dict[str, bytes], classes: int) -> bytes:
    return files.canonical_json(
        {
            "schema_version": 1,
            "runtime": runtime.name,
            "onnx_sha256": opened.sha256,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(made.items())},
            "input": list(opened.input_size),
            "classes": classes,
            "class_names": list(opened.class_names),
            "versions": runtime.versions(),
            "metadata": dict(sorted(opened.metadata.items())),
        }
    ).encode()


def _write(folder: Path, content: dict[str, bytes]) -> list[Path]:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(folder / name, data)
    return [folder / name for name in sorted(content)]
