#!/usr/bin/env bash
# torchinfo 1.8.0, torch-pruning 1.6.1, thop 0.1.1 and torchprofile 0.1.0 count a transposed convolution of stride 2 four
# times too high.
#
# Expected: ConvTranspose2d(8, 4, kernel_size=4, stride=2, padding=1) on 8x8 pixels multiplies every input value by a
#   4x4 kernel for each of 4 outputs: 8 * 8*8 * 4*4 * 4 = 32,768 multiply-accumulates.
# Seen: ptflops 0.7.5 and torch's own counter say 32,768; the four others say 131,072, the count of an ordinary convolution
#   over the output, stride squared too many. A share of pruned MACs computed with them is off wherever such layers are.
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
from torch.utils.flop_counter import FlopCounterMode

warnings.filterwarnings("ignore")
layer = torch.nn.ConvTranspose2d(8, 4, kernel_size=4, stride=2, padding=1, bias=False)
image = torch.rand(1, 8, 8, 8)
# The operator is linear: its matrix has one non-zero entry per multiplication that reaches an output.
basis = torch.eye(512).reshape(512, 8, 8, 8)
inside = int((torch.nn.functional.conv_transpose2d(basis, torch.ones_like(layer.weight), stride=2, padding=1) != 0).sum())
with FlopCounterMode(display=False) as counter:
    layer(image)
with contextlib.redirect_stdout(io.StringIO()):
    found = {
        "torch FlopCounterMode / 2": counter.get_total_flops() // 2,
        "ptflops": int(ptflops.get_model_complexity_info(layer, (8, 8, 8), as_strings=False, print_per_layer_stat=False)[0]),
        "torchinfo": torchinfo.summary(layer, input_data=image, verbose=0).total_mult_adds,
        "torch-pruning": int(torch_pruning.utils.count_ops_and_params(layer, image)[0]),
        "thop": int(thop.profile(layer, (image,), verbose=False)[0]),
        "torchprofile": int(torchprofile.profile_macs(layer, image)),
    }
print("torch", torch.__version__, "| products with the padding's border 32768, without it", inside)
for name, count in found.items():
    print(f"{name}: {count}")
seen = list(found.values()) == [32768, 32768, 131072, 131072, 131072, 131072]
raise SystemExit(0 if seen else "the behavior changed")
PY
