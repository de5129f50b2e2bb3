"""Decode an ONNX file to a dense one, for a runtime or tool that cannot decode weights at load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from s2ap_deploy.codecs.decode_graph import is_internal
from s2ap_deploy.codecs.encodings.coo import dense_tensor
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.files import atomic, sha256
from s2ap_deploy.onnx_export import encoding as codec
from s2ap_deploy.onnx_export.graph import check
from s2ap_deploy.onnx_export.inference import compare_sums, first_line, logits, session
from s2ap_deploy.onnx_export.onnx_file import OnnxFile, write
from s2ap_deploy.spec import Record

PROBES = 8


class Decoded(Record):
    """A dense file and the encoded one that it was made from.

    ``tensors`` counts the encoded weights, ``entries`` and ``nonzeros`` their contents.
    ``bit_equal``: ONNX Runtime and ONNX's reference evaluator decode them to the same bits, which the dense
    file has. ``max_logit_difference`` is that of both files on random images, in ONNX Runtime.
    """

    file: str
    sha256: str
    bytes: int
    source_sha256: str
    source_bytes: int
    tensors: int
    entries: int
    nonzeros: int
    bit_equal: Literal[True] = True
    max_logit_difference: float
    metadata: dict[str, str]


def decode_file(opened: OnnxFile, output: Path) -> Decoded:
    """Write the dense form of ``opened`` to ``output``, over what is there; metadata stays as it is.

    A file without encoded weights is written as it was read. Raises VerificationError when two
    implementations decode to different bits, when ONNX's full check refuses the result, or when its logits
    differ, and then leaves ``output`` as it was; StorageError when the disk refuses.
    """
    expected = _by_reference(opened.model)
    dense = codec.decode(opened.model)
    found = codec.arrays(dense.graph.initializer)
    _compare(expected, {name: found[name] for name in expected})
    check(dense)
    data = dense.SerializeToString() if expected else opened.content
    with atomic(output) as temporary:
        write(temporary, data)
        difference = _difference(opened, temporary)
        digest = sha256(temporary)
    return Decoded(
        file=output.name,
        sha256=digest,
        bytes=len(data),
        source_sha256=opened.sha256,
        source_bytes=len(opened.content),
        tensors=len(expected),
        entries=sum(array.size for array in expected.values()),
        nonzeros=sum(int(np.count_nonzero(array)) for array in expected.values()),
        max_logit_difference=difference,
        metadata=opened.metadata,
    )


def _by_reference(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """Decode the weights with ONNX's reference evaluator (:func:`decode` uses ONNX Runtime)."""
    decoded = codec.run_decoder(codec.decoder(model), _evaluate)
    for sparse in map(dense_tensor, model.graph.sparse_initializer):
        if not is_internal(sparse.name):
            decoded |= codec.arrays([sparse])
    return decoded


def _evaluate(part: ModelProto, outputs: list[str]) -> list[NDArray[np.generic]]:
    try:
        return [np.asarray(array) for array in ReferenceEvaluator(part).run(outputs, {})]
    except Exception as error:  # pure Python on untrusted numbers: any exception is possible
        raise VerificationError(
            f"the weights cannot be decoded: {first_line(error)}", code="weights-not-decodable"
        ) from error


def _compare(expected: dict[str, NDArray[np.generic]], found: dict[str, NDArray[np.generic]]) -> None:
    for name, array in expected.items():
        same = array.dtype == found[name].dtype and array.shape == found[name].shape
        if not same or array.tobytes() != found[name].tobytes():
            raise VerificationError(
                f"{name}: ONNX Runtime decodes other bits than ONNX's reference evaluator",
                code="decoders-differ",
            )


def _difference(opened: OnnxFile, path: Path) -> float:
    """Return the largest difference between the logits of the two files on random images."""
    images = np.random.default_rng(0).random((PROBES, *opened.input_size), dtype=np.float32)
    before, after = opened.answers(images), logits(session(path), images)
    if not np.isfinite(before).all():
        raise VerificationError(
            "its logits are not finite, so they cannot be compared", code="logits-not-finite"
        )
    difference, tolerance = compare_sums(before, after)
    if not difference <= tolerance < np.inf:  # written so that NaN fails
        raise VerificationError(
            f"the logits of the dense file differ by up to {difference:.3g}", code="logits-differ"
        )
    return difference
