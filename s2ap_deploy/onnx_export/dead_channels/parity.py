"""Whether a compacted graph still computes what it did: on real images and on those that would show it."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.dead_channels.compaction_report import Compaction
from s2ap_deploy.onnx_export.inference import logits, session

RELATIVE_TOLERANCE = 1e-5
REAL_IMAGES = 64


def verify(
    before: ModelProto, after: ModelProto, images: NDArray[np.float32], compaction: Compaction
) -> Compaction:
    """Compare both graphs in ONNX Runtime on some of ``images`` [n, C, H, W] and on :func:`probes`.

    Returns ``compaction`` with the largest difference. Raises VerificationError when it exceeds
    1e-5 x max(1, largest |logit|), which the rounding of float32 sums in another order does not.
    """
    inputs = np.concatenate([images[:REAL_IMAGES], probes(images.shape[1:])])
    expected = _logits(session(before.SerializeToString()), inputs)
    found = _logits(session(after.SerializeToString()), inputs)
    difference = float(np.abs(found - expected).max())
    tolerance = RELATIVE_TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= tolerance < np.inf:  # written so that NaN fails
        raise VerificationError(
            f"without its dead channels the network's logits differ by up to {difference:.3g} "
            f"(allowed {tolerance:.3g})",
            hint="export with --no-compact, and please report the network",
        )
    return compaction.model_copy(update={"max_logit_difference": difference, "tolerance": tolerance})


def probes(shape: tuple[int, ...], *, noisy: int = 4) -> NDArray[np.float32]:
    """Images [n, C, H, W] in [0, 1]: ``noisy`` random ones, flat ones, and some that are all border or none.

    A constant that was moved wrongly shows where a border reads the zeros around the image.
    """
    random = np.random.default_rng(0).random((noisy, *shape), dtype=np.float32)
    flat = [np.full(shape, level, np.float32) for level in (0.0, 0.5, 1.0)]
    border = np.ones(shape, np.float32)
    border[..., 1:-1, 1:-1] = 0
    return np.stack([*random, *flat, border, 1 - border])


def _logits(running: ort.InferenceSession, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    return logits(running, inputs).astype(np.float64)
