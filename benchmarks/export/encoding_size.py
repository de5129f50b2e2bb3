"""Measure each encoding of CIFAR ResNet-18: bytes, bits per position, load time, latency, equal bits.

Random weights under random masks, uniform and with ERK's share per layer, at 90, 95 and 99 %; with
--checkpoint also under the mask that a search left in a pruned file of this tool. Sizes and equality of bits
do not depend on the weights. Without --sizes-only, times are measured at 90 % and for the search's mask, each
file beside the dense one: on an idle machine only.

    python -m benchmarks encoding-size --sizes-only
    python -m benchmarks encoding-size --checkpoint s2ap-run/finetune/model.safetensors
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from benchmarks.export.edge_latency import beside
from benchmarks.lib import arguments, networks, results
from s2ap_deploy.codecs.codec import entropy_bits
from s2ap_deploy.codecs.registry import CODECS, EncodingName
from s2ap_deploy.codecs.values import FLOAT32, VALUES
from s2ap_deploy.errors import VerificationError
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.onnx_export.encoding import arrays, decode, encode, round_weights, weights
from s2ap_deploy.onnx_export.export_report import EncodedTensor
from s2ap_deploy.onnx_export.graph import check, to_onnx
from s2ap_deploy.onnx_export.verification import decodes_at_load

BUDGETS = {"random": "uniform", "erk": "erk"}  # by the name of the mask
ENCODINGS: tuple[EncodingName, ...] = ("auto", *(codec.name for codec in CODECS.values() if codec.sparse))
# Asked of random masks and float32 values under auto.
MAX_BYTES = {0.9: 5_300_000, 0.95: 2_800_000, 0.99: 620_000}
MAX_OVER_ENTROPY = 1.25  # at 90 and 95 %
MAX_LOAD_MS = 300  # more than the dense file, at 90 %
MAX_LATENCY_RATIO = 1.03
TIMED = 0.9  # the sparsity at which times are measured: the more entries are kept, the longer a load takes


def measured(model: ModelProto, *, timed: bool) -> dict[str, Any]:
    """Every encoding and type of values of one dense model."""
    found = list(weights(model).values())
    entries = sum(array.size for array in found)
    nonzeros = sum(int(np.count_nonzero(array)) for array in found)
    kept = [(int(np.count_nonzero(array)), array.size) for array in found]
    entropy = sum(count * entropy_bits(count, size) for count, size in kept) / nonzeros
    files: dict[str, dict[str, Any]] = {}
    for values in VALUES:
        try:
            rounded, stored, _ = round_weights(model, values)
        except VerificationError as error:  # float16 cannot hold a value; the export refuses it as well
            files[f"auto {values}"] = {"refused": error.message}
            continue
        for encoding in ENCODINGS if values == FLOAT32 else ENCODINGS[:1]:
            coded, table = encode(rounded, encoding=encoding, rounded=stored)
            files[f"{encoding} {values}"] = _row(coded, rounded, table, entropy, 8 * VALUES[values].bytes)
            if timed and values == FLOAT32 and not coded.graph.sparse_initializer:
                files[f"{encoding} {values}"] |= beside(coded, model, seconds=6.0, least=51, processes=1)
    counts = {"weights": entries, "nonzeros": nonzeros, "dense_bytes": model.ByteSize()}
    return {**counts, "entropy_bits": entropy, "files": files}


def _row(
    coded: ModelProto, dense: ModelProto, table: list[EncodedTensor], entropy: float, width: int
) -> dict[str, Any]:
    """Sizes; ``index_bits`` is what is stored of the weights beside the values that are not zero, for each
    of those: positions, decode nodes, names, and the zeros of weights that stay dense."""
    check(coded)
    decoded, expected = (arrays(each.graph.initializer) for each in (decode(coded), dense))
    equal = decoded.keys() == expected.keys() and all(
        decoded[name].tobytes() == array.tobytes() for name, array in expected.items()
    )
    rows = [row for row in table if len(row.shape) > 1]
    total = sum(
        8 * row.bytes - width * row.nonzeros if row.index_bits is None else row.index_bits * row.nonzeros
        for row in rows
    )
    bits = total / sum(row.nonzeros for row in rows)
    kinds = sorted({row.encoding for row in rows})
    return {
        "bytes": coded.ByteSize(),
        "index_bits": bits,
        "over_entropy": bits / entropy,
        "forms": {kind: sum(row.encoding == kind for row in rows) for kind in kinds},
        "bit_equal": equal,
        "decoded_at_load": decodes_at_load(coded),
    }


def missed(rows: list[dict[str, Any]], *, timed: bool) -> list[str]:
    """What does not keep to its target, in words."""
    words = []
    for row in rows:
        for name, file in row["files"].items():
            if "refused" in file:
                continue
            if not file["bit_equal"] or not file["decoded_at_load"]:
                words.append(f"{row['mask']} {name}: not decoded to the same bits at load")
            if timed and file.get("latency_ratio", 0.0) > MAX_LATENCY_RATIO:
                words.append(f"{row['mask']} {name}: latency ratio {file['latency_ratio']:.3f}")
        best = row["files"][f"auto {FLOAT32}"]
        limit = MAX_BYTES.get(row.get("sparsity", 0.0))
        if row["mask"].startswith("random") and limit is not None and best["bytes"] > limit:
            words.append(f"{row['mask']}: {best['bytes']:,} bytes, asked {limit:,}")
        if row.get("sparsity") in (0.9, 0.95) and best["over_entropy"] > MAX_OVER_ENTROPY:
            words.append(f"{row['mask']}: index bits {best['over_entropy']:.2f} times the entropy")
        if timed and row.get("sparsity") == 0.9 and best["load_difference_ms"] > MAX_LOAD_MS:
            words.append(f"{row['mask']}: loads {best['load_difference_ms']:.0f} ms later than dense")
    return words


def main() -> None:
    parser = arguments.parser(__doc__, "encoding-size")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--checkpoint", type=Path, help="a pruned file of this tool, for its mask")
    parser.add_argument("--sizes-only", action="store_true", help="measure no times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for mask, budget in BUDGETS.items():
        for sparsity in options.sparsity:
            model = to_onnx(networks.pruned("cifar-resnet18", sparsity, budget), networks.CIFAR)
            rows.append({"mask": f"{mask} {sparsity:.0%}", "sparsity": sparsity})
            rows[-1] |= measured(model, timed=sparsity == TIMED and not options.sizes_only)
            show(rows[-1])
    if options.checkpoint is not None:
        classifier, info = checkpoint.load(options.checkpoint)[:2]
        model = to_onnx(classifier, info.preprocessing.size)
        rows.append({"mask": "search", "arch": info.arch})
        rows[-1] |= measured(model, timed=not options.sizes_only)
        show(rows[-1])
    words = missed(rows, timed=not options.sizes_only)
    for word in words:
        print(f"missed: {word}")
    name = f"{options.name}-only" if options.sizes_only else options.name
    results.write(name, {"timed": not options.sizes_only, "rows": rows, "missed": words})
    if words:
        raise SystemExit(1)


def show(row: dict[str, Any]) -> None:
    print(f"{row['mask']}: {row['nonzeros']:,} of {row['weights']:,}, entropy {row['entropy_bits']:.2f} bits")
    for name, file in row["files"].items():
        print(f"  {name:10} {file}", flush=True)
