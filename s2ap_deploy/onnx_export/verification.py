"""Whether an exported file is the model it was made from: its graph, its logits, its verdicts."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import nn

from s2ap_deploy.onnx_export.codecs.decoder import decodes
from s2ap_deploy.onnx_export.export_report import Agreement, PointsCheck
from s2ap_deploy.onnx_export.inference import logits, session

__all__ = [
    "CertifiedPoints",
    "compare",
    "compare_quantized",
    "compare_twin",
    "folded",
    "logits",
    "rejudge",
    "session",
]

RELATIVE_TOLERANCE = 1e-5
QUANTIZED_FLOOR = 0.9
DECODE_OPERATORS = ("BitwiseAnd", "CumSum", "ScatterElements")


@dataclass(frozen=True, eq=False)
class CertifiedPoints:
    """The inputs of one certificate and the classes that the attacked classifier gave them.

    ``clean`` and ``adversarial``: float32 [n, C, H, W] in [0, 1], the same samples in the same order
    (where no attack succeeded, the adversarial point may be the clean one); the others: int [n].
    """

    certificate_sha256: str
    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    labels: NDArray[np.integer]
    clean_prediction: NDArray[np.integer]
    adversarial_prediction: NDArray[np.integer]


def folded(model: ModelProto) -> bool:
    """Whether ONNX Runtime computes every coded weight at load, leaving no decode step per inference.

    Judged on the graph that the runtime itself writes after its default optimizations.
    """
    decoding = [node for node in model.graph.node if decodes(node)]
    if not decoding:
        return True
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
        path = Path(folder) / "optimized.onnx"
        session(model.SerializeToString(), optimized=path)
        running = onnx.load(path).graph.node
    produced = {name for node in decoding for name in node.output}
    if any(name in produced for node in running for name in node.output):
        return False
    own = Counter(node.op_type for node in model.graph.node if not decodes(node))
    left = Counter(node.op_type for node in running)
    return all(left[operator] <= own[operator] for operator in DECODE_OPERATORS)


def compare(
    classifier: nn.Module,
    running: ort.InferenceSession,
    images: NDArray[np.float32],
    *,
    batch_sizes: Sequence[int] = (1, 2, 7, 64),
) -> Agreement:
    """Logits of the session ``running`` against those of the classifier on ``images`` [n, C, H, W].

    All images, at least one, are run at the largest batch size, the first two batches of each smaller
    size as well.
    The tolerance is 1e-5 x max(1, largest |logit|), the rounding of float32 sums in another order.
    """
    sizes = sorted(set(batch_sizes))
    reference = _reference(classifier, images, sizes[-1])
    found = logits(running, images, sizes[-1])
    differences = [_largest(found - reference)]
    for size in sizes[:-1]:
        part = images[: 2 * size]
        differences.append(_largest(logits(running, part, size) - reference[: len(part)]))
    agreed = _agreement(reference, found, tolerance=_tolerance(_largest(reference)))
    # np.max, unlike max(), keeps a NaN.
    return agreed.model_copy(update={"max_logit_difference": float(np.max(differences))})


def compare_quantized(
    classifier: nn.Module, running: ort.InferenceSession, images: NDArray[np.float32]
) -> Agreement:
    """Logits of an int8 session against those of its float classifier on ``images`` [n, C, H, W].

    Rounding to 8 bits is meant to move logits: only the share of equal classes is held against a floor.
    """
    reference = _reference(classifier, images, 64)
    return _agreement(reference, logits(running, images), tolerance=None, required=QUANTIZED_FLOOR)


def compare_twin(
    twin_logits: NDArray[np.float32], file_logits: NDArray[np.float32], *, quantized: bool
) -> Agreement:
    """Whether a differentiable twin speaks for its file: logits [n, K] of both on the same inputs.

    In float32 they may differ by 1e-3 x max(1, largest |logit|), and classes only where that leaves a tie.
    A quantized file rounds in another order of operations, and one rounding that falls the other way moves
    what follows by steps: logits may differ by four steps of an 8-bit scale over the largest of them, and
    99 % of the classes must be equal, classes within one step of each other apart.
    """
    largest = _largest(file_logits)
    if not quantized:
        return _agreement(file_logits, twin_logits, tolerance=1e-3 * max(1.0, largest))
    step = largest / 127
    tied = _agreement(file_logits, twin_logits, tolerance=step / 2, required=0.99)
    return tied.model_copy(update={"tolerance": 4 * step})


def _agreement(
    reference: NDArray[np.float32],
    found: NDArray[np.float32],
    *,
    tolerance: float | None,
    required: float = 1.0,
) -> Agreement:
    differs, ties = _against(reference, found.argmax(1), tolerance or 0.0)
    return Agreement(
        n=len(reference),
        max_logit_difference=_largest(found - reference),
        largest_logit=_largest(reference),
        tolerance=tolerance,
        argmax_agree=len(reference) - differs,
        ties=ties,
        required=required,
    )


def rejudge(running: ort.InferenceSession, points: CertifiedPoints, *, batch_size: int = 64) -> PointsCheck:
    """Let the exported file itself classify every clean and adversarial point of a certificate."""
    clean = logits(running, points.clean, batch_size)
    attacked = logits(running, points.adversarial, batch_size)
    tolerance = _tolerance(max(_largest(clean), _largest(attacked)))
    clean_differs, clean_tied = _against(clean, points.clean_prediction, tolerance)
    attacked_differs, attacked_tied = _against(attacked, points.adversarial_prediction, tolerance)
    correct = clean.argmax(1) == points.labels
    return PointsCheck(
        certificate_sha256=points.certificate_sha256,
        n=len(points.labels),
        clean_correct=int(correct.sum()),
        survived=int((correct & (attacked.argmax(1) == points.labels)).sum()),
        clean_disagreements=clean_differs,
        adversarial_disagreements=attacked_differs,
        ties=clean_tied + attacked_tied,
    )


def _against(scores: NDArray[np.float32], classes: NDArray[np.integer], tolerance: float) -> tuple[int, int]:
    """How many rows of ``scores`` [n, K] peak elsewhere than at ``classes`` [n], and how many of
    these give both classes the same score within twice the tolerance (each may be off by one)."""
    chosen = scores.argmax(1)
    gap = np.take_along_axis(scores, np.stack([chosen, classes], axis=1), axis=1)
    differs = chosen != classes
    return int(differs.sum()), int((differs & (np.abs(gap[:, 0] - gap[:, 1]) <= 2 * tolerance)).sum())


def _tolerance(largest: float) -> float:
    return RELATIVE_TOLERANCE * max(1.0, largest)


def _reference(classifier: nn.Module, images: NDArray[np.float32], batch_size: int) -> NDArray[np.float32]:
    network = copy.deepcopy(classifier).cpu().float().eval()
    with torch.no_grad():
        batches = [
            network(torch.from_numpy(images[start : start + batch_size])).numpy()
            for start in range(0, len(images), batch_size)
        ]
    return np.concatenate(batches)


def _largest(values: NDArray[np.float32]) -> float:
    """The largest magnitude; NaN when any value is NaN."""
    return float(np.abs(values).max())
