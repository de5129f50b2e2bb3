"""``export --bench``: the exported file measured beside its dense twin, and the report that says so."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from s2ap_deploy.onnx_export.benchmark.bench import bench_beside
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.runs.stage import Stage
from s2ap_deploy.stages.context import RunContext


def measured(
    job: RunContext,
    stage: Stage,
    report: ExportReport,
    onnx_file: Path,
    report_file: Path,
    classifier: nn.Module,
    size: tuple[int, int, int],
) -> ExportReport:
    """Measure the file of the finished export ``stage``; keep what was found in its report, and return that.

    The file stays as it is, so that whatever certifies it still does. Measured anew each time that it is
    asked for: the machine may be another, or busier. Raises VerificationError when a model does not run.
    """
    performance = bench_beside(
        classifier,
        onnx_file,
        size,
        opset=report.opset,
        batch=report.batch,
        int8=report.quantization is not None,
        recorder=job.recorder,
    )
    report = report.model_copy(update={"performance": performance})
    outputs = [job.run.path / each.path for each in job.run.manifest.stages[stage.name].outputs]
    report.save(report_file)
    stage.finish(outputs, stage.results)
    return report
