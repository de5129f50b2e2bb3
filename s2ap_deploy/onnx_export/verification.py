"""Compare an exported file with the model it was made from: its graph, its logits, its classes."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import nn

from s2ap_deploy.codecs.decode_graph import decodes
from s2ap_deploy.codecs.registry import OPERATORS
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.encoding import weights
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.records import SUM_TOLERANCE, Agreement, ChangedPoint, PointsCheck

QUANTIZED_FLOOR = 0.9
# Operators that classifiers have as well, and that ONNX Runtime may add to them.
_ORDINARY = frozenset(
    {"Add", "Cast", "ConstantOfShape", "Gather", "MatMul", "Mul", "Reshape", "Slice", "Sub"}
)


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


def decodes_at_load(model: ModelProto) -> bool:
    """Return whether ONNX Runtime computes every encoded weight at load, with no decode step per inference.

    Decided on the graph that the runtime itself writes after its default optimizations.
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
    return all(left[operator] <= own[operator] for operator in OPERATORS - _ORDINARY)


def compare(
    classifier: nn.Module,
    running: ort.InferenceSession,
    images: NDArray[np.float32],
    *,
    batch_sizes: Sequence[int] = (1, 2, 7, 64),
) -> Agreement:
    """Compare the logits of the session ``running`` with those of the classifier on ``images`` [n, C, H, W].

    All images, at least one, are run at the largest batch size, the first two batches of each smaller
    size as well.
    The tolerance is 1e-5 x max(1, largest |logit|), the rounding of float32 sums in another order. A network
    that amplifies its rounding, as by BatchNorm of channels that hardly vary, is allowed eight times its own
    distance from float64 instead, and at most 1e-3 x max(1, largest |logit|).
    """
    sizes = sorted(set(batch_sizes))
    reference = _reference(classifier, images, sizes[-1])
    found = logits(running, images, sizes[-1])
    differences = [_largest(found - reference)]
    for size in sizes[:-1]:
        part = images[: 2 * size]
        differences.append(_largest(logits(running, part, size) - reference[: len(part)]))
    # np.max, unlike max(), keeps a NaN.
    difference, tolerance = float(np.max(differences)), _tolerance(_largest(reference))
    limit = 1e-3 * max(1.0, _largest(reference))
    if tolerance < difference <= limit:
        tolerance = min(limit, max(tolerance, 8 * _rounding(classifier, reference, images, sizes[-1])))
    agreed = _agreement(reference, found, tolerance=tolerance)
    return agreed.model_copy(update={"max_logit_difference": difference})


def compare_quantized(
    classifier: nn.Module, running: ort.InferenceSession, images: NDArray[np.float32]
) -> Agreement:
    """Compare an int8 or rounded session with its float32 classifier on ``images`` [n, C, H, W].

    Rounding changes logits: only the share of equal classes has a limit.
    """
    reference = _reference(classifier, images, 64)
    return compare_rounded(reference, logits(running, images))


def compare_rounded(reference: NDArray[np.float32], found: NDArray[np.float32]) -> Agreement:
    """Compare logits [n, K] of two roundings of a network: only the share of equal classes has a limit."""
    return _agreement(reference, found, tolerance=None, required=QUANTIZED_FLOOR)


def compare_logits(
    found: NDArray[np.float32], reference: NDArray[np.float32], *, quantized: bool
) -> Agreement:
    """Compare two implementations of the same file: logits [n, K] of both on the same inputs.

    In float32 they may differ by 1e-3 x max(1, largest |logit|), and classes only where that leaves a tie.
    A quantized file rounds in another order of operations, and one rounding that falls the other way moves
    what follows by steps: logits may differ by four steps of an 8-bit scale over the largest of them, and
    99% of the classes must be equal, classes within one step of each other apart.
    """
    largest = _largest(reference)
    if not quantized:
        return _agreement(reference, found, tolerance=1e-3 * max(1.0, largest))
    step = largest / 127
    tied = _agreement(reference, found, tolerance=step / 2, required=0.99)
    return tied.model_copy(update={"tolerance": 4 * step})


def check_points(
    running: ort.InferenceSession, points: CertifiedPoints, *, batch_size: int = 64
) -> PointsCheck:
    """Classify every clean and adversarial point of a certificate with the exported file itself."""
    clean = logits(running, points.clean, batch_size)
    return check_answers(clean, logits(running, points.adversarial, batch_size), points)


def check_answers(
    clean: NDArray[np.float32], attacked: NDArray[np.float32], points: CertifiedPoints
) -> PointsCheck:
    """Compare logits [n, K] of the clean and adversarial points of a certificate with its classes."""
    tolerance = _tolerance(max(_largest(clean), _largest(attacked)))
    clean_differs, clean_tied = _differences(clean, points.clean_prediction, tolerance)
    attacked_differs, attacked_tied = _differences(attacked, points.adversarial_prediction, tolerance)
    correct = clean.argmax(1) == points.labels
    return PointsCheck(
        certificate_sha256=points.certificate_sha256,
        n=len(points.labels),
        clean_correct=int(correct.sum()),
        survived=int((correct & (attacked.argmax(1) == points.labels)).sum()),
        clean_disagreements=clean_differs,
        adversarial_disagreements=attacked_differs,
        ties=clean_tied + attacked_tied,
        changed=(
            *_changed(clean, points.clean_prediction, points.labels, attacked=False),
            *_changed(attacked, points.adversarial_prediction, points.labels, attacked=True),
        ),
    )


def _changed(
    scores: NDArray[np.float32],
    before: NDArray[np.integer],
    labels: NDArray[np.integer],
    *,
    attacked: bool,
) -> Iterator[ChangedPoint]:
    """Yield the rows of ``scores`` [n, K] that peak elsewhere than at the class ``before`` [n]."""
    after = scores.argmax(1)
    for index in np.flatnonzero(after != before).tolist():
        yield ChangedPoint(
            index=index,
            attacked=attacked,
            label=int(labels[index]),
            before=int(before[index]),
            after=int(after[index]),
        )


def compare_answers(reference: NDArray[np.float32], found: NDArray[np.float32]) -> Agreement:
    """Compare logits [n, K] of two implementations whose float32 sums run in another order."""
    return _agreement(reference, found, tolerance=_tolerance(_largest(reference)))


def check_masks(model: ModelProto, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    """Check that every exported weight is zero outside its mask.

    The exporter may transpose a linear layer's weight, and stores equal tensors once: a mask whose
    parameter has no tensor of that name is compared with the tensors of its shape.

    Args:
        model: a graph without encoded weights.
        masks: parameter name -> bool, True where a weight is kept, in the parameter's own shape.

    Raises:
        VerificationError: a weight outside its mask is not zero, or a masked weight is not found.
    """
    tensors = weights(model)
    for name, mask in masks.items():
        named = tensors.get(name)
        if named is not None and named.shape == mask.shape:
            outside = np.count_nonzero(named[~mask])
            if outside:
                raise VerificationError(
                    f"{name}: {outside} exported weights outside the mask are not zero", code="mask-violated"
                )
        elif not any(
            tensor.shape == mask.shape and not np.any(tensor[~mask])
            for stored in tensors.values()
            for tensor in (stored, stored.T)
        ):
            raise VerificationError(
                f"{name}: no exported tensor has its shape and keeps to its mask", code="mask-violated"
            )


def _agreement(
    reference: NDArray[np.float32],
    found: NDArray[np.float32],
    *,
    tolerance: float | None,
    required: float = 1.0,
) -> Agreement:
    differs, ties = _differences(reference, found.argmax(1), tolerance or 0.0)
    return Agreement(
        n=len(reference),
        max_logit_difference=_largest(found - reference),
        largest_logit=_largest(reference),
        tolerance=tolerance,
        argmax_agree=len(reference) - differs,
        ties=ties,
        required=required,
    )


def _differences(
    scores: NDArray[np.float32], classes: NDArray[np.integer], tolerance: float
) -> tuple[int, int]:
    """Count rows of ``scores`` [n, K] that peak elsewhere than at ``classes`` [n], and ties among them.

    In a tie both classes have the same score within twice the tolerance (each may be off by one)."""
    chosen = scores.argmax(1)
    gap = np.take_along_axis(scores, np.stack([chosen, classes], axis=1), axis=1)
    differs = chosen != classes
    return int(differs.sum()), int((differs & (np.abs(gap[:, 0] - gap[:, 1]) <= 2 * tolerance)).sum())


def _tolerance(largest: float) -> float:
    return SUM_TOLERANCE * max(1.0, largest)


def _reference(classifier: nn.Module, images: NDArray[np.float32], batch_size: int) -> NDArray[np.float32]:
    network = copy.deepcopy(classifier).cpu().float().eval()
    with torch.no_grad():
        batches = [
            network(torch.from_numpy(images[start : start + batch_size])).numpy()
            for start in range(0, len(images), batch_size)
        ]
    return np.concatenate(batches)


def _rounding(
    classifier: nn.Module, reference: NDArray[np.float32], images: NDArray[np.float32], batch_size: int
) -> float:
    """Return the largest distance of float32 logits from float64; 0 where that cannot be computed."""
    network = copy.deepcopy(classifier).cpu().double().eval()
    try:
        with torch.no_grad():
            exact = [
                network(torch.from_numpy(images[start : start + batch_size]).double()).numpy()
                for start in range(0, len(images), batch_size)
            ]
    except RuntimeError:  # code of the user's that mixes precisions
        return 0.0
    return float(np.abs(np.concatenate(exact) - reference).max())


def _largest(values: NDArray[np.float32]) -> float:
    """Return the largest magnitude; NaN when any value is NaN."""
    return float(np.abs(values).max())
