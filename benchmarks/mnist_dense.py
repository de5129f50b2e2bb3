"""AutoAttack on the dense shared checkpoint: does the interval hold the published PGD error of 4.1 %?

python benchmarks/mnist_dense.py --shared ../shared --work work
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import result

PUBLISHED_PGD_ERROR = 0.041


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=500)
    args = parser.parse_args()

    run = args.work / f"mnist-dense-{args.n}"
    command = [sys.executable, "-m", "s2ap_deploy", "certify"]
    command += [str(args.shared / "checkpoints/mnist_convex_eps0.1.pth"), "--data", "mnist", "--eps", "0.1"]
    command += [
        "--data-root",
        str(args.shared / "data"),
        "--n",
        str(args.n),
        "--first",
        "--run",
        str(run),
        "--resume",
    ]
    subprocess.run(command, check=True)
    certificate = json.loads((run / "certify/dense.json").read_text())
    robust = certificate["robust"]
    error = [1 - bound for bound in reversed(robust["interval"])]
    result.write(
        "mnist-dense",
        {
            "n": args.n,
            "clean": certificate["clean"],
            "robust": robust,
            "robust_error": 1 - robust["value"],
            "robust_error_interval": error,
            "published_pgd_error": PUBLISHED_PGD_ERROR,
            "interval_holds_published": error[0] <= PUBLISHED_PGD_ERROR <= error[1],
            "attacks": certificate["attacks"],
            "flags": certificate["flags"],
            "seconds": certificate["seconds"],
        },
    )


if __name__ == "__main__":
    main()
