"""Write the C library of an exported file, build it, and compare its answers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s2ap_deploy import files
from s2ap_deploy.c_export.assembling import Facts, Images, Sources, folder_files, vectors
from s2ap_deploy.c_export.library import Library, build, compiler, device_code
from s2ap_deploy.c_export.writing import write_sources
from s2ap_deploy.errors import UsageError, VerificationError
from s2ap_deploy.onnx_export import onnx_file
from s2ap_deploy.onnx_export.benchmark import inference, summary, timed_pairs
from s2ap_deploy.onnx_export.export_onnx import ExportSource
from s2ap_deploy.onnx_export.export_report import LATENCY_STATEMENT, CLibrary, CompactFile, ExportReport
from s2ap_deploy.onnx_export.inference import logits
from s2ap_deploy.onnx_export.onnx_file import OnnxFile
from s2ap_deploy.onnx_export.verification import (
    CertifiedPoints,
    check_answers,
    compare_answers,
    compare_logits,
)
from s2ap_deploy.recipe.field_types import ArtifactFormat
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.records import Agreement, PointsCheck
from s2ap_deploy.runs.folder import ABOUT

FOLDER = "c"
VECTORS = 8


def refuse_unfit(section: ExportSection) -> None:
    """Refuse options of C sources without them. Raises UsageError."""
    if not section.c and (section.c_static or section.max_flash or section.max_ram):
        raise UsageError(
            "--c-static, --max-flash and --max-ram are about C sources",
            code="c-option-without-c",
            hint="add --c",
        )


def generate(opened: OnnxFile, section: ExportSection) -> Sources:
    """Return the sources for an exported file: the same ones every time. Raises UsageError."""
    facts = Facts(class_names=opened.class_names, sentences=_sentences(opened))
    return write_sources(
        opened.model, facts, values=section.values, positions=section.c_positions, static=section.c_static
    )


@dataclass(frozen=True, eq=False)
class LibraryFile(OnnxFile):
    """A folder of C sources: gradients are those of the ONNX file beside it, answers those of the library.

    ``content`` and ``sha256`` are those of ``model.c``, which holds the checksums of its weights.
    """

    library: Library

    @property
    def format(self) -> ArtifactFormat:
        return "c"

    @property
    def answers(self) -> Library:  # type: ignore[override]
        return self.library


def open_library(folder: Path) -> LibraryFile:
    """Build the library of an exported folder: its sources are generated again, and must be those in it.

    Raises:
        UsageError: no export report is beside the folder, or there is no compiler.
        VerificationError: a source or the weights differ from those that the ONNX file gives.
    """
    path = folder.parent / "report.json"
    report = ExportReport.load(path) if path.is_file() else None
    if report is None or report.c_library is None or report.c_library.folder != folder.name:
        raise UsageError(
            f"{folder} is not the folder of C sources of an export",
            code="c-folder-unknown",
            hint="give the folder c that export --c wrote, inside of its run",
        )
    opened = onnx_file.load(files.within(folder.parent, report.file))
    section = ExportSection(
        values=report.values, c_positions=report.c_library.positions, c_static=report.c_library.static
    )
    sources = generate(opened, section)
    for name, content in sources.files.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            raise VerificationError(
                f"{folder / name} is not what {report.file} gives; nothing was built",
                code="c-sources-differ",
                hint="export again with --overwrite",
            )
    library = built(sources)
    if library is None:
        raise UsageError(
            "there is no C compiler to build the library with",
            code="compiler-missing",
            hint="install cc, or set CC",
        )
    source = sources.files["model.c"]
    known = {each.name: getattr(opened, each.name) for each in dataclasses.fields(OnnxFile)}
    known |= {"path": folder / "model.c", "content": source, "sha256": hashlib.sha256(source).hexdigest()}
    return LibraryFile(**known, library=library)


def built(sources: Sources) -> Library | None:
    """Build sources with the system's compiler; None where there is none. Raises VerificationError."""
    command = compiler()
    return None if command is None else Library.of(sources, build(sources.files, command))


def timed(file: Path, section: ExportSection, report: CLibrary) -> CLibrary:
    """Add the library's times against the ONNX file ``file``: one image, one thread, pair by pair."""
    opened = onnx_file.load(file)
    library = built(generate(opened, section))
    if library is None:
        return report
    shape = library.image_shape
    image = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    pairs = timed_pairs(
        lambda: library(image), inference(opened.answers.running, image), repeats=200, seconds=2.0
    )
    return report.model_copy(update={"times": summary(pairs)})


def add_library(
    file: Path, source: ExportSource, section: ExportSection, report: ExportReport, recorder: Recorder
) -> tuple[ExportReport, list[Path]]:
    """Write the library of ``file`` into the folder ``c`` next to it; return its report and the files.

    Raises:
        UsageError: an operator has no kernel; nothing was written.
        VerificationError: the compiler fails, or the library answers differently from ONNX Runtime.
    """
    opened = onnx_file.load(file)
    sources = generate(opened, section)
    library = built(sources)
    expected = logits(opened.answers.running, source.images)
    agreement = None
    checks: list[PointsCheck] = []
    if library is None:
        recorder.warn(
            "no C compiler was found (CC, cc): the sources are written, and nothing of them was judged"
        )
        sample = expected[:VECTORS]
    else:
        found = library(source.images)
        agreement = _compared(expected, found, opened, recorder)
        if not agreement.passed:
            raise VerificationError(
                f"the C library differs from ONNX Runtime by up to {agreement.max_logit_difference:.3g} "
                f"(allowed {agreement.tolerance:.3g})",
                code="c-logits-differ",
            )
        checks = [_check_points(library, each) for each in source.certified]
        sample = found[:VECTORS]
    content = {
        **sources.files,
        **folder_files(section.c_static),
        "vectors.bin": vectors(source.images[:VECTORS], sample, exact=library is not None),
    }
    flash, ram = _device_bytes(sources, section, recorder)
    content[ABOUT] = _about(opened, sources, content).encode()
    written = _write(file.parent / FOLDER, content)
    layers = sources.layers.values()
    record = CLibrary(
        folder=FOLDER,
        files=tuple(_described(f"{FOLDER}/{name}", data) for name, data in sorted(content.items())),
        positions=section.c_positions,
        static=section.c_static,
        flash_bytes=flash,
        ram_bytes=ram,
        bytes=len(sources.files.get("weights.bin", b"")) + (0 if library is None else library.bytes),
        workspace_bytes=sources.workspace_bytes,
        kept_weights=sum(layer.kept for layer in layers),
        stored_entries=sum(layer.entries for layer in layers),
        compiler=None if library is None else shlex.join(compiler() or []),
        agreement=agreement,
        points_checks=tuple(checks),
    )
    words = report.statement.replace(LATENCY_STATEMENT, record.statement)
    return report.model_copy(update={"c_library": record, "statement": words}), written


def _compared(expected: Images, found: Images, opened: OnnxFile, recorder: Recorder) -> Agreement:
    """Compare logits with ONNX Runtime's; name the images whose int8 classes differ.

    Integers are rounded like ONNX Runtime's floats but for ties and their rounding errors.
    """
    if not opened.quantized:
        return compare_answers(expected, found)
    classes = np.stack([expected.argmax(1), found.argmax(1)], axis=1)
    other = [f"{i} ({a} to {b})" for i, (a, b) in enumerate(classes.tolist()) if a != b]
    if other:
        recorder.warn(
            f"int8 arithmetic in C gives other classes than ONNX Runtime on images {', '.join(other)}"
        )
    return compare_logits(found, expected, quantized=True)


def _device_bytes(
    sources: Sources, section: ExportSection, recorder: Recorder
) -> tuple[int | None, int | None]:
    """Return the flash and the working memory that static sources take on a device.

    Raises VerificationError where one is over its limit.
    """
    if not (section.c_static or section.max_flash or section.max_ram):
        return None, None
    code = device_code(sources.files) if sources.embedded else None
    if code is None:
        recorder.warn("no cross compiler (arm-none-eabi-gcc) was used: the flash of the code is not counted")
    floats = math.prod(sources.image_shape) + sources.classes
    found = (code or len(sources.weights), sources.workspace_bytes + 4 * floats)
    for name, limit, value in zip(("flash", "ram"), (section.max_flash, section.max_ram), found, strict=True):
        if limit is not None and value > limit:
            raise VerificationError(
                f"the C library takes {value:,} bytes of {name}, at most {limit:,} are allowed",
                code="budget-missed",
                hint="prune more weights, or store them with --values float16 or int8",
            )
    return found


def _check_points(library: Library, points: CertifiedPoints) -> PointsCheck:
    return check_answers(library(points.clean), library(points.adversarial), points)


def _write(folder: Path, content: dict[str, bytes]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, data in content.items():
        files.write_bytes(folder / name, data)
    return [folder / name for name in sorted(content)]


def _described(name: str, data: bytes) -> CompactFile:
    return CompactFile(name=name, sha256=hashlib.sha256(data).hexdigest())


def _sentences(opened: OnnxFile) -> tuple[str, ...]:
    """State what an engineer on the device needs to know, from the metadata of the file."""
    known = opened.metadata
    names = {"s2ap.arch": "Architecture", "s2ap.threat_model": "Threat model", "s2ap.sparsity": "Sparsity"}
    if "s2ap.sparsity" in known:
        known = {**known, "s2ap.sparsity": f"{float(known['s2ap.sparsity']):.4g} of the weights are zero"}
    found = [f"{text}: {known[key]}." for key, text in names.items() if key in known]
    return (*found, "Normalization is part of the network: pixels are in [0, 1].")


def _about(opened: OnnxFile, sources: Sources, content: dict[str, bytes]) -> str:
    return files.canonical_json(
        {
            "schema_version": 1,
            "onnx_sha256": opened.sha256,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(content.items())},
            "input": list(sources.image_shape),
            "classes": sources.classes,
            "class_names": list(opened.class_names),
            "embedded": sources.embedded,
            "workspace_bytes": sources.workspace_bytes,
            "metadata": dict(sorted(opened.metadata.items())),
        }
    )
