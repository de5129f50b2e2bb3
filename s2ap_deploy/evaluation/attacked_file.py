"""The file that gave every answer of a certificate, and how it was attacked. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from s2ap_deploy.spec import Record

TRANSFER = "transfer"
"""What a certificate calls the breaks by points that were made for another network."""


class TwinAgreement(Record):
    """File and differentiable twin on the same clean and adversarial inputs, ``n`` together.

    ``ties`` are inputs on which only rounding decides between two classes; ``matches`` says whether the twin
    speaks for the file, by the rule of ``onnx_export.verification.compare_logits``.
    """

    n: int = Field(ge=1)
    max_logit_difference: float
    tolerance: float
    equal_predictions: int
    ties: int
    matches: bool


class Transfer(Record):
    """The file on points that broke, or failed to break, the network it was made from.

    ``survived`` samples are classified correctly both clean and there. Robustness that only such points
    measure is overstated, as they were made for other weights: the certificate's own figure is the lower.
    """

    certificate_sha256: str
    n: int = Field(ge=1)
    survived: int = Field(ge=0)


class AttackedFile(Record):
    """One exported file. ``quantized``: it computes with integers, and its twin rounds as it does."""

    sha256: str
    bytes: int
    format: Literal["onnx"] = "onnx"
    quantized: bool
    twin: TwinAgreement
    transfer: Transfer | None = None
    statement: Literal["white-box attacks on a differentiable twin; every answer is the file's own"] = (
        "white-box attacks on a differentiable twin; every answer is the file's own"
    )
