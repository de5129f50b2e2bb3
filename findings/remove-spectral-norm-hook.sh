#!/usr/bin/env bash
# torch 2.13.0: a layer whose spectral norm was removed cannot load its own state dict.
#
# Expected: torch.nn.utils.remove_spectral_norm undoes torch.nn.utils.spectral_norm: the layer has a plain weight again, and
#   layer.load_state_dict(layer.state_dict()) works, as it does after remove_weight_norm.
# Seen: the hook that prepares loading stays behind. The state dict holds weight and bias only, and a strict load asks for
#   weight_orig and weight_u.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
env/bin/python - 2>/dev/null <<'PY'
import torch
from torch.nn import utils


def own_state(add, remove):
    layer = remove(add(torch.nn.Conv2d(3, 4, 3)))
    try:
        layer.load_state_dict(layer.state_dict())
        return sorted(layer.state_dict()), "loads"
    except RuntimeError as error:
        return sorted(layer.state_dict()), " ".join(str(error).split())


weight = own_state(utils.weight_norm, utils.remove_weight_norm)
spectral = own_state(utils.spectral_norm, utils.remove_spectral_norm)
print("torch", torch.__version__)
print("after remove_weight_norm:", *weight)
print("after remove_spectral_norm:", *spectral)
seen = weight[1] == "loads" and spectral[0] == ["bias", "weight"] and "weight_orig" in spectral[1]
raise SystemExit(0 if seen else "the behavior changed")
PY
