#!/usr/bin/env bash
# onnx-ir 1.1.0, and with it the optimizer and version converter of onnxscript 0.7.2: sparse initializers are lost.
#
# Expected: `sparse_initializer` is part of ONNX's GraphProto; a model that the checker accepts and ONNX Runtime runs
#   comes back from from_proto/to_proto with its weights, or an error is raised.
# Seen: the sparse weight is dropped, a log line calls the valid model invalid, nothing is raised, and the returned
#   model no longer passes the checker or loads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 onnxruntime==1.32.0 numpy
cd "$work"
env/bin/python - <<'PY'
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript.optimizer
from onnx import TensorProto, helper, numpy_helper

values = numpy_helper.from_array(np.array([0.5, -2.0], np.float32), "w")
indices = numpy_helper.from_array(np.array([1, 7], np.int64), "w_indices")
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w"], ["y"])],
    "one_sparse_convolution",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 6, 6])],
    sparse_initializer=[helper.make_sparse_tensor(values, indices, [1, 1, 3, 3])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model)
image = np.ones((1, 1, 8, 8), np.float32)
(y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": image})
assert np.all(y == -1.5)


def loads(candidate):
    try:
        onnx.checker.check_model(candidate)
        onnxruntime.InferenceSession(candidate.SerializeToString())
    except Exception as error:
        return f"no: {str(error).splitlines()[0][:110]}"
    return "yes"


returned = {
    "onnx_ir.to_proto(onnx_ir.from_proto(model))": onnx_ir.to_proto(onnx_ir.from_proto(model)),
    "onnxscript.optimizer.optimize(model)": onnxscript.optimizer.optimize(model),
}
print("onnx", onnx.__version__, "onnx-ir", onnx_ir.__version__, "onnxscript", onnxscript.__version__)
for name, candidate in returned.items():
    print(f"{name}: {len(candidate.graph.sparse_initializer)} of 1 sparse initializer left; loads: {loads(candidate)}")
lost = all(not each.graph.sparse_initializer and loads(each) != "yes" for each in returned.values())
raise SystemExit(0 if lost else "the behavior changed")
PY
