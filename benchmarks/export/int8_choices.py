"""Compare int8 files of pruned MNIST networks: bits of weights, calibration, quantization-aware training.

    python -m benchmarks int8-choices --shared ../shared --work work

The shared checkpoint, with 90 % of the weights removed and with half of the channels removed, fine-tuned for
four epochs, of which the last two compute as the int8 file will where training is quantization-aware. Each
file: bytes, clean accuracy, AutoAttack on the file itself, and whether processors with fewer instructions,
emulated by qemu-x86_64 where it is installed, give the same bits. Finished parts are not run again, and the
result file grows row by row.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.lib import arguments, commands, results
from s2ap_deploy import api, files
from s2ap_deploy.data import datasets
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.onnx_export.onnx_module import OnnxModule
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.training.pgd import pgd_accuracy

NETWORKS: dict[str, dict[str, Any]] = {
    "weights-90": {"sparsity": 0.9},
    "channels-50": {"granularity": "channel", "keep_ratio": 0.5},
}
SETTINGS = {
    "data.validation_fraction": 0.88,  # 7,200 images train
    "prune.search.objective.attack_steps": 5,
    "prune.finetune.objective.attack_steps": 5,
}
THREAT = ThreatModel(norm="Linf", eps="0.1")
BITS = (7, 8)
METHODS = ("minmax", "entropy", "percentile")
PROCESSORS = ("Nehalem", "Haswell")
IMAGES = 64  # of the comparison of bits
EMULATED = """
import sys, numpy, onnxruntime
folder = sys.argv[1]
running = onnxruntime.InferenceSession(folder + "/file.onnx", providers=["CPUExecutionProvider"])
found = running.run(None, {running.get_inputs()[0].name: numpy.load(folder + "/images.npy")})[0]
numpy.save(folder + "/found.npy", found)
"""


def main() -> None:
    parser = arguments.parser(__doc__, "int8-choices", "shared", "work")
    parser.add_argument("--n", type=int, default=500, help="test images to attack")
    parser.add_argument("--autoattack", nargs="*", metavar="NETWORK/FORM", help="files [default: all]")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "int8-choices.json"
    rows: dict[str, dict[str, Any]] = commands.read(kept) if kept.exists() else {}

    def add(key: str, figures: dict[str, Any]) -> None:
        rows[key] = {**rows.get(key, {}), **figures}
        print(key, figures, flush=True)
        files.write_json(kept, rows)
        results.write(args.name, {"n": args.n, "eps": "0.1", "settings": SETTINGS, "rows": rows})

    every = {
        f"{name}/{form}": (name, form, settings)
        for name, (form, settings) in itertools.product(NETWORKS, forms())
    }
    attacked = list(every) if args.autoattack is None else args.autoattack
    for key in (*attacked, *(key for key in every if key not in attacked)):
        if key in rows and ("autoattack" in rows[key] or key not in attacked):
            continue
        made = exported(args, *every[key])
        if key not in rows:
            add(key, measured(args, made))
        if key in attacked:
            started = time.monotonic()
            run, file, _ = made
            found = api.certify(run, artifact=file, n=args.n, threads=1, workers=1, full=True, resume=True)
            seconds = round(time.monotonic() - started)
            add(key, {"autoattack": found.results["file"], "autoattack_n": args.n, "seconds": seconds})


def forms() -> list[tuple[str, dict[str, Any]]]:
    """The float file, files calibrated after training in all ways, files of quantization-aware training."""
    aware = [(f"qat {bits} bits", {"qat": 2, "weight_bits": bits}) for bits in BITS]
    calibrated = [
        (f"{method} {bits} bits", {"calibration": method, "weight_bits": bits})
        for method, bits in itertools.product(METHODS, BITS)
    ]
    return [("float32", {}), *calibrated, *aware]


Exported = tuple[Path, Path, ExportReport]


def exported(args: argparse.Namespace, name: str, form: str, settings: dict[str, Any]) -> Exported:
    """Prune and export; the run folder, the file, its report. What is finished is skipped."""
    aware = settings.get("qat")
    folder = args.work / (f"{name}-qat-{settings['weight_bits']}" if aware else name)
    changes = dict(SETTINGS)
    if aware:
        changes["export.weight_bits"] = settings["weight_bits"]
        if not folder.exists():
            take_over(args.work / name, folder)
    api.prune(
        args.shared / "checkpoints/mnist_convex_eps0.1.pth",
        run=folder,
        data="mnist",
        data_root=args.shared / "data",
        eps="0.1",
        search_epochs=4,
        finetune_epochs=4,
        batch_size=64,
        threads=1,
        settings=changes,
        resume=True,
        **NETWORKS[name],
        **({"qat": aware} if aware else {}),
    )
    options = {key: value for key, value in settings.items() if key != "qat"}
    label = form.replace(" ", "-")
    report = api.export(folder, name=label, threads=1, int8=form != "float32", resume=True, **options)
    return folder, folder / report.folder / report.file, report


def take_over(run: Path, folder: Path) -> None:
    """Make a run folder with the search of another one: the mask is the same."""
    folder.mkdir()
    for stage in ("pretrain", "search"):
        shutil.copytree(run / stage, folder / stage)
    manifest = commands.read(run / "manifest.json")
    manifest["stages"] = {name: manifest["stages"][name] for name in ("pretrain", "search")}
    files.write_json(folder / "manifest.json", manifest)


def measured(args: argparse.Namespace, made: Exported) -> dict[str, Any]:
    """Bytes, clean accuracy on all test images, PGD-50 on the first ``n``, equality of bits elsewhere."""
    _, file, report = made
    test = datasets.load("mnist", root=args.shared / "data").test
    images, labels = test.tensors()
    right = logits(session(file), images.numpy()).argmax(axis=1) == labels.numpy()
    pgd = pgd_accuracy(
        OnnxModule(onnx.load(file)),
        test.subset(range(args.n)),
        threat=THREAT,
        steps=50,
        step_size=0.01,
        seed=0,
        device=torch.device("cpu"),
    )
    return {
        "bytes": report.bytes,
        "dense_bytes": report.dense_bytes,
        "clean_10000": int(right.sum()),
        "pgd_50": pgd.robust,
        "pgd_clean": pgd.clean,
        "same_bits": same_bits(args, file),
    }


def same_bits(args: argparse.Namespace, file: Path) -> dict[str, bool | None]:
    """Whether emulated processors give the bits of this one; None where they cannot be emulated."""
    folder = args.work / "emulated"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(file, folder / "file.onnx")
    pixels = datasets.load("mnist", root=args.shared / "data").test.subset(range(IMAGES)).tensors()[0].numpy()
    np.save(folder / "images.npy", pixels)
    expected = logits(session(file), pixels)
    found: dict[str, bool | None] = {}
    for processor in PROCESSORS:
        (folder / "found.npy").unlink(missing_ok=True)
        emulator = shutil.which("qemu-x86_64")
        if emulator is not None:
            command = [emulator, "-cpu", processor, sys.executable, "-c", EMULATED, str(folder)]
            subprocess.run(command, check=False, capture_output=True, timeout=1200)
        there = (folder / "found.npy").exists()
        found[processor] = bool(np.array_equal(np.load(folder / "found.npy"), expected)) if there else None
    return found
