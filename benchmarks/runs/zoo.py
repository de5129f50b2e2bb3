"""Small networks of one odd feature each, through prune, certify, export and gate, float and int8.

    python -m benchmarks zoo --shared ../shared --work work/zoo [--only vit,conv1d] [--n 50]

Each is pruned to 90 % by weight and to half of its channels. A row ends with the verdict, or with the stage
and the code of a refusal. ``sparsity`` is counted from the saved file, over every tensor of two or more
dimensions but the auxiliary head that no forward pass uses; ``logits_apart`` compares an exported file in
ONNX Runtime with the network of that file. Finished rows of the result file are not run again.
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from safetensors.torch import load_file

from benchmarks.lib import arguments, commands, results
from s2ap_deploy.cli.main import run_cli

ASKED = {"weight": ("--sparsity", "0.9"), "channel": ("--granularity", "channel", "--keep-ratio", "0.5")}
SHORT = ("--search-epochs", 1, "--finetune-epochs", 1, "--warmup-epochs", 0, "--loss", "at", "--threads", 1)
GATE = ("gate", "--min-clean", 0, "--rule", "point")
IMAGES = 64


def main() -> None:
    parser = arguments.parser(__doc__, "zoo", "shared", "work")
    parser.add_argument("--only", default="", help="names of networks, separated by commas")
    parser.add_argument("--n", type=int, default=20, help="images that are attacked")
    args = parser.parse_args()
    torch.set_num_threads(1)
    code = args.shared.resolve() / "cases" / "zoo.py"
    args.work.mkdir(parents=True, exist_ok=True)
    if not any(args.work.glob("zoo_*.pt")):
        subprocess.run([sys.executable, str(code)], cwd=args.work, check=True, stdout=subprocess.DEVNULL)
    names = sorted(path.stem.removeprefix("zoo_") for path in args.work.glob("zoo_*.pt"))
    chosen = [name for name in names if not args.only or name in args.only.split(",")]
    kept = results.FOLDER / f"{args.name}.json"
    rows = commands.read(kept)["rows"] if kept.is_file() else []
    for name in chosen:
        for unit in ASKED:
            if any((each["network"], each["unit"]) == (name, unit) for each in rows):
                continue
            rows.append(row(args.work, code, name, unit, args.n))
            print(json.dumps(rows[-1]), flush=True)
            results.write(args.name, {"networks": len(names), "images": args.n, "rows": rows})


def row(work: Path, code: Path, name: str, unit: str, n: int) -> dict[str, Any]:
    """Return what became of one network: figures of every stage that ran."""
    run, arch = work / f"{name}-{unit}", f"{code}:{name}"
    here = ("--run", run, "--arch", arch)
    given = (work / f"zoo_{name}.pt", "--data", "digits", "--eps", "0.05", *ASKED[unit], *SHORT)
    few = ("--n", n, "--workers", 1, "--threads", 1)
    found: dict[str, Any] = {"network": name, "unit": unit}
    ended = steps(("prune", *given, *here), ("certify", *few, *here), ("export", "--onnx", *here))
    if ended is None:
        verdict, _ = told(*GATE, "--run", run)
        found |= figures(run, arch) | {"float": verdict["status"]}
        int8 = run / "export-int8" / "model-int8.onnx"
        ended = steps(
            ("export", "--int8", *here), ("certify", "--artifact", int8, "--run", run, *few), prefix="int8 "
        )
    if ended is not None:
        return found | ended
    verdict, _ = told(*GATE, "--run", run)
    certificate = commands.read(run / "artifact-int8" / "certificate.json")
    twin = certificate["subject"]["artifact"]["twin"]
    report = commands.read(run / "export-int8" / "report.json")
    return found | {
        "int8": verdict["status"],
        "int8_sparsity": report["sparsity"],
        "int8_robust": certificate["robust"]["value"],
        "int8_bytes": report["bytes"],
        "int8_agrees": (report["agreement"]["argmax_agree"], report["agreement"]["n"]),
        "int8_twin_apart": twin["max_logit_difference"],
    }


def steps(*asked: Sequence[Any], prefix: str = "") -> dict[str, Any] | None:
    """Run commands until one fails; return where and with which code."""
    for command in asked:
        answer, exit_code = told(*command)
        if exit_code:
            return {"ends": prefix + command[0], "exit": exit_code, "code": answer.get("code")}
    return None


def figures(run: Path, arch: str) -> dict[str, Any]:
    """Return the sparsities that were reported, the one counted, and the logits of the exported file."""
    search = commands.stages(run)["search"]["results"]
    certificate = commands.read(run / "certify" / "pruned.json")
    report = commands.read(run / "export" / "report.json")
    return {
        "sparsity": counted(run / "finetune" / "model.safetensors"),
        "reported": {
            "search": search["sparsity"],
            "certificate": certificate["subject"]["sparsity"],
            "export": report["sparsity"],
        },
        "outside": [each["name"] for each in certificate["subject"]["weights"]["outside"]],
        "robust": certificate["robust"]["value"],
        "bytes": report["bytes"],
        "logits_apart": apart(run, arch),
    }


def told(*command: Any) -> tuple[dict[str, Any], int]:
    """Run a command with ``--json`` in this process; return its answer and exit code."""
    out, err = io.StringIO(), io.StringIO()
    texts = [*map(str, command), "--json"]
    before, sys.argv = sys.argv, ["s2ap-deploy", *texts]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exit_code = run_cli(texts)
    finally:
        sys.argv = before
    if exit_code not in (0, 1, 2, 3):
        print(err.getvalue(), file=sys.stderr)
    lines = out.getvalue().splitlines()
    return (json.loads(lines[-1]) if lines else {}), exit_code


def counted(path: Path) -> float:
    """Return zeros over all weights in the file, counted without the tool."""
    weights = [
        tensor
        for name, tensor in load_file(path).items()
        if tensor.dim() >= 2 and not name.startswith(("normalize.", "network.aux."))
    ]
    return sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)


def apart(run: Path, arch: str) -> float:
    """Return the largest difference of logits between the exported file and the saved network."""
    file, _, name = arch.rpartition(":")
    network = runpy.run_path(file)[name](10)
    for module in network.modules():
        for weight in list(getattr(module, "parametrizations", {})):
            torch.nn.utils.parametrize.remove_parametrizations(module, weight)
    saved = load_file(run / "finetune" / "model.safetensors")
    network.load_state_dict({key.removeprefix("network."): tensor for key, tensor in saved.items()})
    images = torch.rand(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()(images)
    session = onnxruntime.InferenceSession(run / "export" / "model.onnx")
    answers = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    return float((answers - expected).abs().max())
