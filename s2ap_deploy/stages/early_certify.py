"""Certify only until the gate's verdict is decided: which policy, which stage, and when to stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from s2ap_deploy.errors import RunFolderError, UsageError
from s2ap_deploy.evaluation.autoattack.cascade import Cascade
from s2ap_deploy.evaluation.autoattack.outcome import AttackOutcome
from s2ap_deploy.evaluation.interval import EarlyDecision
from s2ap_deploy.evaluation.samples import Proven
from s2ap_deploy.gating.early_stopping import EarlyPolicy, answers, verdict_of
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.stage import Stage
from s2ap_deploy.stages.context import RunContext

INPUT = "decide"
"""The stage's input that holds the policy; a full run has none."""


def policy_of(recipe: Recipe) -> EarlyPolicy | None:
    """What the recipe's gate decides early; None for a full run. Raises UsageError for an impossible gate."""
    if recipe.gate is None or recipe.certify.full:
        return None
    return EarlyPolicy.of(recipe.gate.model_dump())


def asked_policy(recipe: Recipe, asked: Mapping[str, Any]) -> EarlyPolicy | None:
    """What a command line asks to decide; None where it asks nothing, so that the recipe's own gate counts.

    Thresholds replace those of the recipe's gate, a ``rule`` alone joins them. Raises UsageError.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if given.keys() == {"rule"}:
        stated = {} if recipe.gate is None else recipe.gate.model_dump()
        given = {**stated, **given}
        if EarlyPolicy.of(given) is None:
            raise UsageError("--gate alone has nothing to judge", hint="add --min-robust or --max-drop")
    return EarlyPolicy.of(given)


def enter(job: RunContext, inputs: Mapping[str, Any], policy: EarlyPolicy | None) -> Stage:
    """The certify stage for ``inputs``, and for ``policy`` where the run may stop early.

    What a full run found serves every policy. What was attacked under another policy, or in a full run that
    was interrupted, stays true: with ``--resume`` the stage goes on from there. Raises RunFolderError.
    """
    wanted = dict(inputs) if policy is None else {**inputs, INPUT: policy.model_dump(exclude_none=True)}
    record = job.run.manifest.stages.get("certify")
    if record is None or job.overwrite:
        return job.stage("certify", wanted)
    found = {key: value for key, value in record.inputs.items() if key != INPUT}
    alike = manifest.digest(found) == manifest.digest(manifest.as_json(inputs))
    before = record.inputs.get(INPUT)
    if not alike or before == manifest.as_json(wanted).get(INPUT):
        return job.stage("certify", wanted)
    if before is None and record.status == "finished":
        return job.stage("certify", inputs)
    if not job.resume:
        raise RunFolderError(
            f"certify in {job.run.path} was for another policy: {_differing(record.inputs, wanted)}",
            hint="add --resume to go on from what it attacked, or --overwrite to start again",
        )
    job.run.reopen("certify", inputs=wanted)
    return job.stage("certify", wanted)


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return "; ".join(manifest.differences(found, manifest.as_json(wanted)))


class Question:
    """Whether the verdict on two networks, or on one alone, is decided by now."""

    def __init__(
        self,
        policy: EarlyPolicy,
        labels: Sequence[int],
        pruned: tuple[Cascade, Proven | None],
        dense: Cascade | None,
    ) -> None:
        """``dense`` None: the network ``pruned`` is alone, and is its own measure."""
        self._policy = policy
        self._labels = list(labels)
        self._pruned, self._proven = pruned
        self._dense = dense
        self.verdict: Literal["pass", "fail"] | None = None
        self.reasons: tuple[str, ...] = ()

    def decided(self) -> bool:
        """Ask with what is known now."""
        pruned = dataclasses.replace(
            self._pruned.progress, proven=None if self._proven is None else self._proven.count
        )
        dense = pruned if self._dense is None else self._dense.progress
        found = answers(self._policy, pruned, dense, self._labels)
        self.verdict = verdict_of(found)
        self.reasons = tuple(answer.words for answer in found if answer.status == self.verdict)
        return self.verdict is not None

    def decision(self, outcome: AttackOutcome) -> EarlyDecision | None:
        """The block of a certificate whose attack was left unfinished; None for a finished one."""
        if self.verdict is None or outcome.complete:
            return None
        return EarlyDecision(
            decided=self.verdict,
            policy=self._policy.asked,
            rule=self._policy.rule,
            undecided=outcome.pending,
        )

    @property
    def words(self) -> str:
        """The decision and its reasons in a line, for a person."""
        unresolved = f"{_open(self._pruned):,} of {len(self._labels):,} images unresolved"
        if self._dense is not None:
            unresolved += f" ({_open(self._dense):,} for the dense network)"
        return f"decided early: {'; '.join([str(self.verdict), *self.reasons, unresolved])}"


def _open(cascade: Cascade) -> int:
    return cascade.progress.standing.count(None)
