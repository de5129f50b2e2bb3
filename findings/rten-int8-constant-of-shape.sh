#!/usr/bin/env bash
# rten-convert 0.22.0 refuses ConstantOfShape with an int8 value, and takes it with int32.
#
# Expected: ONNX allows all integer types as the value of ConstantOfShape; a weight that is scattered into zeros of int8 (a sparse int8
#   layer) starts so, and rten has int8 tensors.
# Seen: the conversion fails with "Unsupported value type int8"; the same graph in int32 is converted.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet rten-convert==0.22.0 onnx==1.19.1
cd "$work"
cat > make.py <<'PY'
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

kind = {"int8": (TensorProto.INT8, np.int8), "int32": (TensorProto.INT32, np.int32)}[sys.argv[1]]
graph = helper.make_graph(
    [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"], value=numpy_helper.from_array(np.zeros(1, kind[1]))),
        helper.make_node("Cast", ["zeros"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "numbers"], ["y"]),
    ],
    "zeros",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    initializer=[numpy_helper.from_array(np.array([4], np.int64), "shape")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, f"{sys.argv[1]}.onnx")
PY
for kind in int8 int32; do
  env/bin/python make.py "$kind"
  if env/bin/rten-convert "$kind.onnx" "$kind.rten" > "$kind.log" 2>&1; then code=0; else code=$?; fi
  echo "rten-convert 0.22.0, $kind: exit code $code: $(tail -n 1 "$kind.log")"
done
[ ! -s int8.rten ] && [ -s int32.rten ] && grep -qi "int8" int8.log || { echo "the behavior changed"; exit 1; }
