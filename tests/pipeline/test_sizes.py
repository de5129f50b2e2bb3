"""Predicted sizes: formulas against the encoder itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.exporting import elias_fano
from s2ap_deploy.exporting.artifact import Agreement, EncodedTensor, ExportReport, Quantisation
from s2ap_deploy.pipeline.sizes import sizes, stored_tensors


def report(entries: int, nonzeros: int, encoding: str = "ef", int8: bool = False) -> ExportReport:
    tensor = EncodedTensor(
        name="w",
        shape=(entries,),
        encoding=encoding,  # type: ignore[arg-type]
        entries=entries,
        nonzeros=nonzeros,
        bytes=1,
        dense_bytes=4 * entries,
    )
    return ExportReport(
        file="model.onnx",
        sha256="",
        bytes=1,
        dense_bytes=1,
        opset=20,
        encoding="auto",
        tensors=(tensor,),
        weights=entries,
        nonzeros=nonzeros,
        sparsity=0.5,
        agreement=Agreement(
            n=1, max_logit_difference=0.0, largest_logit=1.0, tolerance=1.0, argmax_agree=1, ties=0
        ),
        source_weights_sha256="",
        quantisation=Quantisation(scheme="s", calibration_images=1, float_bytes=1) if int8 else None,
        versions={},
    )


@given(st.sets(st.integers(0, 4999)), st.booleans())
def test_the_formulas_bound_what_the_encoder_writes(positions: set[int], int8: bool) -> None:
    entries, value = 5000, 1 if int8 else 4
    found = {each.encoding: each.predicted for each in sizes(report(entries, len(positions), int8=int8))}
    code = elias_fano.encode(np.array(sorted(positions), dtype=np.int64), entries)
    written = code.bytes + value * len(positions)
    assert written <= found["Elias-Fano"] + 2  # each of its two parts fills up its last byte
    assert found["entropy"] <= found["Elias-Fano"] + 1e-6
    assert found["dense"] == value * entries
    assert found["COO"] == (8 + value) * len(positions)
    assert found["bitmap"] == value * len(positions) + entries / 8


@given(st.integers(-5, 50), st.integers(-5, 50), st.sampled_from(["dense", "ef", "zeros"]), st.booleans())
def test_a_damaged_report_gives_numbers_all_the_same(
    entries: int, nonzeros: int, encoding: str, int8: bool
) -> None:
    damaged = report(entries, nonzeros, encoding, int8)
    assert all(each.predicted >= 0 for each in sizes(damaged) if each.encoding != "bitmap")
    assert stored_tensors(damaged)[0].predicted >= 0
