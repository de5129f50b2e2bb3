"""Small networks of one odd feature each, through prune, certify, export and gate, float and int8.

    python -m benchmarks zoo --shared ../shared --work work/zoo [--only vit,conv1d]

Each is pruned to 90 % by weight and to half of its channels. A row ends with the verdict, or with the stage
and the code of a refusal; ``sparsity`` is counted from the saved file, over every tensor of two or more
dimensions but the auxiliary head that no forward pass uses.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.lib import arguments, commands, results

ASKED = {"weight": ("--sparsity", "0.9"), "channel": ("--granularity", "channel", "--keep-ratio", "0.5")}
SHORT = ("--search-epochs", 1, "--finetune-epochs", 1, "--warmup-epochs", 0, "--loss", "at", "--threads", 1)


def main() -> None:
    parser = arguments.parser(__doc__, "zoo", "shared", "work")
    parser.add_argument("--only", default="", help="names of networks, separated by commas")
    args = parser.parse_args()
    code = args.shared.resolve() / "cases" / "zoo.py"
    args.work.mkdir(parents=True, exist_ok=True)
    if not any(args.work.glob("zoo_*.pt")):
        subprocess.run([sys.executable, str(code)], cwd=args.work, check=True, stdout=subprocess.DEVNULL)
        for path in code.parent.glob("zoo_*.pt"):  # where the script writes beside itself
            path.rename(args.work / path.name)
    names = sorted(path.stem.removeprefix("zoo_") for path in args.work.glob("zoo_*.pt"))
    chosen = [name for name in names if not args.only or name in args.only.split(",")]
    rows = [row(args.work, code, name, unit) for name in chosen for unit in ASKED]
    results.write(args.name, {"networks": len(chosen), "rows": rows})


def row(work: Path, code: Path, name: str, unit: str) -> dict[str, Any]:
    """Return what became of one network: figures of every stage that ran."""
    run, arch = work / f"{name}-{unit}", f"{code}:{name}"
    here = ("--run", run, "--arch", arch)
    given = (work / f"zoo_{name}.pt", "--data", "digits", "--eps", "0.05", *ASKED[unit], *SHORT)
    found: dict[str, Any] = {"network": name, "unit": unit}
    steps: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("prune", ("prune", *given, *here)),
        ("certify", ("certify", "--n", 50, "--workers", 1, "--threads", 1, *here)),
        ("export", ("export", "--onnx", *here)),
        ("gate", ("gate", "--min-clean", 0, "--rule", "point", "--run", run)),
    )
    for stage, command in steps:
        answer, exit_code = told(*command)
        if exit_code not in (0, 1, 3) or (stage != "gate" and exit_code):
            return {**found, "ends": stage, "exit": exit_code, "code": answer.get("code")}
        if stage == "export":
            agreement = answer.get("agreement") or {}
            found |= {
                "max_logit_difference": agreement.get("max_logit_difference"),
                "bytes": answer.get("bytes"),
            }
    certificate = commands.read(run / "certify" / "pruned.json")
    found |= {
        "sparsity": counted(run / "finetune" / "model.safetensors"),
        "certified_sparsity": certificate["subject"]["sparsity"],
        "robust": certificate["robust"]["value"],
    }
    int8, exit_code = told("export", "--int8", "--overwrite", "--output", work / f"{name}-{unit}.onnx", *here)
    return {**found, "ends": "gate", "verdict": answer.get("status"), "int8": exit_code or int8.get("bytes")}


def told(*command: Any) -> tuple[dict[str, Any], int]:
    """Run a command with ``--json``; return its answer and exit code."""
    done = subprocess.run(commands.deploy(*command, "--json"), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return (json.loads(lines[-1]) if lines else {}), done.returncode


def counted(path: Path) -> float:
    """Return zeros over all weights in the file, counted without the tool."""
    weights = [
        tensor for name, tensor in load_file(path).items() if tensor.dim() >= 2 and "normalize" not in name
    ]
    return sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)
