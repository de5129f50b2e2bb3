"""``s2ap-deploy gate``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from s2ap_deploy.cli import options, signs
from s2ap_deploy.errors import DeployError, UsageError

if TYPE_CHECKING:
    from s2ap_deploy.gating.policy import GatePolicy, Verdict
    from s2ap_deploy.gating.sample_size import Plan

SIGNS = {"pass": ("✓", "green"), "fail": ("✗", "red"), "inconclusive": ("?", "yellow")}
WORDS = {"pass": "PASSED", "fail": "FAILED", "inconclusive": "INCONCLUSIVE"}

_path = click.Path(path_type=Path)

threshold_options = options.stacked(
    click.option("--min-robust", type=float, help="Least robust accuracy, as a fraction: 0.40."),
    click.option("--max-drop", type=float, help="Most robust accuracy that pruning may cost, as a fraction."),
    click.option("--max-class-drop", type=float, help="The same for the class that loses most."),
    click.option("--min-clean", type=float, help="Least clean accuracy, as a fraction."),
    click.option("--min-proven", type=float, help="Least provably robust accuracy, as a fraction."),
    click.option("--min-sparsity", type=float, help="Least share of zeros in the exported file."),
    click.option("--max-bytes", type=options.COUNT, help="Largest size of the exported file."),
    click.option("--max-latency-ms", type=float, help="Longest time of the exported file for one image."),
    click.option("--max-latency-ratio", type=float, help="The same as a multiple of the dense file's time."),
    click.option("--max-age", help="Oldest certificate to rely on: 36h, 30d or 2w."),
    click.option(
        "--rule",
        type=click.Choice(["lower", "point"]),
        help="Judge the one-sided 95 % bound, or the observed figure alone.  [default: lower]",
    ),
)

report_options = options.stacked(
    click.option("--junit", type=_path, help="Write JUnit XML there."),
    click.option("--sarif", type=_path, help="Write SARIF 2.1.0 there."),
    click.option("--summary", type=_path, help="Write Markdown there.  [default: to $GITHUB_STEP_SUMMARY]"),
    click.option(
        "--annotations/--no-annotations",
        default=None,
        help="Print GitHub annotations.  [default: where $GITHUB_ACTIONS is true]",
    ),
)


@click.command()
@threshold_options
@click.option(
    "--baseline", type=_path, help="Certificate to measure drops against.  [default: the run's dense]"
)
@click.option("--plan", type=options.COUNT, help="Judge nothing: say what that many samples can show.")
@report_options
@options.run_option
@options.json_option
@click.option("--quiet", "-q", is_flag=True, help="Print nothing: the exit code is the answer.")
def command(
    folder: Path,
    baseline: Path | None,
    plan: int | None,
    junit: Path | None,
    sarif: Path | None,
    summary: Path | None,
    annotations: bool | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> int:
    """Judge the run against thresholds; the exit code is the verdict.

    0 passed, 1 failed, 3 inconclusive: no certificate, too few samples, a reliability flag, or a file in
    the run folder that nothing covers. Without thresholds, those of the run's recipe apply.

    \b
    s2ap-deploy gate --min-robust 0.40 --max-drop 0.05
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if plan is not None:
        return _plan(plan, given.get("min_robust"), as_json=as_json, quiet=quiet)
    if annotations is None:
        annotations = os.environ.get("GITHUB_ACTIONS") == "true" and not quiet
    reports = _Reports(folder, junit, sarif, summary, annotations, to_stderr=as_json)
    reports.refuse_bad_places()
    try:
        verdict = _verdict(folder, baseline, given)
    except DeployError as error:
        with contextlib.suppress(DeployError):  # the first error is the one to tell
            reports.write(_unjudged(error))
        raise
    reports.write(verdict)
    if as_json:
        _say_json(verdict)
    elif not quiet:
        _show(verdict)
    return verdict.exit_code


def _verdict(folder: Path, baseline: Path | None, given: dict[str, Any]) -> Verdict:
    import shlex

    from s2ap_deploy.runs.folder import Run
    from s2ap_deploy.stages.gate import gate

    with Run.open(folder, create=False, command=shlex.join(["s2ap-deploy", *sys.argv[1:]])) as run:
        stated: dict[str, Any] = {}
        if not given.keys() - {"rule", "max_age"}:
            recipe = run.load_recipe()
            stated = recipe.gate.model_dump() if recipe is not None and recipe.gate is not None else {}
        return gate(run, _policy({**stated, **given}), baseline=baseline)


def _policy(values: dict[str, Any]) -> GatePolicy:
    from s2ap_deploy.gating.policy import AGE, GatePolicy

    age = values.get("max_age")
    if age is not None and not re.fullmatch(AGE, age):
        raise UsageError(f"--max-age {age!r} is no age", hint="hours, days or weeks: 36h, 30d, 2w")
    return GatePolicy.model_validate(values)


def _unjudged(error: DeployError) -> Verdict:
    """An error in the form of a verdict, so that CI sees more than an exit code."""
    from s2ap_deploy.gating.check import Check
    from s2ap_deploy.gating.policy import Verdict

    words = error.message + (f" ({error.hint})" if error.hint else "")
    check = Check(name="gate", status="inconclusive", words=words)
    return Verdict(status="inconclusive", exit_code=error.exit_code, checks=(check,))


class _Reports(NamedTuple):
    """Where the verdict goes besides the terminal."""

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
                    f"{place} is no place for a report", hint="name a file outside the run folder"
                )
            if place.resolve().parent != run / "gate" and not place.parent.is_dir():
                raise UsageError(f"there is no folder {place.parent} for {place.name}", hint="make it first")
        if len({place.resolve() for place in places}) < len(places):
            raise UsageError("two reports cannot share one file")

    def write(self, verdict: Verdict) -> None:
        """Write what was asked for. Raises StorageError."""
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
                _say(line, err=self.to_stderr)


def _append(path: Path, text: str) -> None:
    """Add to the file that GitHub gave; the verdict does not depend on whether GitHub's disk takes it."""
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        click.echo(f"warning: no summary for GitHub: {error}", err=True)


def _show(verdict: Verdict) -> None:
    """Every check with its answer, then the answer of all; without rich, which would double the time."""
    for check in verdict.checks:
        sign, color = SIGNS[check.status]
        _say(f"{click.style(sign, fg=color)} {check.words}")
    _, color = SIGNS[verdict.status]
    _say(f"gate: {click.style(WORDS[verdict.status], fg=color, bold=True)}")
    if any("too few samples" in check.words for check in verdict.checks if check.status == "inconclusive"):
        _say(
            "  hint: s2ap-deploy gate --plan N says what N images can show; certify --n N --overwrite",
            err=True,
        )


def _say(text: str, *, err: bool = False) -> None:
    """Print, with a stand-in for what the terminal cannot write: an exit code must not hang on it."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None)
    click.echo(signs.writable(text, encoding), err=err)


def _say_json(value: Verdict | Plan) -> None:
    """One object in one line of ASCII, which every stream can write."""
    click.echo(json.dumps(value.model_dump(mode="json")))


def _plan(n: int, threshold: float | None, *, as_json: bool, quiet: bool) -> int:
    from s2ap_deploy.gating.sample_size import Plan

    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise UsageError(f"--min-robust {threshold:g} is not a fraction between 0 and 1")
    planned = Plan.of(n, threshold)
    if as_json:
        _say_json(planned)
    elif not quiet:
        _say(str(planned))
    return 0
