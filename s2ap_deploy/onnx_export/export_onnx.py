"""Export one verified ONNX file: it gets its name only after every check on a temporary copy passed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from s2ap_deploy import runtime
from s2ap_deploy.codecs.registry import DENSE
from s2ap_deploy.codecs.values import FLOAT32, StoredWeight
from s2ap_deploy.errors import ArchitectureError, UsageError, VerificationError
from s2ap_deploy.files import atomic, sha256
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.onnx_export.benchmark import PairedLatency, int8_instructions, paired_latency
from s2ap_deploy.onnx_export.dead_channels.compact import compact_checked, compare_narrowed
from s2ap_deploy.onnx_export.encoding import arrays, decode, default_opset, encode, round_weights, weights
from s2ap_deploy.onnx_export.export_report import (
    Compaction,
    EncodedTensor,
    ExportReport,
    Quantization,
    Rounding,
    left_dense,
    statement,
)
from s2ap_deploy.onnx_export.graph import MIN_OPSET, check, lowered, to_onnx
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.onnx_file import write
from s2ap_deploy.onnx_export.onnx_module import uncovered
from s2ap_deploy.onnx_export.quantization import Ranges, quantize, quantized_weights, scheme
from s2ap_deploy.onnx_export.verification import (
    QUANTIZED_FLOOR,
    CertifiedPoints,
    check_masks,
    check_points,
    compare,
    compare_logits,
    compare_quantized,
    decodes_at_load,
)
from s2ap_deploy.recipe.schema import ExportSection
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.records import Agreement, PointsCheck

Images = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ExportSource:
    """A network to export, and the data that its file is made and checked with.

    Attributes:
        classifier: images [n, C, H, W] in [0, 1] to logits [n, K].
        input_size: (C, H, W).
        images: real inputs, float32 [n, C, H, W] in [0, 1], n >= 1.
        metadata: texts that are stored inside the file.
        masks: parameter name -> bool, True where the weight is kept.
        certified: points of certificates that the file must classify again.
        calibration: images [n, C, H, W] that set the ranges of int8 arithmetic; None for a float file.
        ranges: those of activations where training computed with them, instead of the images'.
        narrowed: the classifier with smaller layers, traced in its place; it must compute the same.
    """

    classifier: nn.Module
    input_size: tuple[int, int, int]
    images: Images
    metadata: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, Tensor] | None = None
    certified: Sequence[CertifiedPoints] = ()
    calibration: Images | None = None
    ranges: Ranges | None = None
    narrowed: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class _Graphs:
    """The graph in its stages: ``traced``, ``small`` without dead channels, ``dense`` quantized or rounded.

    ``stored``: how rounded weights are stored, by name. ``lacking``: operators that no attack covers.
    """

    traced: ModelProto
    small: ModelProto
    dense: ModelProto
    stored: Mapping[str, StoredWeight]
    compaction: Compaction | None
    rounding: Rounding | None
    lacking: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Checks:
    """The results of the checks of the written file."""

    sha256: str
    bytes: int
    agreement: Agreement
    points: tuple[PointsCheck, ...]
    warnings: tuple[str, ...]
    latency: PairedLatency | None


def refuse_conflict(section: ExportSection, *, int8: bool) -> None:
    """Refuse rounded values together with int8 arithmetic, whose weights are int8 already."""
    if int8 and section.values != FLOAT32:
        raise UsageError(
            f"values {section.values} and int8 arithmetic cannot be combined: an int8 file has int8 weights",
            code="values-with-int8",
            hint="leave out --values or --int8",
        )


def export_onnx(
    source: ExportSource,
    section: ExportSection,
    output: Path,
    recorder: Recorder,
) -> ExportReport:
    """Write a network to ``output`` as one sparse ONNX file and return the record of its checks.

    The file on disk must pass ONNX's own check, decode bit for bit to its graph before encoding, leave no
    decode step in ONNX Runtime's graph, agree with the classifier on ``source.images`` and on the certified
    points, and keep to its masks. An int8 file must give the logits of its graph before encoding bit for bit,
    and the classifier's class on nine of ten images; one of rounded weights the logits of that graph but for
    rounding, and the same share of classes.

    Args:
        source: the network, and the data to check its file with.
        section: the recipe's settings of the file: opset, encoding, values, batch, compact.
        output: the file, which may exist; it is as it was before when a check fails.
        recorder: receives progress, notes and warnings.

    Raises:
        VerificationError: a check failed.
        UsageError: the settings contradict each other.
        StorageError: the disk refuses.
    """
    refuse_conflict(section, int8=source.calibration is not None)
    facts = {
        **source.metadata,
        "s2ap.weights_sha256": weights_hash(source.classifier),
        **_storage_facts(section),
    }
    recorder.begin("export", total=4, unit="step")
    # Trace the network, remove dead channels, quantize or round.
    graphs = _build(source, section, facts, recorder)
    recorder.advance()
    # Store each weight in its smallest form.
    model, tensors = encode(graphs.dense, encoding=section.encoding, rounded=graphs.stored, cost=section.cost)
    recorder.advance()
    # Check the bytes on disk, under a temporary name.
    with atomic(output) as temporary:
        checks = _check_file(temporary, model, tensors, graphs, source, recorder)
        # What changes is said before the file gets its name.
        for warning in checks.warnings:
            recorder.warn(warning)
    recorder.advance()
    recorder.end()
    _note_dense(recorder, section.encoding, tensors)
    entries, nonzeros = _count(graphs)
    return ExportReport(
        file=output.name,
        sha256=checks.sha256,
        bytes=checks.bytes,
        dense_bytes=graphs.traced.ByteSize(),
        opset=default_opset(model),
        encoding=section.encoding,
        tensors=tuple(tensors),
        weights=entries,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / entries if entries else 0.0,
        agreement=checks.agreement,
        points_checks=checks.points,
        source_weights_sha256=facts["s2ap.weights_sha256"],
        latency_ratio=checks.latency.ratio if checks.latency is not None else None,
        latency_ms=checks.latency.median_ms if checks.latency is not None else None,
        quantization=_quantization(graphs.traced, source, section),
        compaction=graphs.compaction,
        rounding=graphs.rounding,
        batch=section.fixed_batch,
        uncovered=graphs.lacking,
        statement=statement(source.calibration is not None, graphs.compaction, graphs.rounding, tensors),
        warnings=checks.warnings,
        versions=runtime.versions(),
    )


def is_rounded(section: ExportSection) -> bool:
    """Return whether the weights are rounded: the file is then another network than the certified one."""
    return section.int8 or section.values != FLOAT32


def coverage_warning(
    classifier: nn.Module, input_size: tuple[int, int, int], section: ExportSection
) -> str | None:
    """Return what keeps the file that ``section`` asks for from being attacked; None where nothing does.

    ``classifier`` may be on the meta device. A network that cannot be traced is told by the export.
    """
    if not is_rounded(section):
        return None
    network = copy.deepcopy(classifier)
    if any(parameter.is_meta for parameter in network.parameters()):
        network = network.to_empty(device="cpu")
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.fill_(1)
    try:
        lacking = uncovered(to_onnx(network, input_size, opset=section.opset, batch=section.fixed_batch))
    except (ArchitectureError, VerificationError):
        return None
    return coverage_text(lacking) if lacking else None


def coverage_text(lacking: Sequence[str]) -> str:
    """Return a warning about operators that ``certify --artifact`` has no counterpart of."""
    return (
        "certify --artifact cannot attack an int8 or rounded file of this network, as it has no counterpart "
        f"of {', '.join(lacking)}: no gate will pass it; a float32 file needs no attack of its own "
        "(leave out --int8 and --values)"
    )


def _storage_facts(section: ExportSection) -> dict[str, str]:
    """Return metadata on the form of the file where it differs from the default."""
    facts: dict[str, str] = {} if section.values == FLOAT32 else {"s2ap.values": section.values}
    return facts if section.fixed_batch is None else {**facts, "s2ap.batch": str(section.fixed_batch)}


def _build(
    source: ExportSource, section: ExportSection, facts: Mapping[str, str], recorder: Recorder
) -> _Graphs:
    def trace(network: nn.Module) -> ModelProto:
        return to_onnx(
            network,
            source.input_size,
            opset=max(section.opset, MIN_OPSET),
            batch=section.fixed_batch,
            metadata=facts,
        )

    traced = small = trace(source.classifier)
    lacking = uncovered(traced) if is_rounded(section) else ()
    if lacking:
        recorder.warn(coverage_text(lacking))
    compaction = None
    further = section.compact and section.align == 1  # other widths would not be multiples of ``align``
    if source.narrowed is not None:
        small, compaction = compare_narrowed(traced, trace(source.narrowed), source.images, further=further)
    elif further:
        small, compaction = compact_checked(traced, source.images)
    dense = small
    if source.calibration is not None:
        dense = quantize(
            small,
            source.calibration,
            method=section.calibration,
            weight_bits=section.weight_bits,
            ranges=source.ranges,
        )
    if section.opset < MIN_OPSET:
        dense = lowered(dense)
    dense, stored, rounding = round_weights(dense, section.values)
    return _Graphs(traced, small, dense, stored, compaction, rounding, lacking)


def _check_file(
    path: Path,
    model: ModelProto,
    tensors: Sequence[EncodedTensor],
    graphs: _Graphs,
    source: ExportSource,
    recorder: Recorder,
) -> _Checks:
    """Write ``model`` to ``path`` and check the file. Raises VerificationError."""
    data = model.SerializeToString()
    write(path, data)
    check_model(ModelProto.FromString(data), graphs.dense)
    running = session(path)
    if source.calibration is None and graphs.rounding is None:
        agreement = _agreement(source.classifier, running, source.images, "the given images")
        points = tuple(_check_points(source.classifier, running, each) for each in source.certified)
    else:
        agreement = _rounded_agreement(source, running, graphs)
        points = tuple(check_points(running, each) for each in source.certified)
    if source.masks is not None:
        check_masks(graphs.traced, {name: mask.cpu().bool().numpy() for name, mask in source.masks.items()})
    recorder.advance()
    latency = None
    if graphs.dense is not graphs.traced or any(row.encoding != DENSE.name for row in tensors):
        baseline = session(graphs.traced.SerializeToString())
        batch = graphs.traced.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
        latency = paired_latency(running, baseline, np.repeat(source.images[:1], batch, axis=0))
    warnings = _warnings(running, source.images, points)
    return _Checks(sha256(path), path.stat().st_size, agreement, points, warnings, latency)


def check_model(model: ModelProto, dense: ModelProto) -> None:
    """Check that ``model`` decodes to ``dense``, node for node and bit for bit. Raises VerificationError."""
    check(model)
    decoded = decode(model)
    expected, found = arrays(dense.graph.initializer), arrays(decoded.graph.initializer)
    if expected.keys() != found.keys() or _skeleton(decoded) != _skeleton(dense):
        raise VerificationError(
            "the graph of the file is not the graph that was encoded", code="encoded-graph-differs"
        )
    for name, array in expected.items():
        if array.shape != found[name].shape or array.tobytes() != found[name].tobytes():
            raise VerificationError(
                f"{name}: the decoded weights are not the weights that were encoded",
                code="encoded-weights-differ",
            )
    if not decodes_at_load(model):
        raise VerificationError(
            "ONNX Runtime would decode the weights again at every inference", code="decoding-not-at-load"
        )


def _skeleton(model: ModelProto) -> ModelProto:
    """Return the model without its initializers."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    del skeleton.graph.initializer[:]
    return skeleton


def _agreement(classifier: nn.Module, running: ort.InferenceSession, images: Images, what: str) -> Agreement:
    agreement = compare(classifier, running, images)
    if not agreement.passed:
        raise VerificationError(
            f"on {what} the logits of the file differ from PyTorch's by up to "
            f"{agreement.max_logit_difference:.3g} (allowed {agreement.tolerance:.3g}), "
            f"the class on {agreement.n - agreement.argmax_agree} of {agreement.n}",
            code="logits-differ",
        )
    return agreement


def _rounded_agreement(source: ExportSource, running: ort.InferenceSession, graphs: _Graphs) -> Agreement:
    """Compare the file with its graph before encoding, and its classes with those of the float32 classifier.

    int8 arithmetic must give the same bits; sums over rounded weights may differ in their own rounding.
    """
    found = logits(running, source.images)
    expected = logits(session(graphs.dense.SerializeToString()), source.images)
    if graphs.rounding is None:
        form, hint = "as int8", "calibrate on more images, or export float32"
        same = np.array_equal(found, expected)
    else:
        form, hint = f"with weights as {graphs.rounding.kind}", f"export with --values {FLOAT32}"
        same = compare_logits(expected, found, quantized=False).passed
    if not same:
        raise VerificationError(
            "the file does not give the logits of its model before encoding", code="encoded-logits-differ"
        )
    agreement = compare_quantized(source.classifier, running, source.images)
    if not agreement.passed:
        raise VerificationError(
            f"{form} the class is unchanged on {agreement.argmax_agree} of {agreement.n} images, "
            f"less than {QUANTIZED_FLOOR:.0%}",
            code="classes-differ",
            hint=hint,
        )
    return agreement


def _check_points(
    classifier: nn.Module, running: ort.InferenceSession, points: CertifiedPoints
) -> PointsCheck:
    both = np.concatenate([points.clean, points.adversarial])
    agreement = _agreement(classifier, running, both, "the certificate's points")
    return check_points(running, points).model_copy(update={"agreement": agreement})


def _warnings(
    running: ort.InferenceSession, images: Images, checks: Sequence[PointsCheck]
) -> tuple[str, ...]:
    found = []
    if len(images) > 1 and np.ptp(logits(running, images[:64]), axis=0).max() == 0:
        found.append("the logits do not depend on the input: the network has collapsed")
    for points in checks:
        if not points.same_predictions:
            changed = f"; {points.changed_text}" if points.changed else ""
            found.append(
                f"certificate {points.certificate_sha256[:12]}: the file predicts a different class on "
                f"{points.clean_disagreements} clean and {points.adversarial_disagreements} attacked points"
                f"{changed}"
            )
    return tuple(found)


def _note_dense(recorder: Recorder, encoding: str, tensors: Sequence[EncodedTensor]) -> None:
    names = left_dense(encoding, tensors)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        recorder.note(f"too few zeros to benefit, left dense: {len(names)} weights ({shown})")


def _count(graphs: _Graphs) -> tuple[int, int]:
    """Count entries and non-zero entries of the weights; those of removed channels count as zeros."""
    tensors = {**weights(graphs.dense), **quantized_weights(graphs.dense)}.values()
    removed = sum(tensor.size for tensor in weights(graphs.traced).values())
    removed -= sum(tensor.size for tensor in weights(graphs.small).values())
    entries = sum(tensor.size for tensor in tensors) + removed
    stored, whole = (
        sum(int(np.count_nonzero(tensor)) for tensor in each)
        for each in (tensors, weights(graphs.traced).values())
    )
    # A weight that two layers share may be stored twice, each time with the channels that its layer keeps.
    return entries, min(stored, whole)


def _quantization(traced: ModelProto, source: ExportSource, section: ExportSection) -> Quantization | None:
    if source.calibration is None:
        return None
    return Quantization(
        scheme=scheme(
            section.calibration if source.ranges is None else "quantization-aware training",
            section.weight_bits,
        ),
        calibration_images=len(source.calibration),
        float_bytes=encode(traced, encoding=section.encoding, cost=section.cost)[0].ByteSize(),
        instructions=int8_instructions(),
    )
