"""``s2ap-deploy gate``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from s2ap_deploy.cli import options, terminal
from s2ap_deploy.errors import DeployError, UsageError
from s2ap_deploy.recipe import keys

if TYPE_CHECKING:
    from s2ap_deploy.gating.check import Check, Verdict
    from s2ap_deploy.gating.sample_size import SampleSize

report_options = options.stacked(
    click.option("--junit", type=options.PATH, help="Write JUnit XML there."),
    click.option("--sarif", type=options.PATH, help="Write SARIF 2.1.0 there."),
    click.option(
        "--summary", type=options.PATH, help="Write Markdown there.  [default: to $GITHUB_STEP_SUMMARY]"
    ),
    click.option(
        "--annotations/--no-annotations",
        default=None,
        help="Print GitHub annotations.  [default: where $GITHUB_ACTIONS is true]",
    ),
)


@click.command()
@options.recipe_options(keys.THRESHOLDS)
@click.option(
    "--baseline",
    type=options.PATH,
    help="Certificate that drops are measured against.  [default: the run's dense]",
)
@click.option("--plan", type=options.COUNT, help="Only print what that many samples can show.")
@report_options
@options.run_option
@options.json_option
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(
    run: Path,
    baseline: Path | None,
    plan: int | None,
    junit: Path | None,
    sarif: Path | None,
    summary: Path | None,
    annotations: bool | None,
    as_json: bool,
    quiet: bool,
    **thresholds: Any,
) -> int:
    """Judge the run against thresholds; the exit code is the verdict.

    0 passed, 1 failed, 3 inconclusive: no certificate, too few samples, a reliability flag, or a file in
    the run folder that no certificate covers. Without thresholds, those of the run's recipe apply.

    \b
    s2ap-deploy gate --min-robust 0.40 --max-drop 0.05
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli.session import command_line

    if plan is not None:
        return _plan(plan, thresholds["min_robust"], as_json=as_json, quiet=quiet)
    if annotations is None:
        annotations = os.environ.get("GITHUB_ACTIONS") == "true" and not quiet
    reports = _Reports(run, junit, sarif, summary, annotations, to_stderr=as_json)
    reports.refuse_bad_places()
    try:
        verdict = api.gate(run, baseline=baseline, thresholds=thresholds, command=command_line())
    except DeployError as error:
        with contextlib.suppress(DeployError):  # report the first error
            reports.write(_unjudged(error))
        raise
    reports.write(verdict)
    if as_json:
        _print_json(verdict)
    elif not quiet:
        show_checks(verdict.checks, "gate", verdict.status, terminal.WORDS)
        _hint(verdict)
    return verdict.exit_code


def _unjudged(error: DeployError) -> Verdict:
    """Return an error in the form of a verdict, so that the reports contain it."""
    from s2ap_deploy.gating.check import Check, Verdict

    message = error.message + (f" ({error.hint})" if error.hint else "")
    check = Check(rule="gate", name="gate", status="inconclusive", message=message, reason=error.code)
    return Verdict(status="inconclusive", exit_code=error.exit_code, checks=(check,))


class _Reports(NamedTuple):
    """Files and annotations that a verdict is written to."""

    folder: Path
    junit: Path | None
    sarif: Path | None
    summary: Path | None
    annotations: bool
    to_stderr: bool

    def refuse_bad_places(self) -> None:
        """Raise UsageError for a place that cannot take a report or that holds evidence."""
        places = [path for path in (self.junit, self.sarif, self.summary) if path is not None]
        run = self.folder.resolve()
        for place in places:
            inside = place.resolve().is_relative_to(run) and not place.resolve().is_relative_to(run / "gate")
            # A link or a device would be replaced by a file, not written to.
            special = place.is_symlink() or (place.exists() and not place.is_file())
            if inside or special or place.name == "verdict.json":
                raise UsageError(
                    f"{place} cannot take a report",
                    code="report-place-invalid",
                    hint="name a file outside the run folder",
                )
            if place.resolve().parent != run / "gate" and not place.parent.is_dir():
                raise UsageError(
                    f"there is no folder {place.parent} for {place.name}",
                    code="folder-missing",
                    hint="make it first",
                )
        if len({place.resolve() for place in places}) < len(places):
            raise UsageError("two reports cannot share one file", code="reports-share-file")

    def write(self, verdict: Verdict) -> None:
        """Write the reports. Raises StorageError."""
        from s2ap_deploy import files

        if self.junit is not None:
            from s2ap_deploy.reporting.junit import junit

            files.write_text(self.junit, junit(verdict))
        if self.sarif is not None:
            from s2ap_deploy.reporting.sarif import sarif

            files.write_text(self.sarif, sarif(verdict, self.folder))
        step = os.environ.get("GITHUB_STEP_SUMMARY")
        if self.summary is not None or step:
            from s2ap_deploy.reporting.github import summary

            text = summary(verdict, self.folder.resolve().name)
            if self.summary is not None:
                files.write_text(self.summary, text)
            elif step:
                _append(Path(step), text)
        if self.annotations:
            from s2ap_deploy.reporting.github import workflow_commands

            for line in workflow_commands(verdict):
                terminal.echo(line, err=self.to_stderr)


def _append(path: Path, text: str) -> None:
    """Append to GitHub's summary file; a failure is a warning and does not change the verdict."""
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        click.echo(f"warning: no summary for GitHub: {error}", err=True)


def show_checks(checks: Iterable[Check], name: str, status: str, words: Mapping[str, str]) -> None:
    """Print every check, then the overall result. Without rich, whose import would double the time."""
    for check in checks:
        terminal.echo(f"{terminal.styled(check.status)} {check.message}")
    terminal.echo(f"{name}: {terminal.styled(status, words[status])}")


def _hint(verdict: Verdict) -> None:
    if any(check.reason == "too-few-samples" for check in verdict.checks):
        terminal.echo(
            "  hint: s2ap-deploy gate --plan N says what N images can show; certify --n N --overwrite",
            err=True,
        )


def _print_json(value: Verdict | SampleSize) -> None:
    """Print one object on one line of ASCII, which every stream can write."""
    click.echo(json.dumps(value.model_dump(mode="json")))


def _plan(n: int, threshold: float | None, *, as_json: bool, quiet: bool) -> int:
    from s2ap_deploy.gating.sample_size import SampleSize

    planned = SampleSize.of(n, threshold)
    if as_json:
        _print_json(planned)
    elif not quiet:
        terminal.echo(str(planned))
    return 0
