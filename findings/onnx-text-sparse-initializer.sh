#!/usr/bin/env bash
# onnx 1.23.2: the textual form of a model leaves out its sparse initializers.
#
# Expected: onnx.parser.parse_model(onnx.printer.to_text(model)) gives the model back, or to_text says that it cannot
#   write a sparse initializer.
# Seen: to_text writes dense initializers only, without a word; the parsed model has lost the weight, and the checker
#   refuses it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet onnx==1.23.2 numpy
cd "$work"
env/bin/python - <<'PY'
import numpy as np
import onnx
import onnx.parser
import onnx.printer
from onnx import TensorProto, helper, numpy_helper

values = numpy_helper.from_array(np.array([0.5, -2.0], np.float32), "sparse_weight")
indices = numpy_helper.from_array(np.array([1, 7], np.int64), "sparse_weight_indices")
dense = numpy_helper.from_array(np.array([3.0], np.float32), "dense_bias")
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "sparse_weight", "dense_bias"], ["y"])],
    "one_sparse_convolution",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 6, 6])],
    initializer=[dense],
    sparse_initializer=[helper.make_sparse_tensor(values, indices, [1, 1, 3, 3])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model)
text = onnx.printer.to_text(model)
parsed = onnx.parser.parse_model(text)
try:
    onnx.checker.check_model(parsed)
    answer = "accepted"
except onnx.checker.ValidationError as error:
    answer = f"refused: {' '.join(str(error).split())[:100]}"
print("onnx", onnx.__version__)
print(text)
print("dense initializers", len(parsed.graph.initializer), "sparse initializers", len(parsed.graph.sparse_initializer))
print("the parsed model is", answer)
lost = len(parsed.graph.initializer) == 1 and not parsed.graph.sparse_initializer and answer != "accepted"
raise SystemExit(0 if lost else "the behavior changed")
PY
