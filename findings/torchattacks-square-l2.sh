#!/usr/bin/env bash
# torchattacks 3.5.1: the Square attack in the L2 norm raises a broadcast error for images of 12x12 pixels.
#
# Expected: Square(norm="L2") attacks images of any size, as its L-inf form does and as it does at 16x16 and 28x28 pixels.
# Seen: at 12x12 pixels it raises "output with shape ... doesn't match the broadcast shape ..." from a window of odd size.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy requests tqdm scipy
"$work/env/bin/pip" install --quiet --no-deps torchattacks==3.5.1
cd "$work"
env/bin/python - <<'PY'
from importlib.metadata import version

import torch
import torchattacks

torch.manual_seed(0)
answers = {}
for norm, eps in (("Linf", 8 / 255), ("L2", 0.5)):
    for size in (12, 16, 28):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, 10)).eval()
        images = torch.rand(4, 3, size, size)
        attack = torchattacks.Square(network, norm=norm, eps=eps, n_queries=50)
        try:
            attack(images, network(images).argmax(1))
            answers[norm, size] = "ok"
        except RuntimeError as error:
            answers[norm, size] = str(error).split(",")[0]
print("torchattacks", version("torchattacks"), "torch", torch.__version__)
for (norm, size), answer in answers.items():
    print(f"Square {norm} at {size}x{size}: {answer}")
failing = [key for key, answer in answers.items() if answer != "ok"]
raise SystemExit(0 if failing == [("L2", 12)] else "the behavior changed")
PY
