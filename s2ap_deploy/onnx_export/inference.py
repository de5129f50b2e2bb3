"""Run ONNX models in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.capi import onnxruntime_pybind11_state as states

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.records import SUM_TOLERANCE

# The binding raises these side by side, without a common parent of their own.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    states.EPFail,
    states.EngineError,
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NoModel,
    states.NoSuchFile,
    states.NotImplemented,
    states.RuntimeException,
    MemoryError,
    UnicodeDecodeError,  # a message that quotes a name of a damaged file
)

_ONLY_ERRORS = 3


def session(
    model: bytes | Path,
    threads: int = 1,
    *,
    optimized: Path | None = None,
    entries: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Open a CPU session with the runtime's default optimizations.

    ``optimized``: where the runtime writes its optimized graph. ``entries``: further settings
    by the runtime's own keys.
    Raises VerificationError when the runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ONLY_ERRORS
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else str(model)
    try:
        # The fallback would try again, and say so on stdout.
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except RUNTIME_ERRORS as error:
        raise VerificationError(
            f"ONNX Runtime refuses the model: {first_line(error)}", code="onnx-not-loadable"
        ) from error


def logits(
    running: ort.InferenceSession, images: NDArray[np.float32], batch_size: int = 64
) -> NDArray[np.float32]:
    """Compute the logits [n, K] of ``images`` [n, C, H, W], float32 in [0, 1].

    A model of a fixed batch size is run in batches of that size, the last one filled up with copies.
    Raises VerificationError when the model cannot run on them, or returns anything but float32 [n, K].
    """
    entry = running.get_inputs()[0]
    fixed = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else None
    size = fixed or batch_size
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    found = []
    for part in parts:
        missing = size - len(part) if fixed else 0
        filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        answer = _run(running, None, {entry.name: np.ascontiguousarray(filled)})[0]
        _check_answer(answer, len(filled))
        found.append(answer[: len(part)])
    return np.concatenate(found)


class FileAnswers:
    """An ONNX file as a function: float32 [n, C, H, W] in [0, 1] to logits [n, K], on one thread of the CPU.

    It is pickled as the bytes of the file; each process opens its own session.
    """

    def __init__(self, content: bytes) -> None:
        """Store the model. The first call raises VerificationError for one that ONNX Runtime refuses."""
        self._content = content
        self._running: ort.InferenceSession | None = None

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits(self.running, images)

    @property
    def running(self) -> ort.InferenceSession:
        """The session, opened on first use."""
        if self._running is None:
            self._running = session(self._content)
        return self._running

    def __getstate__(self) -> bytes:
        return self._content

    def __setstate__(self, content: bytes) -> None:
        self.__init__(content)  # type: ignore[misc]


def compare_sums(expected: NDArray[np.floating], found: NDArray[np.floating]) -> tuple[float, float]:
    """Return the largest difference of logits and its tolerance, 1e-5 x max(1, largest |logit|).

    That allows for the rounding of float32 sums in another order. NaN gives NaN.
    """
    largest = float(np.abs(expected).max())
    return float(np.abs(found - expected).max()), SUM_TOLERANCE * max(1.0, largest)


def evaluate(model: ModelProto, outputs: list[str]) -> list[NDArray[np.generic]]:
    """Compute named outputs of a model without inputs. Raises VerificationError when it cannot run."""
    return list(_run(session(model.SerializeToString()), outputs, {}))


def _run(
    running: ort.InferenceSession, outputs: list[str] | None, feed: dict[str, NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    try:
        return list(running.run(outputs, feed))
    except RUNTIME_ERRORS as error:
        raise VerificationError(
            f"the exported model does not run: {first_line(error)}", code="onnx-not-runnable"
        ) from error


def _check_answer(answer: object, images: int) -> None:
    if not isinstance(answer, np.ndarray) or answer.dtype != np.float32:
        kind = answer.dtype if isinstance(answer, np.ndarray) else type(answer).__name__
        raise VerificationError(
            f"the model returns {kind}, not float32 logits", code="onnx-output-unexpected"
        )
    if answer.ndim != 2 or len(answer) != images:
        raise VerificationError(
            f"the model returns a tensor of shape {list(answer.shape)} for {images} images, "
            "not logits [batch, classes]",
            code="onnx-output-unexpected",
        )


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its class for an empty one."""
    return (str(error).splitlines() or [type(error).__name__])[0]
