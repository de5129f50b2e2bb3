#!/usr/bin/env bash
# rten-convert 0.22.0: an exclusive CumSum, which ONNX has had since operator set 11, is refused.
#
# Expected: CumSum converts with its attributes `exclusive` and `reverse`, or the documentation of supported operators names
#   the restriction.
# Seen: the same graph converts with exclusive=0 and raises an error with exclusive=1. Decode graphs of sparse weights,
#   which turn gaps into positions, must subtract the first element themselves.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet rten-convert==0.22.0 onnx==1.23.2 onnxruntime==1.32.0 numpy
cd "$work"
env/bin/python - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

for exclusive in (0, 1):
    graph = helper.make_graph(
        [helper.make_node("CumSum", ["x", "axis"], ["y"], exclusive=exclusive)],
        "positions",
        [helper.make_tensor_value_info("x", TensorProto.INT32, [4])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [4])],
        initializer=[numpy_helper.from_array(np.array(0, np.int32), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {"x": np.array([3, 1, 4, 1], np.int32)})
    print("exclusive", exclusive, "in ONNX Runtime:", y.tolist())
    onnx.save(model, f"exclusive{exclusive}.onnx")
PY
answers=()
for exclusive in 0 1; do
  if env/bin/rten-convert "exclusive$exclusive.onnx" >"log$exclusive" 2>&1; then answers+=(converted); else answers+=(refused); fi
  echo "rten-convert 0.22.0, exclusive $exclusive: ${answers[-1]}: $(tail -n 1 "log$exclusive")"
done
[ "${answers[*]}" = "converted refused" ] || { echo "the behavior changed"; exit 1; }
