#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static with entropy calibration chooses the full range, as MinMax does.
#
# Expected: entropy calibration looks for a threshold below the largest value that loses the least information; one pixel in
#   a hundred thousand that is a thousand times as large as the others should be cut off, as percentile calibration does.
# Seen: quantize_static builds a histogram of 128 bins and searches it in steps of 128 quantized bins, so the full range is
#   the only candidate: every scale equals MinMax's to the bit. The calibrator itself, given 2,048 bins, does cut off;
#   quantize_static has no option that reaches that setting.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy
cd "$work"
env/bin/python - <<'PY'
import contextlib
import io

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator, quantize_static

draw = np.random.default_rng(0)
images = draw.random((512, 1, 16, 16)).astype(np.float32)
images[0, 0, 0, 0] = 1000
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w"], ["y"], name="convolution")],
    "convolution",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 16, 16])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 14, 14])],
    initializer=[numpy_helper.from_array(np.ones((2, 1, 3, 3), np.float32), "w")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.save(model, "float.onnx")


class Once(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": images}]

    def get_next(self):
        return self.left.pop() if self.left else None


def scale(method):
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static("float.onnx", "int8.onnx", Once(), calibrate_method=method)
    initializers = {each.name: each for each in onnx.load("int8.onnx").graph.initializer}
    return float(numpy_helper.to_array(initializers["x_scale"]))


with contextlib.redirect_stdout(io.StringIO()):
    calibrator = create_calibrator(
        "float.onnx",
        augmented_model_path="augmented.onnx",
        calibrate_method=CalibrationMethod.Entropy,
        extra_options={"num_bins": 2048, "num_quantized_bins": 128},
    )
    calibrator.collect_data(Once())
    finer = float(np.max(calibrator.compute_data()["x"].range_value[1])) / 255
found = {method.name: scale(method) for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile)}
print("onnxruntime", onnxruntime.__version__, "| scale of an input in [0, 1] with one value of 1000")
for name, value in found.items():
    print(f"quantize_static, {name}: {value:.6g}")
print(f"the entropy calibrator alone, with 2048 bins: {finer:.6g}")
seen = found["Entropy"] == found["MinMax"] and found["Percentile"] < found["MinMax"] / 2 and finer < found["MinMax"] / 2
raise SystemExit(0 if seen else "the behavior changed")
PY
