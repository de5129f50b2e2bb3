#!/usr/bin/env bash
# transformers 5.24.0: save_pretrained of a ViT writes tensors under other names than the network's own state_dict.
#
# Expected: the names in model.safetensors are those of model.state_dict(), so that whoever reads the file and the module side
#   by side (a pruning tool, a converter) finds each weight under its name, and load_state_dict takes the file strictly.
# Seen: the names of the encoder's layers differ (vit.encoder.layer.0.attention.attention.key.weight in the file,
#   vit.layers.0.attention.k_proj.weight in the module): load_state_dict refuses the file; from_pretrained converts the names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 safetensors numpy
cd "$work"
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import torch
import transformers
from safetensors.torch import load_file

config = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
)
model = transformers.ViTForImageClassification(config).eval()
model.save_pretrained("saved", safe_serialization=True)
stored, own = load_file("saved/model.safetensors"), model.state_dict()
only_stored, only_own = sorted(stored.keys() - own.keys()), sorted(own.keys() - stored.keys())
print("transformers", transformers.__version__, "|", len(stored), "tensors in the file,", len(only_stored), "of other names")
print("for example", only_stored[0], "in the file and", only_own[0], "in the module")
try:
    model.load_state_dict(stored)
    refused = False
except RuntimeError:
    refused = True
again = transformers.ViTForImageClassification.from_pretrained("saved").eval()
image = torch.rand(1, 3, 8, 8)
with torch.no_grad():
    same = torch.equal(model(image).logits, again(image).logits)
print("load_state_dict refuses the file:", refused, "| from_pretrained gives the same logits:", same)
raise SystemExit(0 if only_stored and refused and same else "the behavior changed")
PY
