"""A run's entry for the Adversarial Pruning Benchmark, from its recipe, certificate and security curve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ap_deploy import files
from s2ap_deploy.errors import UsageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.minimum_norm.ap_benchmark import ap_benchmark_entry, model_key
from s2ap_deploy.evaluation.minimum_norm.security_curve import SecurityCurve
from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.runs.folder import MODEL
from s2ap_deploy.spec import Normalization
from s2ap_deploy.stages.context import RunContext, read_classifier

_ARCHITECTURES = {"cifar-resnet18": "resnet18", "cifar-vgg16-bn": "vgg16"}
_STRUCTURES = {"weight": "US", "channel": "S"}
_CRITERIA = {"hydra": "LIS", "harp": "LIS", "magnitude": "LWM"}


@dataclass(frozen=True)
class Submission:
    """What only the submitter knows; ``method`` is written as ``HARP_Zhao2023Holistic``, ``paper`` a link."""

    method: str
    paper: str
    pretraining: str | None = None


def check_entry(job: RunContext, submission: Submission) -> None:
    """Raise UsageError, before any attack, for a run that the benchmark has no place for."""
    section = _section(job)
    _facts(job, section, _pruned(job), submission)
    if section.method not in _CRITERIA:
        raise UsageError(
            f"the benchmark has no criterion for {section.method}", hint=f"it has {', '.join(_CRITERIA)}"
        )
    if job.recipe.threat.norm != "Linf":
        raise UsageError(f"the benchmark attacks in Linf, not in {job.recipe.threat.norm}")


def write_entry(job: RunContext, submission: Submission, path: Path) -> dict[str, Any]:
    """Write the entry of a certified run, with its curve, to ``path``; returns it.

    Raises UsageError for what the benchmark has no place for and for an attack that was stopped early.
    """
    section, info = _section(job), _pruned(job)
    certificate = Certificate.load(job.run.output("certify", "pruned.json"))
    if not isinstance(certificate.robust, Share):
        raise UsageError(
            "the certificate holds an interval, and the benchmark a figure",
            hint="s2ap-deploy certify --full --overwrite --curve",
        )
    pretrain = job.recipe.pretrain if job.recipe.model.checkpoint is None else None
    entry = ap_benchmark_entry(
        **_facts(job, section, info, submission),
        clean=certificate.clean,
        autoattack=certificate.robust,
        autoattack_eps=certificate.threat.eps,
        curve=SecurityCurve.load(job.run.output("certify", "pruned-curve.json")),
        paper=submission.paper,
        pretraining=submission.pretraining
        or (_training(pretrain.objective.loss) if pretrain is not None else "not recorded"),
        finetuning=_training(section.finetune.objective.loss),
        criterion=_CRITERIA[section.method],
        locality="global" if section.layer_budget == "global" else "local",
        iterative=bool(section.steps),
        normalization=_normalization(info.normalization),
    )
    files.write_json(path, entry)
    return entry


def _section(job: RunContext) -> PruneSection:
    if job.recipe.prune is None:
        raise UsageError("an entry for the benchmark needs a pruned network", hint="s2ap-deploy prune first")
    return job.recipe.prune


def _pruned(job: RunContext) -> CheckpointInfo:
    return read_classifier(job.run.output("finetune", MODEL), job.machine)[1]


def _facts(
    job: RunContext, section: PruneSection, info: CheckpointInfo, submission: Submission
) -> dict[str, Any]:
    """What the entry's key is made of. Raises UsageError for a key that the benchmark does not know."""
    sparsity = section.sparsity if section.keep_ratio is None else 1 - section.keep_ratio
    facts: dict[str, Any] = {
        "method": submission.method,
        "arch": _ARCHITECTURES.get(info.arch, info.arch),
        "data": job.recipe.data.name,
        "structure": _STRUCTURES.get(section.granularity, section.granularity),
        "sparsity": sparsity if sparsity is not None else info.sparsity or 0.0,
    }
    model_key(submission.method, **{name: facts[name] for name in ("arch", "data", "structure", "sparsity")})
    return facts


def _training(loss: str) -> str:
    return "Adversarial Training (AT)" + ("" if loss == "at" else f" {loss.upper()}")


def _normalization(normalization: Normalization | None) -> str:
    if normalization is None:
        return "none"
    mean, std = (
        ", ".join(f"{value:g}" for value in values) for values in (normalization.mean, normalization.std)
    )
    return f"mean ({mean}), std ({std}), inside the model"
