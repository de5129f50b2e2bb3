"""Quantize a float32 ONNX model to int8: static quantization in QDQ form, by ONNX Runtime's quantizer.

Weights are symmetric int8, one scale per output channel, so that a pruned weight stays exactly zero;
activations are uint8 with ranges from calibration images (Jacob et al. 2018, arXiv 1712.05877): a ReLU is
then the lower end of the range, and ONNX Runtime fuses it away; with int8 it computes most convolutions in
float32 instead. The logits themselves stay float32: rounding them would make ties between classes and hide
gradients from attacks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    TensorData,
    TensorsData,
    create_calibrator,
)
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from s2ap_deploy.errors import DataError, UsageError, VerificationError
from s2ap_deploy.onnx_export.encoding import WEIGHT_INPUTS
from s2ap_deploy.onnx_export.inference import RUNTIME_ERRORS, first_line

CALIBRATION_BATCH = 64
_INTEGER_OPERATORS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinear", "Integer")
# The quantizer is Python all through, and fails as such on graphs that it does not expect.
_REFUSALS: tuple[type[Exception], ...] = (
    *RUNTIME_ERRORS,
    AssertionError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


# With its default of 128 bins the search of entropy has one candidate, the whole range; percentile would make
# ranges symmetric, which halves the steps that are left for what a ReLU gives.
METHODS: Mapping[str, tuple[CalibrationMethod, dict[str, object]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "entropy": (CalibrationMethod.Entropy, {"num_bins": 2048, "num_quantized_bins": 128}),
    "percentile": (CalibrationMethod.Percentile, {"symmetric": False}),
}
Ranges = Mapping[str, tuple[float, float]]
"""The smallest and the largest value of each tensor between the layers, by its name."""


def scheme(method: str, weight_bits: int) -> str:
    """Describe the quantization for reports."""
    return (
        f"static QDQ: weights symmetric int8 per channel ({weight_bits} bits used), activations uint8 by "
        f"{method}, logits float32"
    )


def activation_ranges(model: ModelProto, images: NDArray[np.float32], *, method: str = "minmax") -> Ranges:
    """Return the range of every tensor between layers of ``model`` over ``images`` [n, C, H, W] in [0, 1].

    ``minmax`` takes the smallest and the largest value; ``percentile`` cuts off one value in 100,000;
    ``entropy`` cuts where the histogram of 2048 bins, rounded to 128 steps, loses the least information
    (Migacz 2017, 8-bit inference with TensorRT). The same model and images give the same ranges.
    Raises UsageError without images, DataError for images that are not finite, VerificationError when the
    calibrator refuses the model.
    """
    if not len(images):
        raise UsageError("int8 needs at least one image to calibrate on", code="calibration-images-missing")
    if not np.isfinite(images).all():
        raise DataError(
            "the images to calibrate on hold values that are not finite", code="calibration-not-finite"
        )
    if not model.graph.input:
        raise VerificationError(
            "the network cannot be quantized: it takes no images", code="quantization-failed"
        )
    calibrated, options = METHODS[method]
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder, _quantizer():
        path = Path(folder) / "float.onnx"
        onnx.save(_shaped(model), path)
        calibrator = create_calibrator(
            path,
            _operators(),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=calibrated,
            extra_options=options,
        )
        calibrator.collect_data(_Images(model.graph.input[0], images))
        found = {name: tensor.range_value for name, tensor in calibrator.compute_data().items()}
    return {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in found.items()}


def quantize(
    model: ModelProto,
    images: NDArray[np.float32],
    *,
    method: str = "minmax",
    weight_bits: int = 7,
    ranges: Ranges | None = None,
) -> ModelProto:
    """Quantize ``model``, calibrated on ``images`` [n, C, H, W] in [0, 1], n >= 1, by a key of ``METHODS``.

    ``ranges`` that are known already, such as those of quantization-aware training, replace those of the
    images. The same model and images give the same bytes.
    Weights take 7 of the 8 bits by default:
    processors without VNNI add products of int8 in pairs of 16 bits, which 8-bit weights can overflow, and
    the file would answer differently there.
    Raises what :func:`activation_ranges` raises, and VerificationError when the quantizer refuses the model
    or its scales are not finite.
    """
    found_ranges = {**activation_ranges(model, images, method=method), **(ranges or {})}
    limits = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in found_ranges.items()
    }
    with _quantizer():
        quantizer = QDQQuantizer(
            _shaped(model),
            True,  # scales per channel
            weight_bits == 7,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, limits),
            [],
            [],
            _operators(),
            {
                "WeightSymmetric": True,
                "ActivationSymmetric": False,
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        found: ModelProto = quantizer.model.model
    _tidy(found, model)
    return found


def is_quantized(model: ModelProto) -> bool:
    """Return whether any node of the graph computes with, or unpacks, integers in place of real numbers."""
    return any(
        node.op_type in _INTEGER_OPERATORS[:3] or any(word in node.op_type for word in _INTEGER_OPERATORS[3:])
        for node in model.graph.node
    )


def quantized_weights(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """Return the int8 tensors that a convolution or product reads through DequantizeLinear, by name."""
    unpacked = {
        node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    read = {
        unpacked[name]
        for node in model.graph.node
        if node.op_type in WEIGHT_INPUTS
        for name in node.input[:2]
        if name in unpacked
    }
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in read and tensor.data_type == TensorProto.INT8
    }


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Reads the calibration images in batches; a model of a fixed batch gets the last one filled up."""

    def __init__(self, entry: ValueInfoProto, images: NDArray[np.float32]) -> None:
        first = entry.type.tensor_type.shape.dim[:1]
        fixed = first[0].dim_value if first else 0
        # Histograms want batches of one size.
        size = fixed or max(n for n in range(1, CALIBRATION_BATCH + 1) if len(images) % n == 0)
        if fixed:
            images = np.concatenate([images, np.repeat(images[-1:], -len(images) % fixed, axis=0)])
        starts = range(0, len(images), size)
        self._batches = iter([{entry.name: images[start : start + size]} for start in starts])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def _shaped(model: ModelProto) -> ModelProto:
    """Return a copy with all shapes, by which the quantizer distinguishes weights from activations."""
    return onnx.shape_inference.infer_shapes(model)


def _tidy(found: ModelProto, source: ModelProto) -> None:
    """Keep what describes the model: the source's metadata, no quantizer's marks, no names of values."""
    del found.graph.value_info[:], found.metadata_props[:]
    found.metadata_props.extend(source.metadata_props)
    found.producer_name, found.producer_version = source.producer_name, source.producer_version
    for tensor in found.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise VerificationError(
                f"{tensor.name}: calibration gives values that are not finite", code="calibration-not-finite"
            )


def _operators() -> list[str]:
    return sorted({*QLinearOpsRegistry, *QDQRegistry})


@contextlib.contextmanager
def _quantizer() -> Iterator[None]:
    """Silence the quantizer's advice on the root logger, and what it prints of histograms; raise its errors.

    Raises VerificationError where it refuses the model.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except _REFUSALS as error:
        raise VerificationError(
            f"the network cannot be quantized: {first_line(error)}", code="quantization-failed"
        ) from error
    finally:
        logging.disable(before)
