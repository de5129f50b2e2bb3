"""One verified file: everything is checked on a temporary copy, which takes its name only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from s2ap_deploy import runtime
from s2ap_deploy.errors import UsageError, VerificationError
from s2ap_deploy.files import atomic, sha256
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.onnx_export.benchmark import processor
from s2ap_deploy.onnx_export.benchmark.latency import paired_latency
from s2ap_deploy.onnx_export.codecs import encoding as codec
from s2ap_deploy.onnx_export.codecs.encoding import Encoding
from s2ap_deploy.onnx_export.codecs.values import Values, round_weights
from s2ap_deploy.onnx_export.codecs.weights import kept_but_zero, weights
from s2ap_deploy.onnx_export.dead_channels import compact as compaction
from s2ap_deploy.onnx_export.dead_channels import parity
from s2ap_deploy.onnx_export.dead_channels.compaction_report import Compaction
from s2ap_deploy.onnx_export.dead_channels.narrowed import narrowed_graph
from s2ap_deploy.onnx_export.export_report import (
    COO_STATEMENT,
    INT8_STATEMENT,
    LATENCY_STATEMENT,
    ROUNDED_STATEMENT,
    Agreement,
    EncodedTensor,
    ExportReport,
    PointsCheck,
    Quantization,
    Rounding,
    left_dense,
)
from s2ap_deploy.onnx_export.graph import check, to_onnx
from s2ap_deploy.onnx_export.quantization import SCHEME, quantize, quantized_weights
from s2ap_deploy.onnx_export.verification import (
    QUANTIZED_FLOOR,
    CertifiedPoints,
    compare,
    compare_quantized,
    compare_twin,
    folded,
    logits,
    rejudge,
    session,
)
from s2ap_deploy.recorder import Recorder


def export_onnx(
    classifier: nn.Module,
    *,
    input_size: tuple[int, int, int],
    output: Path,
    images: NDArray[np.float32],
    opset: int = 20,
    encoding: Encoding = "auto",
    values: Values = "f32",
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    certified: Sequence[CertifiedPoints] = (),
    calibration: NDArray[np.float32] | None = None,
    compact: bool = True,
    narrowed: nn.Module | None = None,
    overwrite: bool = False,
    recorder: Recorder,
) -> ExportReport:
    """Write ``classifier`` to ``output`` as one sparse ONNX file and return the record of its checks.

    ``images``: real inputs, float32 [n, C, H, W] in [0, 1], n >= 1. ``masks``: parameter name -> bool,
    True where the weight is kept. ``certified``: points that the file is to judge anew. ``calibration``:
    images [n, C, H, W] that make it an int8 file, whose dense twin is then the int8 model as quantized.
    ``values``: how the file stores its weights; unless ``f32``, the dense twin has the rounded weights.
    ``batch``: the only batch size that the file is to take; None for any.
    ``compact``: leave out channels that cannot matter; the dense twin then lacks them too, and is compared
    with the whole graph. ``narrowed``: the classifier with smaller layers, to be traced in its place; it must
    compute the same.

    The file on disk must pass ONNX's own check, decode bit for bit to the dense twin, leave no decode
    step in ONNX Runtime's graph, agree with the classifier on ``images`` and on the certified points,
    and keep to its masks. An int8 file must give its dense twin's logits bit for bit, and the classifier's
    class on nine of ten ``images``; one of rounded weights the logits of its twin, and the same share of
    classes. Otherwise VerificationError, and ``output`` is as it was before. Raises UsageError when
    ``output`` exists and ``overwrite`` is not set, and for ``values`` beside ``calibration``, StorageError
    when the disk refuses, and what :func:`~s2ap_deploy.onnx_export.graph.to_onnx` raises.
    """
    _check_output(output, overwrite)
    int8 = calibration is not None
    if int8 and values != "f32":
        raise UsageError(
            f"values {values} and int8 arithmetic do not go together: an int8 file has int8 weights already",
            hint="leave out --values or --int8",
        )
    source = weights_hash(classifier)
    recorder.begin("export", total=4, unit="step")
    facts = {**(metadata or {}), "s2ap.weights_sha256": source, **_storage_facts(values, batch)}
    dense = to_onnx(classifier, input_size, opset=opset, batch=batch, metadata=facts)
    plain, removal = dense, None
    if narrowed is not None:
        small = to_onnx(narrowed, input_size, opset=opset, batch=batch, metadata=facts)
        dense, removal = narrowed_graph(plain, small, images, further=compact)
    elif compact:
        dense, removal = _compacted(plain, images)
    small = dense
    if calibration is not None:
        dense = quantize(small, calibration)
    dense, stored, rounding = round_weights(dense, values)
    recorder.advance()
    model, table = codec.encode(dense, encoding=encoding, rounded=stored)
    recorder.advance()
    with atomic(output) as temporary:
        _check_model(_write(temporary, model), dense)
        running = session(temporary)
        if int8:
            agreement = _quantized_agreement(classifier, running, dense, images)
            rejudgments = tuple(rejudge(running, points) for points in certified)
        elif rounding is not None:
            agreement = _rounded_agreement(classifier, running, dense, images, rounding)
            rejudgments = tuple(rejudge(running, points) for points in certified)
        else:
            agreement = _agreement(classifier, running, images, "the given images")
            rejudgments = tuple(_rejudge(classifier, running, points) for points in certified)
        unused = _check_masks(plain, masks)
        recorder.advance()
        warnings = _warnings(running, images, rejudgments)
        latency = None
        if dense is not plain or any(row.encoding != "dense" for row in table):
            twin = session(plain.SerializeToString())
            latency = paired_latency(running, twin, np.repeat(images[:1], batch or 1, axis=0))
        digest, size = sha256(temporary), temporary.stat().st_size
    recorder.advance()
    recorder.end()
    _tell_dense(recorder, encoding, table)
    for warning in warnings:
        recorder.warn(warning)
    tensors = {**weights(dense), **quantized_weights(dense)}.values()
    removed = sum(tensor.size for tensor in weights(plain).values())
    removed -= sum(tensor.size for tensor in weights(small).values())
    entries = sum(tensor.size for tensor in tensors) + removed
    nonzeros = sum(int(np.count_nonzero(tensor)) for tensor in tensors)
    return ExportReport(
        file=output.name,
        sha256=digest,
        bytes=size,
        dense_bytes=plain.ByteSize(),
        opset=codec.default_opset(model),
        encoding=encoding,
        tensors=tuple(table),
        weights=entries,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / entries if entries else 0.0,
        kept_but_zero=unused,
        agreement=agreement,
        rejudgments=rejudgments,
        source_weights_sha256=source,
        latency_ratio=latency.ratio if latency is not None else None,
        latency_ms=latency.median_ms if latency is not None else None,
        quantization=_quantization(plain, calibration, encoding) if calibration is not None else None,
        compaction=removal,
        rounding=rounding,
        batch=batch,
        statement=_statement(INT8_STATEMENT if int8 else LATENCY_STATEMENT, removal, rounding, table),
        warnings=warnings,
        versions=runtime.versions(),
    )


def _compacted(plain: ModelProto, images: NDArray[np.float32]) -> tuple[ModelProto, Compaction]:
    smaller, removal = compaction.compact(plain)
    if smaller is plain:
        return plain, removal
    check(smaller)
    return smaller, parity.verify(plain, smaller, images, removal)


def _statement(
    words: str, removal: Compaction | None, rounding: Rounding | None, table: Sequence[EncodedTensor]
) -> str:
    sentences = [words]
    if removal is not None and removal.removed:
        sentences.append(removal.statement)
    if rounding is not None:
        sentences.append(ROUNDED_STATEMENT.format(kind=rounding.kind))
    if any(row.encoding == "coo" for row in table):
        sentences.append(COO_STATEMENT)
    return " ".join(sentences)


def _storage_facts(values: Values, batch: int | None) -> dict[str, str]:
    """What the file says of itself where it differs from the usual one."""
    facts: dict[str, str] = {} if values == "f32" else {"s2ap.values": values}
    return facts if batch is None else {**facts, "s2ap.batch": str(batch)}


def _tell_dense(recorder: Recorder, encoding: Encoding, table: Sequence[EncodedTensor]) -> None:
    names = left_dense(encoding, table)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        recorder.note(f"too few zeros to gain anything, left dense: {len(names)} weights ({shown})")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise UsageError(f"{output} is a folder", hint="name the file, for example model.onnx inside it")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", hint="add --overwrite, or choose another name")


def _write(path: Path, model: ModelProto) -> ModelProto:
    """Write the model and return what a reader of the file gets."""
    data = model.SerializeToString()
    path.write_bytes(data)
    if path.read_bytes() != data:
        raise VerificationError("the disk returns other bytes than were written")
    return ModelProto.FromString(data)


def _check_model(model: ModelProto, dense: ModelProto) -> None:
    """Decoded, the model must be the dense twin, node for node and bit for bit."""
    check(model)
    decoded = codec.decode(model)
    twin, found = _initializers(dense), _initializers(decoded)
    if twin.keys() != found.keys() or _skeleton(decoded) != _skeleton(dense):
        raise VerificationError("the graph of the file is not that of the dense twin")
    for name, expected in twin.items():
        if expected.shape != found[name].shape or expected.tobytes() != found[name].tobytes():
            raise VerificationError(f"{name}: the decoded weights are not those of the dense twin")
    if not folded(model):
        raise VerificationError("ONNX Runtime would decode the weights again at every inference")


def _initializers(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _skeleton(model: ModelProto) -> ModelProto:
    """The model without its initializers."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    del skeleton.graph.initializer[:]
    return skeleton


def _agreement(
    classifier: nn.Module, running: ort.InferenceSession, images: NDArray[np.float32], words: str
) -> Agreement:
    agreement = compare(classifier, running, images)
    if not agreement.passed:
        raise VerificationError(
            f"on {words} the logits of the file differ from PyTorch's by up to "
            f"{agreement.max_logit_difference:.3g} (allowed {agreement.tolerance:.3g}), "
            f"the class on {agreement.n - agreement.argmax_agree} of {agreement.n}"
        )
    return agreement


def _quantized_agreement(
    classifier: nn.Module, running: ort.InferenceSession, dense: ModelProto, images: NDArray[np.float32]
) -> Agreement:
    """The file against its own int8 twin, bit for bit, and against the float classifier, class by class."""
    twin = session(dense.SerializeToString())
    if not np.array_equal(logits(running, images), logits(twin, images)):
        raise VerificationError("the int8 file does not give the logits of its model without encoding")
    agreement = compare_quantized(classifier, running, images)
    if not agreement.passed:
        raise VerificationError(
            f"as int8 the network keeps its class on {agreement.argmax_agree} of {agreement.n} images, "
            f"less than {QUANTIZED_FLOOR:.0%}",
            hint="calibrate on more images, or export float32",
        )
    return agreement


def _rounded_agreement(
    classifier: nn.Module,
    running: ort.InferenceSession,
    dense: ModelProto,
    images: NDArray[np.float32],
    rounding: Rounding,
) -> Agreement:
    """The file against its own dense twin, and against the float32 classifier, class by class."""
    twin = compare_twin(
        logits(session(dense.SerializeToString()), images), logits(running, images), quantized=False
    )
    if not twin.passed:
        raise VerificationError("the file does not give the logits of its model without encoding")
    agreement = compare_quantized(classifier, running, images)
    if not agreement.passed:
        raise VerificationError(
            f"with weights as {rounding.kind} the network keeps its class on {agreement.argmax_agree} of "
            f"{agreement.n} images, less than {QUANTIZED_FLOOR:.0%}",
            hint="export with --values f32",
        )
    return agreement


def _quantization(plain: ModelProto, calibration: NDArray[np.float32], encoding: Encoding) -> Quantization:
    return Quantization(
        scheme=SCHEME,
        calibration_images=len(calibration),
        float_bytes=codec.encode(plain, encoding=encoding)[0].ByteSize(),
        instructions=processor.int8_instructions(),
    )


def _rejudge(classifier: nn.Module, running: ort.InferenceSession, points: CertifiedPoints) -> PointsCheck:
    both = np.concatenate([points.clean, points.adversarial])
    agreement = _agreement(classifier, running, both, "the certificate's points")
    return rejudge(running, points).model_copy(update={"agreement": agreement})


def _check_masks(dense: ModelProto, masks: Mapping[str, Tensor] | None) -> int | None:
    if masks is None:
        return None
    return kept_but_zero(dense, {name: mask.cpu().bool().numpy() for name, mask in masks.items()})


def _warnings(
    running: ort.InferenceSession, images: NDArray[np.float32], rejudgments: Sequence[PointsCheck]
) -> tuple[str, ...]:
    found = []
    if len(images) > 1 and np.ptp(logits(running, images[:64]), axis=0).max() == 0:
        found.append("the logits do not depend on the input: the network has collapsed")
    for points in rejudgments:
        if not points.same_predictions:
            found.append(
                f"certificate {points.certificate_sha256[:12]}: the file chooses another class on "
                f"{points.clean_disagreements} clean and {points.adversarial_disagreements} attacked points"
            )
    return tuple(found)
