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
from s2ap_deploy.exporting import encoding as codec
from s2ap_deploy.exporting.artifact import Agreement, ExportReport, Rejudgement
from s2ap_deploy.exporting.encoding import Encoding
from s2ap_deploy.exporting.graph import check, to_onnx
from s2ap_deploy.exporting.latency import paired_latency
from s2ap_deploy.exporting.verify import CertifiedPoints, compare, folded, logits, rejudge, session
from s2ap_deploy.exporting.weights import kept_but_zero, weights
from s2ap_deploy.files import atomic, sha256
from s2ap_deploy.models.classifier import weights_hash
from s2ap_deploy.recorder import Recorder


def export_onnx(
    classifier: nn.Module,
    *,
    input_size: tuple[int, int, int],
    output: Path,
    images: NDArray[np.float32],
    opset: int = 20,
    encoding: Encoding = "auto",
    metadata: Mapping[str, str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    certified: Sequence[CertifiedPoints] = (),
    overwrite: bool = False,
    recorder: Recorder,
) -> ExportReport:
    """Write ``classifier`` to ``output`` as one sparse ONNX file and return the record of its checks.

    ``images``: real inputs, float32 [n, C, H, W] in [0, 1], n >= 1. ``masks``: parameter name -> bool,
    True where the weight is kept. ``certified``: points that the file is to judge anew.

    The file on disk must pass ONNX's own check, decode bit for bit to the dense twin, leave no decode
    step in ONNX Runtime's graph, agree with the classifier on ``images`` and on the certified points,
    and keep to its masks. Otherwise VerificationError, and ``output`` is as it was before.
    Raises UsageError when ``output`` exists and ``overwrite`` is not set, StorageError when the disk
    refuses, and what :func:`~s2ap_deploy.exporting.graph.to_onnx` raises.
    """
    _check_output(output, overwrite)
    source = weights_hash(classifier)
    recorder.begin("export", total=4, unit="step")
    dense = to_onnx(
        classifier, input_size, opset=opset, metadata={**(metadata or {}), "s2ap.weights_sha256": source}
    )
    recorder.advance()
    model, table = codec.encode(dense, encoding=encoding)
    recorder.advance()
    with atomic(output) as temporary:
        _check_model(_write(temporary, model), dense)
        running = session(temporary)
        agreement = _agreement(classifier, running, images, "the given images")
        rejudgements = tuple(_rejudge(classifier, running, points) for points in certified)
        unused = _check_masks(dense, masks)
        recorder.advance()
        warnings = _warnings(running, images, rejudgements)
        latency = None
        if any(row.encoding != "dense" for row in table):
            twin = session(dense.SerializeToString())
            latency = paired_latency(running, twin, images[:1])
        digest, size = sha256(temporary), temporary.stat().st_size
    recorder.advance()
    recorder.end()
    for warning in warnings:
        recorder.warn(warning)
    tensors = weights(dense).values()
    entries = sum(tensor.size for tensor in tensors)
    nonzeros = sum(int(np.count_nonzero(tensor)) for tensor in tensors)
    return ExportReport(
        file=output.name,
        sha256=digest,
        bytes=size,
        dense_bytes=dense.ByteSize(),
        opset=codec.default_opset(model),
        encoding=encoding,
        tensors=tuple(table),
        weights=entries,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / entries if entries else 0.0,
        kept_but_zero=unused,
        agreement=agreement,
        rejudgements=rejudgements,
        source_weights_sha256=source,
        latency_ratio=latency.ratio if latency is not None else None,
        latency_ms=latency.median_ms if latency is not None else None,
        warnings=warnings,
        versions=runtime.versions(),
    )


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


def _rejudge(classifier: nn.Module, running: ort.InferenceSession, points: CertifiedPoints) -> Rejudgement:
    both = np.concatenate([points.clean, points.adversarial])
    agreement = _agreement(classifier, running, both, "the certificate's points")
    return rejudge(running, points).model_copy(update={"agreement": agreement})


def _check_masks(dense: ModelProto, masks: Mapping[str, Tensor] | None) -> int | None:
    if masks is None:
        return None
    return kept_but_zero(dense, {name: mask.cpu().bool().numpy() for name, mask in masks.items()})


def _warnings(
    running: ort.InferenceSession, images: NDArray[np.float32], rejudgements: Sequence[Rejudgement]
) -> tuple[str, ...]:
    found = []
    if len(images) > 1 and np.ptp(logits(running, images[:64]), axis=0).max() == 0:
        found.append("the logits do not depend on the input: the network has collapsed")
    for points in rejudgements:
        if not points.same_predictions:
            found.append(
                f"certificate {points.certificate_sha256[:12]}: the file chooses another class on "
                f"{points.clean_disagreements} clean and {points.adversarial_disagreements} attacked points"
            )
    return tuple(found)
