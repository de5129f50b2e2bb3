"""Compare the provable lower bound on robust accuracy of the shared checkpoint with its published one.

    python -m benchmarks provable --shared ../shared

Wong & Kolter 2018 (arXiv 1711.00851) publish a bound of 5.8 % on the robust error at Linf 0.1. One thread;
``--n`` takes the first images of the test set only.
"""

import time

import torch

from benchmarks.lib import arguments, results
from s2ap_deploy import runtime
from s2ap_deploy.data import datasets
from s2ap_deploy.evaluation.bounds.propagation import provably_robust
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.spec import ThreatModel

PUBLISHED_ERROR_BOUND = 0.058


def main() -> None:
    parser = arguments.parser(__doc__, "mnist-provable", "shared")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--eps", default="0.1")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = runtime.device(args.device)
    images, labels = (t[: args.n] for t in datasets.load("mnist", root=args.shared / "data").test.tensors())
    classifier, _, _ = checkpoint.load(args.shared / "checkpoints/mnist_convex_eps0.1.pth")
    with torch.no_grad():
        clean = torch.cat([classifier(batch).argmax(1) for batch in images.split(500)]) == labels
    wall, cpu = time.perf_counter(), time.process_time()
    found = provably_robust(classifier, images, labels, threat=ThreatModel(eps=args.eps), device=device)
    figures = {
        "n": len(labels),
        "norm": "Linf",
        "eps": args.eps,
        "clean_correct": int(clean.sum()),
        "proven": int(found.proven.sum()),
        "proven_share": found.share,
        "proven_of_first_200": int(found.proven[:200].sum()),
        "published_proven_share": 1 - PUBLISHED_ERROR_BOUND,
        "at_least_published": found.share >= 1 - PUBLISHED_ERROR_BOUND,
        "method": found.method,
        "largest_rounding_allowance": found.tolerance,
        "environment": runtime.environment(device),
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }
    print(figures)
    results.write(args.name if args.n == 10_000 else f"{args.name}-{args.n}", figures)
