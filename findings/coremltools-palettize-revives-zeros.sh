#!/usr/bin/env bash
# coremltools 9.0: palettize_weights (k-means) on a pruned model leaves none of its zeros zero.
#
# Expected: of a weight with 90 % exact zeros, one entry of the palette is 0 (by far the most frequent value), so that the
#   mask survives; with 8 bits (256 entries for 385 distinct values) that costs nothing.
# Seen: at 2, 4, 6 and 8 bits the cluster around zero takes in small weights and its mean is written for all of them: 0 of
#   3,712 zeros are left. linear_quantize_weights keeps all of them; so does palettizing after prune_weights with
#   joint_compression=True, which stores the mask beside the palette. Nothing warns about the order.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet coremltools==9.0 scikit-learn numpy
cd "$work"
env/bin/python - 2>/dev/null <<'PY'
import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
from coremltools.converters.mil import Builder

draw = np.random.default_rng(0)
weight = np.where(draw.random((64, 64)) < 0.9, 0, draw.normal(size=(64, 64))).astype(np.float32)
zeros = weight == 0


@Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 64))], opset_version=ct.target.iOS18)
def program(x):
    return Builder.linear(x=x, weight=weight, bias=np.zeros(64, np.float32), name="y")


model = ct.convert(
    program,
    convert_to="mlprogram",
    minimum_deployment_target=ct.target.iOS18,
    compute_precision=ct.precision.FLOAT32,
)


def config(setting):
    return cto.OptimizationConfig(global_config=setting)


def palette(bits):
    return config(cto.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=16))


def kept(compressed):
    """How many of the zeros are zero in the weight that the linear layer reads."""
    operations = compressed._mil_program.functions["main"].operations
    linear = next(each for each in operations if each.op_type == "linear")
    decoder = linear.weight.op
    value = decoder.materialized_val_inference() if decoder.op_type.startswith("constexpr") else linear.weight.val
    return int(((value == 0) & zeros).sum())


direct = {bits: kept(cto.palettize_weights(model, palette(bits))) for bits in (2, 4, 6, 8)}
linear = kept(cto.linear_quantize_weights(model, config(cto.OpLinearQuantizerConfig(mode="linear", weight_threshold=16))))
sparse = cto.prune_weights(model, config(cto.OpThresholdPrunerConfig(threshold=1e-12, weight_threshold=16)))
joint = kept(cto.palettize_weights(sparse, palette(4), joint_compression=True))
print("coremltools", ct.__version__, "| zeros of the weight:", int(zeros.sum()))
print("zeros left after palettize_weights, by bits:", direct)
print("after linear_quantize_weights:", linear, "| after prune_weights and joint palettize_weights:", joint)
seen = set(direct.values()) == {0} and linear == joint == int(zeros.sum())
raise SystemExit(0 if seen else "the behavior changed")
PY
