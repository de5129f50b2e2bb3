"""An entry for the Adversarial Pruning Benchmark (Piras et al., arXiv 2409.01249). No torch.

Its evaluation: AutoAttack at Linf 0.031 on 10,000 test images, and HO-FMN on 128 with robust = distance
above 8/255. An entry says in ``deviations`` where its figures come from anything else.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, Final

from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.minimum_norm.security_curve import SecurityCurve
from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.spec import parse_eps

ARCHITECTURES: Final = {"resnet18": "R18", "vgg16": "V16"}
DATASETS: Final = {"cifar10": "CIFAR10", "svhn": "SVHN"}
RATES: Final = {"US": (90, 95, 99), "S": (50, 75, 90)}
CRITERIA: Final = {
    "LWM": "Lowest Weight Magnitude LWM",
    "SOLWM": "Solver Based LWM (SOLWM)",
    "RELWM": "Sparsity Based LWM (SPALWM)",  # RELWM in its tables
    "LIS": "Least Importance Score (LIS)",
    "HGM": "Highest Gradient Magnitude (HGM)",
    "BCS": "Bayesian Connectivity Sampling (BCS)",
}
LOCALITIES: Final = {"global": "Global Pruning (G)", "local": "Local Pruning (L)"}
CURVE_RADIUS: Final = 8 / 255
AUTOATTACK_EPS: Final = "0.031"

_METHOD = re.compile(r"[A-Za-z0-9]+_[^\W\d_]+\d{4}[^\W_]+")
_STRUCTURES = {"US": "Unstructured (US)", "S": "Structured (S) channels"}
_AUTOATTACK_N, _CURVE_N = 10_000, 128


def model_key(method: str, *, arch: str, data: str, structure: str, sparsity: float) -> str:
    """``METHOD_FirstauthorYEARFirstword_R18_CIFAR10_US_90``; raises UsageError for what has no place there.

    ``method`` is the part up to the first word of the paper's title, ``sparsity`` the share of zeros.
    """
    if not _METHOD.fullmatch(method):
        raise UsageError(
            f"{method!r} names no method of the benchmark", hint="write it like HARP_Zhao2023Holistic"
        )
    for value, known, what in ((arch, ARCHITECTURES, "architecture"), (data, DATASETS, "data set")):
        if value not in known:
            raise UsageError(f"the benchmark has no {what} {value!r}", hint=f"it has {', '.join(known)}")
    if structure not in RATES:
        raise UsageError(f"the benchmark has no structure {structure!r}", hint="it has US and S")
    rate = next((each for each in RATES[structure] if math.isclose(each / 100, sparsity, abs_tol=5e-4)), None)
    if rate is None:
        rates = ", ".join(map(str, RATES[structure]))
        raise UsageError(
            f"the benchmark has no sparsity {sparsity:g} for {structure}", hint=f"it has {rates} %"
        )
    return f"{method}_{ARCHITECTURES[arch]}_{DATASETS[data]}_{structure}_{rate}"


def ap_benchmark_entry(
    *,
    method: str,
    arch: str,
    data: str,
    structure: str,
    sparsity: float,
    clean: Share,
    autoattack: Share,
    autoattack_eps: str,
    curve: SecurityCurve,
    paper: str,
    pretraining: str,
    finetuning: str,
    criterion: str = "LIS",
    locality: str = "local",
    iterative: bool = False,
    normalization: str = "none",
) -> dict[str, Any]:
    """One model's part of a submission, as JSON values; an entry for the benchmark takes three of them.

    ``clean`` and ``autoattack`` are a certificate's shares, ``curve`` the Linf curve of the same model;
    ``paper`` is a link. The taxonomy's field names carry the benchmark's own colons and spaces, for a
    method that prunes after training. Accuracies are percentages with two decimals, and a distance that
    was not found is null. Raises UsageError for what the benchmark does not know.
    """
    key = model_key(method, arch=arch, data=data, structure=structure, sparsity=sparsity)
    if criterion not in CRITERIA or locality not in LOCALITIES:
        raise UsageError(
            f"the benchmark knows no criterion {criterion!r} with locality {locality!r}",
            hint=f"criteria: {', '.join(CRITERIA)}; localities: {', '.join(LOCALITIES)}",
        )
    if curve.norm != "Linf":
        raise UsageError(f"the benchmark's distances are in Linf, not in {curve.norm}")
    taxonomy = {
        "link_to_paper": paper,
        "ap_key": method,
        "Type of Pipeline:": "A-Methods Pruning After Training",
        "A: Pretraining ": pretraining,
        "A: Finetuning": finetuning,
        "A: OneShot (1S) vs Iterative (IT)": "IT" if iterative else "1S",
        "Pruning structure": _STRUCTURES[structure],
        "Pruning locality": LOCALITIES[locality],
        "Pruning criterion": CRITERIA[criterion],
    }
    return {
        "key": key,
        "taxonomy": taxonomy,
        "clean_accuracy": _percent(clean.value),
        "robust_accuracy_autoattack": _percent(autoattack.value),
        "robust_accuracy_fmn": _percent(curve.at(CURVE_RADIUS)),
        "distances": [None if math.isinf(each) else each for each in curve.distances],
        "normalization": normalization,
        "deviations": _deviations(clean, autoattack, autoattack_eps, curve),
    }


def _deviations(clean: Share, autoattack: Share, eps: str, curve: SecurityCurve) -> list[str]:
    """What a reader must know before comparing these figures with the leaderboard's."""
    try:
        stated = parse_eps(eps)
    except ValueError as error:
        raise UsageError(f"AutoAttack's eps {error}") from None
    found = ["FMN of s2ap-deploy instead of HO-FMN", "distance null where nothing was found, not 0"]
    if Fraction(stated) != Fraction(AUTOATTACK_EPS):
        found.append(f"AutoAttack at eps {stated} instead of {AUTOATTACK_EPS}")
    if autoattack.n != _AUTOATTACK_N:
        found.append(f"AutoAttack on {autoattack.n:,} images instead of {_AUTOATTACK_N:,}")
    if clean.n != _AUTOATTACK_N:
        found.append(f"clean accuracy on {clean.n:,} images instead of {_AUTOATTACK_N:,}")
    if "autoattack_eps" in curve.facts:
        found.append("distance at most AutoAttack's eps where AutoAttack broke the image")
    if curve.n != _CURVE_N:
        found.append(f"FMN on {curve.n:,} images instead of {_CURVE_N}")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
