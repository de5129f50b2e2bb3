"""Bundle: one file that judges a run on a device. Collect: bind what it measured there to the run."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from s2ap_deploy import files
from s2ap_deploy.errors import InputError, UsageError, VerificationError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.gating.devices import RECORD, Device, DeviceRecord
from s2ap_deploy.gating.file_checks import NamedFiles
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe import target
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import ABOUT, CERTIFICATE, Run
from s2ap_deploy.runs.manifest import Output, StageName, beside
from s2ap_deploy.runtimes.runtime import find
from s2ap_deploy.spec import Preprocessing
from s2ap_deploy.stages.certified_files import REPORT, devices, export_report, judged_record

RUNNER = "judge.py"
_SHEBANG = b"#!/usr/bin/env python3\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can hold: equal bundles have equal bytes
_NOT_THIS_RUN = "collect it in the run that its bundle was made of, or make a bundle of this one"


class _Packed(NamedTuple):
    """A file to pack: its path inside the run, what runs it, its members by name, and what answers here.

    ``rounded``: another network than the certified one, so that only a certificate of its own counts.
    """

    name: str
    sha256: str
    runtime: str
    main: str
    members: Mapping[str, Path]
    answering: Path
    rounded: bool


def bundle(
    run: Run, output: Path, file: Path | None = None, *, images: Path | None = None, most_images: int = 100
) -> str:
    """Write the bundle of an exported file and return its SHA-256.

    It holds the file, the clean and attacked points of its certificate with the expected answers, and a
    program for Python with NumPy and the file's runtime, or for a C library. Equal runs give equal bytes.

    Args:
        run: the open run folder, which is only read.
        output: the bundle.
        file: an exported file, or the folder of C sources or of a runtime; None for the run's only file.
        images: the image folder that the run was certified on, of which image files are packed as well.
        most_images: the most image files to pack.

    Raises:
        UsageError: no such file, several to choose from, or none whose answers are certified.
        RunFolderError, VerificationError: a file is not as recorded.
    """
    from s2ap_deploy.evaluation.points import load_points
    from s2ap_deploy.stages.export_device import open_artifact

    stage = _chosen(run, file)
    report = ExportReport.load(run.output(stage, REPORT))
    packed = _packed(run, stage, report, file)
    issued, name, certificate = _certificate(run, stage, packed)
    if certificate.points is None:
        raise UsageError(
            f"{issued}/{name} does not name a points file",
            code="certificate-points-missing",
            hint="certify again with --overwrite",
        )
    clean, attacked = load_points(run.output(issued, certificate.points.name), certificate.points)
    opened = open_artifact(packed.answering)
    broken = [index for index in range(len(clean)) if not bool((clean[index] == attacked[index]).all())]
    points, types = _stored_points(clean.numpy(), attacked.numpy()[broken])
    answers = opened.answers
    logits = [answers(part) for part in (clean.numpy(), attacked.numpy()[broken]) if len(part)]
    content: dict[str, bytes] = {
        "__main__.py": files.read_bytes(target.shipped().parent / "edge" / RUNNER),
        CERTIFICATE: files.read_bytes(run.output(issued, name)),
        **points,
        "points/logits.f32": np.concatenate(logits).astype("<f4").tobytes(),
        **{f"file/{member}": files.read_bytes(path) for member, path in packed.members.items()},
    }
    preprocessing = files.parse_json(opened.metadata.get("s2ap.preprocessing", "{}"))
    if images is not None:
        content |= _images(images, certificate, preprocessing, clean.numpy()[:most_images])
    about = {
        "kind": "s2ap-deploy bundle",
        "schema_version": 1,
        "tool": manifest.tool_version(),
        "certificate": {"name": f"{issued}/{name}", "sha256": certificate.sha256},
        "file": {
            "name": packed.name,
            "sha256": packed.sha256,
            "runtime": packed.runtime,
            "main": packed.main,
        },
        "input": list(opened.input_size),
        "classes": logits[0].shape[1],
        "class_names": list(opened.class_names),
        "preprocessing": preprocessing,
        "threat": certificate.threat.model_dump(),
        "n": certificate.n,
        "ids": [sample.id for sample in certificate.samples],
        "labels": [sample.label for sample in certificate.samples],
        "expected": {
            "clean": [sample.clean_prediction for sample in certificate.samples],
            "attacked": [sample.adversarial_prediction for sample in certificate.samples],
        },
        "points": {"types": types, "attacked": broken},
        "members": {member: hashlib.sha256(data).hexdigest() for member, data in content.items()},
    }
    _write(output, {**content, "bundle.json": files.canonical_json(about).encode()})
    return files.sha256(output)


def _chosen(run: Run, file: Path | None) -> StageName:
    """Return the stage that exported ``file``; None for the only one. Raises UsageError."""
    exports = run.manifest.finished("export")
    if file is None:
        if len(exports) == 1:
            return next(iter(exports))
        problem = (
            f"{run.path} holds {len(exports)} exported files" if exports else f"{run.path} has no export"
        )
        raise UsageError(
            problem,
            code="file-ambiguous" if exports else "export-missing",
            hint="name one with --file, such as export/model.onnx"
            if exports
            else f"run s2ap-deploy export --onnx --run {run.path} first",
        )
    stage = _inside(run, file).relative_to(run.path.resolve()).parts[0]
    if stage not in exports:
        raise UsageError(
            f"{file} is no exported file of {run.path}",
            code="file-not-exported",
            hint="name a file that the manifest lists, such as export/model.onnx",
        )
    return stage


def _inside(run: Run, file: Path) -> Path:
    """Return the place of a file that is named by its path, or by its path inside the run folder."""
    place = (file if file.exists() else run.path / file).resolve()
    inside = place.is_relative_to(run.path.resolve()) and place != run.path.resolve()
    if not place.exists() or not inside:
        raise UsageError(
            f"{file} is no file of the run in {run.path}",
            code="file-not-exported",
            hint="name a file that the manifest lists, such as export/model.onnx",
        )
    return place


def _packed(run: Run, stage: StageName, report: ExportReport, file: Path | None) -> _Packed:
    """Return what to pack of an export: its file, or the C library or files of a runtime beside it.

    The latter are named by their folder. The C library has the bits of its own, and the ONNX file's classes.
    """
    onnx = run.output(stage, report.file)
    place = onnx.resolve() if file is None else _inside(run, file)
    rounded = report.quantization is not None or report.rounding is not None
    if place == onnx.resolve():
        name, members = f"{stage}/{report.file}", {report.file: onnx}
        return _Packed(name, report.sha256, "onnxruntime", report.file, members, onnx, rounded)
    library, device = report.c_library, report.device
    if library is not None and place == (onnx.parent / library.folder).resolve():
        members = {Path(each.name).name: run.output(stage, each.name) for each in library.files}
        sha256, name = files.sha256(members["model.c"]), f"{stage}/{library.folder}/model.c"
        return _Packed(name, sha256, "c", "model.c", members, onnx, rounded)
    if device is not None and place == (onnx.parent / device.folder).resolve():
        members = {
            each.name.removeprefix(f"{device.folder}/"): run.output(stage, each.name) for each in device.files
        }
        name, here = f"{stage}/{device.folder}/{ABOUT}", find(device.runtime).runs_here
        answering = onnx.parent / device.folder if here else onnx
        return _Packed(name, device.sha256, device.runtime, device.main, members, answering, device.rounded)
    raise UsageError(
        f"{file} cannot be bundled",
        code="file-not-bundled",
        hint=f"name {stage}/{report.file}, or the folder of C sources or of a runtime beside it",
    )


def _certificate(run: Run, stage: StageName, packed: _Packed) -> tuple[StageName, str, Certificate]:
    """Return the certificate of the file itself, or else that of the network it came from, and its place."""
    own = beside("artifact", stage)
    if own in run.manifest.finished("artifact"):
        certificate = Certificate.load(run.output(own, CERTIFICATE))
        attacked = certificate.subject.artifact
        if attacked is not None and attacked.sha256 == packed.sha256:
            return own, CERTIFICATE, certificate
    if packed.rounded:
        raise UsageError(
            f"{packed.name} holds rounded values, and no certificate of its own is there",
            code="file-not-certified",
            hint=f"s2ap-deploy certify --artifact {packed.name} --run {run.path}",
        )
    certified = run.manifest.finished("certify").get("certify")
    named = [] if certified is None else [output.path for output in certified.outputs]
    for name in ("pruned.json", "dense.json"):
        if f"certify/{name}" in named:
            return "certify", name, Certificate.load(run.output("certify", name))
    raise UsageError(
        f"{run.path} holds no certificate of {packed.name}",
        code="certificate-missing",
        hint=f"run s2ap-deploy certify --run {run.path} first",
    )


def _stored_points(
    clean: NDArray[np.float32], attacked: NDArray[np.float32]
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return points [n, C, H, W] as members, and their types: levels of 1/255 as bytes, others as floats."""
    members, types = {}, {}
    for name, images in (("clean", clean), ("attacked", attacked)):
        levels = np.rint(images * 255).clip(0, 255).astype(np.uint8)
        exact = bool((levels.astype(np.float32) / np.float32(255) == images).all())
        types[name] = "u8" if exact else "f32"
        members[f"points/{name}.{types[name]}"] = (levels if exact else images.astype("<f4")).tobytes()
    return members, types


def _images(
    folder: Path, certificate: Certificate, preprocessing: Any, clean: NDArray[np.float32]
) -> dict[str, bytes]:
    """Return the image files of the points ``clean`` [n, C, H, W] as members, by the ids of their samples.

    Raises UsageError for a folder whose images are not those points.
    """
    from s2ap_deploy.data import imagefolder

    steps, found = Preprocessing.model_validate(preprocessing), {}
    for sample, point in zip(certificate.samples, clean, strict=False):
        path = files.within(folder, sample.id)
        same = path.is_file() and np.array_equal(
            imagefolder.decode(str(path), steps).astype(np.float32) / np.float32(255), point
        )
        if not same:
            raise UsageError(
                f"{path} is not the image that was certified",
                code="image-not-certified",
                hint="name the image folder of the run's certificate, with its images unchanged",
            )
        found[f"images/{sample.id}"] = files.read_bytes(path)
    return found


def _write(output: Path, content: Mapping[str, bytes]) -> None:
    """Write a zip file that Python runs; nothing in it is compressed. Raises StorageError."""
    with files.atomic(output) as temporary, open(temporary, "wb") as stream:
        stream.write(_SHEBANG)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, data in content.items():
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
                archive.writestr(entry, data)


def _outputs(run: Run) -> Iterator[tuple[StageName, Output]]:
    """Yield the outputs of the stages that certify and export, with the stage."""
    for kind in ("certify", "export", "artifact"):
        for stage, record in run.manifest.finished(kind).items():
            for output in record.outputs:
                yield stage, output


def collect(run: Run, record: Path, *, name: str | None = None, overwrite: bool = False) -> Device:
    """Store the record of a device in the run, and judge the answers in it.

    Args:
        run: the open, locked run folder.
        record: ``device.json``, as the bundle wrote it.
        name: the device's name in the run; None for the one in the record.
        overwrite: replace another record of this name.

    Raises:
        InputError: the record is damaged, was edited, contradicts itself, or is of another run.
        RunFolderError: the name holds another record.
    """
    found = DeviceRecord.load(record)
    stage = f"device-{name or found.name}"
    if not manifest.is_stage(stage):
        raise UsageError(
            f"a device cannot be named {name!r}",
            code="device-name-invalid",
            hint="a-z, 0-9, '.', '_' and '-', a letter or digit first",
        )
    places = {output.sha256: (of, output.path) for of, output in _outputs(run)}
    certificate, file = (places.get(each) for each in (found.certificate_sha256, found.file_sha256))
    if certificate is None or file is None:
        what = "certificate" if certificate is None else "exported file"
        raise InputError(
            f"{record} was measured with a bundle of another {what} than the run in {run.path} has",
            code="device-record-foreign",
            hint=_NOT_THIS_RUN,
        )
    for name_in_run in (certificate[1], file[1]):
        if files.sha256(files.within(run.path, name_in_run)) not in places:
            raise VerificationError(
                f"{name_in_run} in {run.path} is not as recorded",
                code="output-damaged",
                hint="repeat the command that wrote it with --resume",
            )
    issued = Certificate.load(files.within(run.path, certificate[1]))
    judged_record(found, issued, 1.0, str(record))
    inputs = {
        "record": files.sha256(record),
        "certificate": found.certificate_sha256,
        "file": found.file_sha256,
        "certified_by": certificate[0],
        "export": file[0],
    }
    entered = run.stage(stage, inputs=inputs, resume=False, overwrite=overwrite)
    if entered.state != "finished":
        files.write_bytes(entered.folder / RECORD, files.read_bytes(record))
        entered.finish([entered.folder / RECORD], {"p50_ms": found.p50_ms, "p95_ms": found.p95_ms})
    named = NamedFiles(run.path)
    reports = {
        each: report
        for each in run.manifest.of_kind("export")
        if (report := export_report(run.path, run.manifest, named, each)) is not None
    }
    return next(
        device
        for device in devices(run.path, run.manifest, {issued.sha256: issued}, reports)
        if f"device-{device.name}" == stage
    )
