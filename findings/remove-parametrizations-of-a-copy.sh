#!/usr/bin/env bash
# torch 2.13.0: folding the parametrization of a deep copy breaks the original module.
#
# Expected: copy.deepcopy gives an independent module; torch.nn.utils.parametrize.remove_parametrizations on the copy
#   leaves the original as it is. Folding a copy is the natural way to count or export the plain weights of a
#   weight-normalized network.
# Seen: both share the class that register_parametrization made; removing the property from it through the copy leaves the
#   original without a weight: its next forward pass raises AttributeError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
env/bin/python - <<'PY'
import copy

import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

x = torch.ones(1, 4)
original = weight_norm(torch.nn.Linear(4, 3))
before = original(x)
copied = copy.deepcopy(original)
parametrize.remove_parametrizations(copied, "weight")
assert torch.allclose(copied(x), before)
try:
    original(x)
    answer = "works"
except AttributeError as error:
    answer = f"AttributeError: {error}"
other = weight_norm(torch.nn.Linear(4, 3))
parametrize.remove_parametrizations(weight_norm(torch.nn.Linear(4, 3)), "weight")
other(x)
print("torch", torch.__version__, "| a module made separately works")
print("the original, after its copy was folded:", answer)
raise SystemExit(0 if answer.startswith("AttributeError") else "the behavior changed")
PY
