#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts nothing in attention on a CPU.
#
# Expected: torch.utils.flop_counter counts the two matrix products of scaled_dot_product_attention, as it does on a GPU and
#   as it does when the same formula is written with matmul; nn.MultiheadAttention in eval mode has the same operations
#   with and without gradients.
# Seen: scaled_dot_product_attention counts 0; nn.MultiheadAttention counts its projections but not its attention while its
#   parameters need gradients, and 0 in all once they do not, since the fused operators have no formula. Nothing warns.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
env/bin/python - <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


q = torch.rand(1, 4, 10, 4)  # batch, heads, tokens, width of a head
by_hand = flops(lambda: torch.softmax(q @ q.transpose(-1, -2) / 2, -1) @ q)
fused = flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
layer = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
x = torch.rand(1, 10, 16)
learning = flops(lambda: layer(x, x, x, need_weights=False))
frozen = flops(lambda: layer.requires_grad_(False)(x, x, x, need_weights=False))
print("torch", torch.__version__)
print(f"attention written with matmul: {by_hand}; scaled_dot_product_attention: {fused}")
print(f"MultiheadAttention (projections {2 * 4 * 10 * 16 * 16}, attention {by_hand}): learning {learning}, frozen {frozen}")
seen = by_hand == 6400 and fused == 0 and learning == 20480 and frozen == 0
raise SystemExit(0 if seen else "the behavior changed")
PY
