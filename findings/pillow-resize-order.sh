#!/usr/bin/env bash
# Pillow 13.0.0: resize reduces a tall image along its height first; Pillow 11.3.0 always reduces the width first.
#
# Expected: the same 8-bit pixels from the same image, size and filter, so that a network that was judged on images resized with one
#   release sees the same pixels with another. Rounding happens between the two passes, so their order decides bits.
# Seen: images more than twice as tall as wide get other pixels (by at most a level or two); wider ones are equal to the byte.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 11.3.0 13.0.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "pillow==$version" numpy==2.3.5
done
cat > "$work/resize.py" <<'PY'
import sys

import numpy as np
import PIL
from PIL import Image

draw = np.random.default_rng(0)
sizes = [(40, 100), (30, 90), (64, 160), (60, 70), (50, 90), (90, 40), (64, 64)]
found = {}
for width, height in sizes:
    pixels = draw.integers(0, 256, (height, width), dtype=np.uint8)
    new = (width // 2, height // 2)
    found[f"{width}x{height}"] = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BILINEAR))
np.savez(sys.argv[1], **found)
print("pillow", PIL.__version__)
PY
"$work/11.3.0/bin/python" "$work/resize.py" "$work/old.npz"
"$work/13.0.0/bin/python" "$work/resize.py" "$work/new.npz"
"$work/13.0.0/bin/python" - "$work/old.npz" "$work/new.npz" <<'PY'
import sys

import numpy as np

old, new = map(np.load, sys.argv[1:])
tall = {}
for size in old:
    width, height = map(int, size.split("x"))
    distance = int(np.abs(old[size].astype(int) - new[size]).max())
    tall.setdefault(height > 2 * width, []).append(distance)
    print(f"{size} to half: largest difference {distance} levels")
seen = all(tall[True]) and not any(tall[False])
raise SystemExit(0 if seen else "the behavior changed")
PY
