#!/usr/bin/env bash
# torchinfo 1.8.0, torch-pruning 1.6.1, thop 0.1.1 and ptflops 0.7.5 (default backend): a convolution under
# torch.nn.utils.parametrizations.weight_norm costs nothing, and torchinfo counts one token of a linear layer.
#
# Expected: weight_norm changes how a weight is stored, not how often it multiplies: a 3x3 convolution from 3 to 8 channels
#   on 16x16 pixels takes 55,296 multiply-accumulates with and without it. A linear layer of 16 to 32 on 10 tokens takes
#   5,120.
# Seen: all four say 0 for the same layer once it is parametrized (torchprofile and torch's counter: 55,296), without a
#   warning; torchinfo says 512 for the linear layer whatever the number of tokens. Reports of "MACs after pruning" of such
#   networks leave these layers out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy torchinfo==1.8.0 torch-pruning==1.6.1 thop==0.1.1.post2209072238 \
  torchprofile==0.1.0 ptflops==0.7.5
cd "$work"
env/bin/python - <<'PY'
import contextlib
import io
import warnings

import ptflops
import thop
import torch
import torch_pruning
import torchinfo
import torchprofile
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

warnings.filterwarnings("ignore")


def counts(layer, x):
    with FlopCounterMode(display=False) as counter:
        layer(x)
    with contextlib.redirect_stdout(io.StringIO()):
        return {
            "torchinfo": torchinfo.summary(layer, input_data=x, verbose=0).total_mult_adds,
            "torch-pruning": int(torch_pruning.utils.count_ops_and_params(layer, x)[0]),
            "thop": int(thop.profile(layer, (x,), verbose=False)[0]),
            "ptflops": int(
                ptflops.get_model_complexity_info(
                    layer, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend="pytorch"
                )[0]
            ),
            "torchprofile": int(torchprofile.profile_macs(layer, x)),
            "torch": counter.get_total_flops() // 2,
        }


image = torch.rand(1, 3, 16, 16)
plain = counts(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), image)
normed = counts(weight_norm(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)), image)
tokens = counts(torch.nn.Linear(16, 32, bias=False), torch.rand(1, 10, 16))
print("torch", torch.__version__)
for name in plain:
    print(f"{name}: convolution {plain[name]}, weight-normalized {normed[name]}, linear on 10 tokens {tokens[name]}")
seen = set(plain.values()) == {55296} and list(normed.values()) == [0, 0, 0, 0, 55296, 55296]
seen = seen and tokens["torchinfo"] == 512 and all(tokens[name] == 5120 for name in tokens if name != "torchinfo")
raise SystemExit(0 if seen else "the behavior changed")
PY
