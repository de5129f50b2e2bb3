"""Stop certification early: which thresholds decide, which stage is entered, and when to stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2ap_deploy import runtime
from s2ap_deploy.data.datasets import pixels_of
from s2ap_deploy.errors import RunFolderError, UsageError
from s2ap_deploy.evaluation import fmn
from s2ap_deploy.evaluation import samples as evaluated
from s2ap_deploy.evaluation.autoattack.cascade import Cascade
from s2ap_deploy.evaluation.autoattack.scheduler import AttackOutcome, default_block_size
from s2ap_deploy.evaluation.bounds.propagation import provably_robust
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.fmn import FMNConfig, Tuning
from s2ap_deploy.evaluation.points import as_levels
from s2ap_deploy.evaluation.samples import EarlyDecision, Proven
from s2ap_deploy.evaluation.security_curve import SecurityCurve, capped, security_curve
from s2ap_deploy.gating.early_stopping import answers, verdict_of
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.recipe.thresholds import Thresholds
from s2ap_deploy.recorder import Recorder
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.snapshot import Stage
from s2ap_deploy.spec import ThreatModel
from s2ap_deploy.stages.context import RunContext

INPUT = "decide"
"""The stage's input that holds the policy; a full run has none."""


def policy_of(recipe: Recipe) -> Thresholds | None:
    """Return the thresholds of the recipe's gate that attacks decide; None for a full run.

    Raises UsageError for a threshold that no number of samples can show.
    """
    return None if recipe.gate is None or recipe.certify.full else _decidable(recipe.gate)


def asked_policy(recipe: Recipe, asked: Mapping[str, Any]) -> Thresholds | None:
    """Return the thresholds that a command gives; None without any, so that the recipe's gate counts.

    Thresholds replace those of the recipe's gate, a ``rule`` alone is added to them. Raises UsageError.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if given.keys() == {"rule"}:
        policy = None
        if recipe.gate is not None:
            policy = _decidable(Thresholds.of({**recipe.gate.model_dump(), **given}))
        if policy is None:
            raise UsageError(
                "--gate needs a threshold",
                code="threshold-missing",
                hint="add --min-robust or --max-drop",
            )
        return policy
    return _decidable(Thresholds.of(given)) if given else None


def _decidable(policy: Thresholds) -> Thresholds | None:
    found = policy.decidable
    if found is not None:
        found.refuse_unprovable()
    return found


def enter(job: RunContext, inputs: Mapping[str, Any], policy: Thresholds | None) -> Stage:
    """Enter the certify stage for ``inputs``, and for ``policy`` where the run may stop early.

    The results of a full run serve every policy. Those of another policy, or of an interrupted full run, stay
    valid: with ``--resume`` the stage continues from them. Raises RunFolderError.
    """
    wanted = dict(inputs) if policy is None else {**inputs, INPUT: policy.model_dump(exclude_none=True)}
    record = job.run.manifest.stages.get("certify")
    if record is None or job.overwrite:
        return job.stage("certify", wanted)
    found = {key: value for key, value in record.inputs.items() if key != INPUT}
    alike = not manifest.differences(found, manifest.as_json(inputs))
    before = record.inputs.get(INPUT)
    if not alike or before == manifest.as_json(wanted).get(INPUT):
        return job.stage("certify", wanted)
    if before is None and record.status == "finished":
        return job.stage("certify", inputs)
    if not job.resume:
        raise RunFolderError(
            f"certify in {job.run.path} was for different thresholds: {_differing(record.inputs, wanted)}",
            code="stage-policy-changed",
            hint="add --resume to continue from its results, or --overwrite to start over",
        )
    job.run.reopen("certify", inputs=wanted)
    return job.stage("certify", wanted)


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return "; ".join(manifest.differences(found, manifest.as_json(wanted)))


class EarlyStopping:
    """Decides whether further attacks on two networks, or on one alone, can change the verdict."""

    def __init__(
        self,
        policy: Thresholds,
        labels: Sequence[int],
        pruned: tuple[Cascade, Proven | None],
        dense: Cascade | None,
    ) -> None:
        """``pruned`` is a cascade and its proofs; without ``dense`` it is compared with itself."""
        self._policy = policy
        self._labels = list(labels)
        self._pruned, self._proven = pruned
        self._dense = dense
        self.verdict: Literal["pass", "fail"] | None = None
        self.reasons: tuple[str, ...] = ()

    def decided(self) -> bool:
        """Return whether the verdict is decided by what is known now."""
        pruned = dataclasses.replace(
            self._pruned.progress, proven=None if self._proven is None else self._proven.count
        )
        dense = pruned if self._dense is None else self._dense.progress
        found = answers(self._policy, pruned, dense, self._labels)
        self.verdict = verdict_of(found)
        self.reasons = tuple(answer.message for answer in found if answer.status == self.verdict)
        return self.verdict is not None

    def decision(self, outcome: AttackOutcome) -> EarlyDecision | None:
        """Return the decision for the certificate of an unfinished attack; None for a finished one."""
        if self.verdict is None or outcome.complete:
            return None
        return EarlyDecision(
            decided=self.verdict,
            policy=self._policy.asked,
            rule=self._policy.rule,
            undecided=outcome.pending,
        )

    @property
    def message(self) -> str:
        """The decision and its reasons in a line."""
        unresolved = f"{_open(self._pruned):,} of {len(self._labels):,} images unresolved"
        if self._dense is not None:
            unresolved += f" ({_open(self._dense):,} for the dense network)"
        return f"decided early: {'; '.join([str(self.verdict), *self.reasons, unresolved])}"


def _open(cascade: Cascade) -> int:
    return cascade.progress.robust.count(None)


@dataclass(frozen=True, eq=False)
class Samples:
    """The test images for every network of a run: pixels [n, C, H, W], labels [n], ids."""

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]


def certificate_of(
    job: RunContext, samples: Samples, outcome: AttackOutcome, *, flags: Sequence[str] = (), **facts: Any
) -> Certificate:
    """Build the certificate of ``outcome``.

    ``flags`` are added to those of the outcome; ``facts`` are the remaining fields of :class:`Certificate`,
    and ``class_names``.
    """
    section, device = job.recipe.certify, job.machine.device
    if words := as_levels(samples.images, outcome.adversarial, job.recipe.threat):
        job.recorder.note(words)
    rows = evaluated.rows(
        samples.ids,
        samples.labels.tolist(),
        outcome.clean_prediction,
        outcome.adversarial_prediction,
        outcome.broken_by,
    )
    return Certificate.of(
        rows,
        protocol=outcome.protocol,
        threat=job.recipe.threat,
        data=job.images(None).spec.name,
        split="test",
        attacks=outcome.counts,
        flags=(*outcome.flags, *flags),
        attack_seed=section.attack_seed,
        sample_seed=section.sample_seed,
        block_size=default_block_size(samples.images, device),
        pixels=pixels_of(job.images(None).spec),
        **{"versions": runtime.versions(), "environment": runtime.environment(device), **facts},
    )


def prove(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    device: torch.device,
    recorder: Recorder,
) -> Proven:
    """Prove robustness by linear relaxation for images [n, C, H, W] and labels [n].

    Raises ArchitectureError for a network whose layers cannot be bounded.
    """
    done = 0

    def progress(now: int, total: int) -> None:
        nonlocal done
        recorder.advance(now - done)
        done = now

    recorder.begin("prove", len(images), "image")
    result = provably_robust(network, images, labels, threat=threat, device=device, progress=progress)
    recorder.end()
    return Proven.of(
        result.proven.nonzero().flatten().tolist(),
        len(images),
        method=result.method,
        tolerance=result.tolerance,
    )


def check_curve(threat: ThreatModel) -> None:
    """Raise UsageError for a norm in which there is no minimum-norm attack."""
    if threat.norm not in fmn.NORMS:
        raise UsageError(
            f"a security curve needs {' or '.join(fmn.NORMS)}, not {threat.norm}",
            code="curve-norm-unsupported",
            hint="leave --curve out",
        )


def trace_curve(
    job: RunContext,
    network: nn.Module,
    samples: Samples,
    broken_by: Sequence[str | None],
    path: Path,
    *,
    record: Path,
    deadline: float | None,
) -> SecurityCurve:
    """Write the security curve of a minimum-norm attack to ``path``.

    Samples that AutoAttack broke (``broken_by``) count as broken at eps: there the curve is the worst of both
    attacks. A killed attack continues from ``record``. Raises OutOfTimeError when ``deadline`` has passed.
    """
    threat, seed = job.recipe.threat, job.recipe.certify.attack_seed
    config = FMNConfig(
        norm="L2" if threat.norm == "L2" else "Linf", seed=seed, device=job.machine.device, record=record
    )
    tuning = tuned(job, network, samples.images, config) if job.recipe.certify.tune_curve else None
    if tuning is not None:
        config = dataclasses.replace(config, loss=tuning.loss, step=tuning.step)
    found = fmn.attack(
        network,
        samples.images,
        samples.labels,
        config,
        tuning=tuning,
        workers=job.machine.workforce,
        deadline=deadline,
        recorder=job.recorder,
    )
    distances = capped(found.distances.tolist(), [by is not None for by in broken_by], threat.radius)
    curve = security_curve(
        distances,
        norm=threat.norm,
        facts={
            "attack": "FMN" if tuning is None else f"FMN tuned to {tuning.loss}, step {tuning.step:g}",
            "seed": seed,
            "autoattack_eps": threat.eps,
            "flags": list(found.flags),
        },
    )
    curve.save(path)
    return curve


TUNING_IMAGES, TUNING_STEPS = 64, 100  # those of HO-FMN in the benchmark


def tuned(job: RunContext, network: nn.Module, like: Tensor, config: FMNConfig) -> Tuning:
    """Choose loss and step of the attack on validation images of the size of ``like``, [n, C, H, W].

    HO-FMN's Bayesian search has more settings; this grid costs eight short attacks.
    """
    channels, height, width = like.shape[1:]
    validation = job.images((channels, height, width)).validation
    images, labels = validation.subset(range(min(TUNING_IMAGES, len(validation)))).tensors()
    return fmn.tune(network, images, labels, dataclasses.replace(config, steps=TUNING_STEPS, record=None))
