"""Entries for the Adversarial Pruning Benchmark (Piras et al., arXiv 2409.01249), from a certified run.

Its evaluation: AutoAttack at Linf 0.031 on 10,000 test images, and HO-FMN on 128 with robust = distance above
8/255. An entry lists in ``deviations`` where its values come from anything else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.evaluation.security_curve import SecurityCurve
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.runs.folder import MODEL
from s2ap_deploy.spec import Normalization, parse_eps
from s2ap_deploy.stages.context import RunContext, read_classifier

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
_STRUCTURE_NAMES = {"US": "Unstructured (US)", "S": "Structured (S) channels"}
_AUTOATTACK_N, _CURVE_N = 10_000, 128
_ARCHITECTURES = {"cifar-resnet18": "resnet18", "cifar-vgg16-bn": "vgg16"}
_STRUCTURES = {"weight": "US", "channel": "S"}
_TAXONOMY: Final = {  # criterion and locality, as the benchmark files each method
    "hydra": ("LIS", "local"),
    "harp": ("LIS", "global"),
    "magnitude": ("LWM", "local"),
    "pwoa": ("SOLWM", "local"),
}
_NAME = re.compile(
    r"(?P<method>[A-Za-z0-9+]+_[^\W\d_]+\d{4}[^\W_]+)_(?P<arch>R18|V16)_(?P<data>CIFAR10|SVHN)"
    r"_(?P<structure>US|S)_(?P<rate>\d\d)"
)


@dataclass(frozen=True)
class BenchmarkModel:
    """The parts of a model's key.

    ``method`` is the part up to the first word of the paper's title, such as ``HARP_Zhao2023Holistic``;
    ``sparsity`` is the share of zeros.
    """

    method: str
    arch: str
    data: str
    structure: str
    sparsity: float

    @classmethod
    def of_file(cls, name: str) -> BenchmarkModel | None:
        """Return the model that a published file's name is the key of, with any suffix; None for another."""
        found = _NAME.match(name)
        if found is None or name[found.end() : found.end() + 1] not in ("", ".", "_"):
            return None
        arch, data = (
            {written: known for known, written in table.items()}[found[part]]
            for part, table in (("arch", ARCHITECTURES), ("data", DATASETS))
        )
        return cls(found["method"], arch, data, found["structure"], int(found["rate"]) / 100)

    @property
    def key(self) -> str:
        """``METHOD_FirstauthorYEARFirstword_R18_CIFAR10_US_90``. Raises UsageError for an unknown model."""
        if not _METHOD.fullmatch(self.method):
            raise UsageError(
                f"{self.method!r} is not a method of the benchmark",
                code="benchmark-method-invalid",
                hint="write it like HARP_Zhao2023Holistic",
            )
        known: tuple[tuple[str, Collection[str], str], ...] = (
            (self.arch, ARCHITECTURES, "architecture"),
            (self.data, DATASETS, "data set"),
            (self.structure, RATES, "structure"),
        )
        for value, names, what in known:
            if value not in names:
                raise UsageError(
                    f"the benchmark has no {what} {value!r}",
                    code="benchmark-model-unknown",
                    hint=f"it has {', '.join(names)}",
                )
        rates = RATES[self.structure]
        rate = next((each for each in rates if math.isclose(each / 100, self.sparsity, abs_tol=5e-4)), None)
        if rate is None:
            raise UsageError(
                f"the benchmark has no sparsity {self.sparsity:g} for {self.structure}",
                code="benchmark-model-unknown",
                hint=f"it has {', '.join(map(str, rates))}%",
            )
        arch, data = ARCHITECTURES[self.arch], DATASETS[self.data]
        return f"{self.method}_{arch}_{data}_{self.structure}_{rate}"


@dataclass(frozen=True)
class Taxonomy:
    """The method behind the model, in the benchmark's terms; ``paper`` is a link."""

    paper: str
    pretraining: str
    finetuning: str
    criterion: str = "LIS"
    locality: str = "local"
    iterative: bool = False
    normalization: str = "none"


def ap_benchmark_entry(
    model: BenchmarkModel,
    taxonomy: Taxonomy,
    *,
    clean: Share,
    autoattack: Share,
    autoattack_eps: str,
    curve: SecurityCurve,
) -> dict[str, Any]:
    """Build one model's part of a submission as JSON values; an entry takes three of them.

    ``clean`` and ``autoattack`` are a certificate's shares, ``curve`` the Linf curve of the same model. The
    field names carry the benchmark's own colons and spaces, for a method that prunes after training.
    Accuracies are percentages with two decimals, and a distance that was not found is null. Raises UsageError
    for what the benchmark does not know.
    """
    if taxonomy.criterion not in CRITERIA or taxonomy.locality not in LOCALITIES:
        raise UsageError(
            f"the benchmark has no criterion {taxonomy.criterion!r} with locality {taxonomy.locality!r}",
            code="benchmark-taxonomy-unknown",
            hint=f"criteria: {', '.join(CRITERIA)}; localities: {', '.join(LOCALITIES)}",
        )
    if curve.norm != "Linf":
        raise UsageError(
            f"the benchmark's distances are in Linf, not in {curve.norm}", code="benchmark-norm-unsupported"
        )
    return {
        "key": model.key,
        "taxonomy": {
            "link_to_paper": taxonomy.paper,
            "ap_key": model.method,
            "Type of Pipeline:": "A-Methods Pruning After Training",
            "A: Pretraining ": taxonomy.pretraining,
            "A: Finetuning": taxonomy.finetuning,
            "A: OneShot (1S) vs Iterative (IT)": "IT" if taxonomy.iterative else "1S",
            "Pruning structure": _STRUCTURE_NAMES[model.structure],
            "Pruning locality": LOCALITIES[taxonomy.locality],
            "Pruning criterion": CRITERIA[taxonomy.criterion],
        },
        "clean_accuracy": _percent(clean.value),
        "robust_accuracy_autoattack": _percent(autoattack.value),
        "robust_accuracy_fmn": _percent(curve.at(CURVE_RADIUS)),
        "distances": [None if math.isinf(each) else each for each in curve.distances],
        "normalization": taxonomy.normalization,
        "deviations": _deviations(clean, autoattack, autoattack_eps, curve),
    }


def _deviations(clean: Share, autoattack: Share, eps: str, curve: SecurityCurve) -> list[str]:
    """List the differences from the benchmark's own evaluation."""
    try:
        stated = parse_eps(eps)
    except ValueError as error:
        raise UsageError(f"AutoAttack's eps {error}", code="eps-invalid") from None
    attack = curve.facts.get("attack", "FMN")
    found = [f"{attack} of s2ap-deploy instead of HO-FMN", "distance null where nothing was found, not 0"]
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


@dataclass(frozen=True)
class Submission:
    """Facts from the submitter; ``method`` is written as ``HARP_Zhao2023Holistic``, ``paper`` a link."""

    method: str
    paper: str
    pretraining: str | None = None


def check_entry(job: RunContext, submission: Submission) -> None:
    """Raise UsageError, before any attack, for a run that the benchmark does not take."""
    section = _section(job)
    _ = _model(job, section, _pruned(job), submission).key
    if section.method not in _TAXONOMY:
        raise UsageError(
            f"the benchmark has no criterion for {section.method}",
            code="benchmark-taxonomy-unknown",
            hint=f"it has {', '.join(_TAXONOMY)}",
        )
    if job.recipe.threat.norm != "Linf":
        raise UsageError(
            f"the benchmark attacks in Linf, not in {job.recipe.threat.norm}",
            code="benchmark-norm-unsupported",
        )


def write_entry(job: RunContext, submission: Submission, path: Path) -> dict[str, Any]:
    """Write the entry of a certified run, with its curve, to ``path``; returns it.

    Raises UsageError for a model that the benchmark does not take and for an attack that was stopped early.
    """
    section, info = _section(job), _pruned(job)
    certificate = Certificate.load(job.run.output("certify", "pruned.json"))
    if not isinstance(certificate.robust, Share):
        raise UsageError(
            "the certificate has an interval, but the benchmark needs a figure",
            code="benchmark-interval",
            hint="s2ap-deploy certify --full --overwrite --curve",
        )
    pretrain = job.recipe.pretrain if job.recipe.model.checkpoint is None else None
    recorded = _training(pretrain.objective.loss) if pretrain is not None else "not recorded"
    taxonomy = Taxonomy(
        paper=submission.paper,
        pretraining=submission.pretraining or recorded,
        finetuning=_training(section.finetune.objective.loss),
        criterion=_TAXONOMY[section.method][0],
        locality="global" if section.layer_budget == "global" else _TAXONOMY[section.method][1],
        iterative=bool(section.steps),
        normalization=_normalization(info.normalization),
    )
    entry = ap_benchmark_entry(
        _model(job, section, info, submission),
        taxonomy,
        clean=certificate.clean,
        autoattack=certificate.robust,
        autoattack_eps=certificate.threat.eps,
        curve=SecurityCurve.load(job.run.output("certify", "pruned-curve.json")),
    )
    files.write_json(path, entry)
    return entry


def _section(job: RunContext) -> PruneSection:
    if job.recipe.prune is None:
        raise UsageError(
            "an entry for the benchmark needs a pruned network",
            code="pruned-network-missing",
            hint="s2ap-deploy prune first",
        )
    return job.recipe.prune


def _pruned(job: RunContext) -> CheckpointInfo:
    return read_classifier(job.run.output("finetune", MODEL), job.machine)[1]


def _model(
    job: RunContext, section: PruneSection, info: CheckpointInfo, submission: Submission
) -> BenchmarkModel:
    sparsity = section.sparsity if section.keep_ratio is None else 1 - section.keep_ratio
    return BenchmarkModel(
        method=submission.method,
        arch=_ARCHITECTURES.get(info.arch, info.arch),
        data=job.recipe.data.name,
        structure=_STRUCTURES.get(section.granularity, section.granularity),
        sparsity=sparsity if sparsity is not None else info.sparsity or 0.0,
    )


def _training(loss: str) -> str:
    return "Adversarial Training (AT)" + ("" if loss == "at" else f" {loss.upper()}")


def _normalization(normalization: Normalization | None) -> str:
    if normalization is None:
        return "none"
    mean, std = (
        ", ".join(f"{value:g}" for value in values) for values in (normalization.mean, normalization.std)
    )
    return f"mean ({mean}), std ({std}), inside the model"
