"""Every base method with and without S2AP on the shared MNIST checkpoint, at equal data, epochs and attack.

    python benchmarks/mnist_methods.py --shared ../shared --work work
    python benchmarks/mnist_methods.py --shared ../shared --work work --tested 0 --seeds 0 \\
        --sparsity 0.99 0.9 --configs hydra-erk harp --gamma 0.0003 0.0005 0.001 0.003 0.01 0.03 \\
        --name mnist-gamma
"""

from __future__ import annotations

import method_table

from s2ap_deploy.spec import ThreatModel


def main() -> None:
    args = method_table.options(__doc__, images=6_000, tested=10_000).parse_args()
    base = method_table.Base(
        checkpoint=args.shared / "checkpoints/mnist_convex_eps0.1.pth",
        data="mnist",
        root=args.shared / "data",
        threat=ThreatModel(norm="Linf", eps="0.1"),
        step_size=0.01,
        by_class=False,
    )
    method_table.write_table(args, base, "mnist-methods")


if __name__ == "__main__":
    main()
