"""Predicted sizes: formulas against the encoder itself, and beside what was written."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from s2ap_deploy.codecs.encodings import elias_fano
from s2ap_deploy.codecs.registry import CODECS
from s2ap_deploy.onnx_export.export_report import (
    EncodedTensor,
    ExportReport,
    PredictedSize,
    Quantization,
    Rounding,
)
from s2ap_deploy.records import Agreement
from s2ap_deploy.reporting.figure_data import WHOLE_FILE, sizes, stored_tensors, values

EF = CODECS["ef"]


def report(entries: int, nonzeros: int, encoding: str = "ef", int8: bool = False) -> ExportReport:
    tensor = EncodedTensor(
        name="w",
        shape=(entries,),
        encoding=encoding,
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
        quantization=Quantization(scheme="s", calibration_images=1, float_bytes=1) if int8 else None,
        versions={},
    )


@given(st.sets(st.integers(0, 4999), min_size=1, max_size=3000), st.booleans())
def test_the_formulas_bound_what_the_encoder_writes(positions, int8) -> None:
    entries, value = 5000, 1 if int8 else 4
    found = {each.encoding: each.predicted for each in sizes(report(entries, len(positions), int8=int8))}
    code = elias_fano.encode(np.array(sorted(positions), dtype=np.int64), entries)
    written = code.bytes + value * len(positions)
    assert written <= found["Elias-Fano"] - EF.node_bytes[0] + 2  # each part fills up its last byte
    assert found["entropy"] <= found["Elias-Fano"] - EF.node_bytes[0] + 1e-6
    assert found["dense"] == value * entries + CODECS["dense"].node_bytes[0]
    assert found["bitmask"] == value * len(positions) + entries / 8 + CODECS["mask"].node_bytes[0]
    assert found["COO"] > found["entropy"]
    assert found["gaps"] >= (value + 1) * len(positions)


@given(st.integers(-5, 5000), st.integers(-5, 5000), st.sampled_from(list(CODECS)), st.booleans())
def test_a_damaged_report_gives_numbers_all_the_same(entries, nonzeros, encoding, int8) -> None:
    damaged = report(entries, nonzeros, encoding, int8)
    assert all(each.predicted >= 0 for each in sizes(damaged))
    assert stored_tensors(damaged)[0].predicted >= 0


def test_what_was_written_stands_beside_the_encoding_that_every_tensor_has() -> None:
    measured = {each.encoding: each.measured for each in sizes(report(5000, 500))}
    assert measured["Elias-Fano"] == measured["as written"] == 1
    assert (measured["gaps"], measured["bitmask"], measured["COO"], measured["entropy"]) == (None,) * 4
    assert measured["dense"] == 20_000  # of the dense twin
    assert {each.encoding: each.measured for each in sizes(report(5000, 500, "mask"))}["bitmask"] == 1


def test_the_whole_file_stands_beside_what_was_predicted_of_it() -> None:
    plain = report(5000, 500)
    assert WHOLE_FILE not in [each.encoding for each in sizes(plain)]
    foreseen = plain.model_copy(update={"predicted": PredictedSize(bytes=7, macs=9), "bytes": 8})
    last = sizes(foreseen)[-1]
    assert (last.encoding, last.predicted, last.measured) == (WHOLE_FILE, 7, 8)


def test_rounded_values_count_in_their_own_type_and_vectors_are_not_rounded() -> None:
    plain = report(5000, 500)
    rounding = Rounding(values="float16", tensors=1, flushed=0, max_weight_difference=0.0)
    vector = plain.model_copy(update={"rounding": rounding})
    assert values(vector, vector.tensors[0]) == "float32"
    matrix = vector.tensors[0].model_copy(update={"shape": (50, 100)})
    assert values(vector, matrix) == "float16"
    assert values(plain, matrix) == "float32"
