"""Run every stage that a recipe asks for, in order."""

from __future__ import annotations

from pathlib import Path

from s2ap_deploy.gating.check import Verdict
from s2ap_deploy.onnx_export.onnx_file import load
from s2ap_deploy.stages.certify import certify
from s2ap_deploy.stages.certify_file import certify_file
from s2ap_deploy.stages.context import RunContext, on_first_rank
from s2ap_deploy.stages.export import export
from s2ap_deploy.stages.gate import gate
from s2ap_deploy.stages.pretrain import dense
from s2ap_deploy.stages.prune import prune


def whole(
    job: RunContext, *, time_budget: float | None = None, dense_record: Path | None = None
) -> Verdict | None:
    """Run all stages, from the dense network to the verdict; certify the exported file if needed.

    ``dense_record`` is the record of an attack on the same dense network, see ``certify``. Returns None for a
    recipe without a gate. Raises the errors of the stages.
    """
    dense(job)
    if job.recipe.prune is not None:
        prune(job)
    return deliver(job, time_budget, dense_record)


@on_first_rank
def deliver(job: RunContext, time_budget: float | None, dense_record: Path | None) -> Verdict | None:
    """Certify, export and judge the trained network; see :func:`whole`."""
    certify(job, time_budget=time_budget, dense_record=dense_record)
    report = export(job)
    if not job.recipe.export.covered_by_certificate:
        certify_file(job, load(job.run.output(report.folder, report.file)), time_budget=time_budget)
    job.remember()
    if job.recipe.gate is None:
        return None
    return gate(job.run, job.recipe.gate)
