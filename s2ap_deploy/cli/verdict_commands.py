"""Commands that judge and present results: gate, verify, compare and report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from s2ap_deploy.cli import options, terminal
from s2ap_deploy.cli.terminal import echo
from s2ap_deploy.errors import DeployError, UsageError
from s2ap_deploy.formatting import ABSENT, percent
from s2ap_deploy.recipe import keys

if TYPE_CHECKING:
    from s2ap_deploy.gating.check import Check, Verdict
    from s2ap_deploy.gating.early_stopping import SampleSize
    from s2ap_deploy.stages.certified_files import Verification

MOST_PLANNED = 10**7  # images; ImageNet has a seventh of them

report_options = options.stacked(
    click.option("--junit", type=options.PATH, help="Write JUnit XML to this file."),
    click.option("--sarif", type=options.PATH, help="Write SARIF 2.1.0 to this file."),
    click.option(
        "--summary",
        type=options.PATH,
        help="Write Markdown to this file.  [default: to $GITHUB_STEP_SUMMARY]",
    ),
    click.option(
        "--annotations/--no-annotations",
        default=None,
        help="Print GitHub annotations.  [default: if $GITHUB_ACTIONS is true]",
    ),
)


@click.command()
@options.recipe_options(keys.THRESHOLDS)
@click.option(
    "--baseline",
    type=options.PATH,
    help="Certificate that drops are measured against.  [default: the run's dense]",
)
@click.option(
    "--plan",
    type=click.IntRange(1, MOST_PLANNED, clamp=False),
    metavar="N",
    help="Only print the evidence that N samples can give.",
)
@click.option(
    "--require-signature", is_flag=True, help="Pass only a folder that the holder of --public-key signed."
)
@click.option("--public-key", type=options.PATH, help="Public key (PEM); implies --require-signature.")
@click.option("--output", type=options.PATH, help="Write the verdict as JSON there as well.")
@report_options
@options.run_option
@options.json_option
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def gate_command(
    run: Path,
    baseline: Path | None,
    plan: int | None,
    require_signature: bool,
    public_key: Path | None,
    output: Path | None,
    junit: Path | None,
    sarif: Path | None,
    summary: Path | None,
    annotations: bool | None,
    as_json: bool,
    quiet: bool,
    **thresholds: Any,
) -> int:
    """Judge the run against thresholds; the exit code is the verdict.

    Exit codes: 0 passed, 1 failed, 3 inconclusive (no certificate, too few samples, a reliability flag, or a
    file in the run folder that no certificate covers). Without thresholds, those of the run's recipe apply.
    The verdict is not kept in a folder that cannot be written. Hashes show that a folder is consistent, not
    where it came from: --require-signature does.

    \b
    s2ap-deploy gate --min-robust 0.40 --max-drop 0.05
    s2ap-deploy gate --min-robust 0.40 --require-device board --max-latency-ms 5
    s2ap-deploy gate --min-robust 0.40 --require-signature --public-key key.pub --output verdict.json
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli.session import command_line

    if plan is not None:
        return _print_sample_size(plan, thresholds["min_robust"], as_json=as_json, quiet=quiet)
    if annotations is None:
        annotations = os.environ.get("GITHUB_ACTIONS") == "true" and not quiet
    if require_signature and public_key is None:
        raise UsageError(
            "--require-signature needs the public key",
            code="public-key-missing",
            hint="add --public-key FILE; s2ap-deploy sign --help says how to sign",
        )
    reports = _Reports(run, junit, sarif, summary, annotations, to_stderr=as_json, verdict=output)
    reports.refuse_bad_places()
    try:
        verdict = api.gate(
            run, baseline=baseline, public_key=public_key, thresholds=thresholds, command=command_line()
        )
    except DeployError as error:
        with contextlib.suppress(DeployError):  # report the first error
            reports.write(_unjudged(error))
        raise
    reports.write(verdict)
    if as_json:
        _print_verdict(verdict)
    elif not quiet:
        show_checks(verdict.checks, "gate", verdict.status, terminal.WORDS)
        _print_hint(verdict)
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
    verdict: Path | None = None

    def refuse_bad_places(self) -> None:
        """Raise UsageError for a place that cannot take a report or that holds evidence."""
        given = (self.junit, self.sarif, self.summary, self.verdict)
        places = [path for path in given if path is not None]
        run = self.folder.resolve()
        for place in places:
            inside = place.resolve().is_relative_to(run) and not place.resolve().is_relative_to(run / "gate")
            # A link or a device would be replaced by a file, not written to.
            special = place.is_symlink() or (place.exists() and not place.is_file())
            if inside or special or place.resolve() == run / "gate" / "verdict.json":
                raise UsageError(
                    f"a report cannot be written to {place}",
                    code="report-place-invalid",
                    hint="name a file outside the run folder",
                )
            if place.resolve().parent != run / "gate" and not place.parent.is_dir():
                raise UsageError(
                    f"there is no folder {place.parent} for {place.name}",
                    code="folder-missing",
                    hint="create it first",
                )
        if len({place.resolve() for place in places}) < len(places):
            raise UsageError("two reports cannot be written to one file", code="reports-share-file")

    def write(self, verdict: Verdict) -> None:
        """Write the reports. Raises StorageError."""
        from s2ap_deploy import files

        if self.verdict is not None:
            files.write_json(self.verdict, verdict.model_dump(mode="json"))
        if self.junit is not None:
            from s2ap_deploy.reporting.ci_formats import junit

            files.write_text(self.junit, junit(verdict))
        if self.sarif is not None:
            from s2ap_deploy.reporting.ci_formats import sarif

            files.write_text(self.sarif, sarif(verdict, self.folder))
        step = os.environ.get("GITHUB_STEP_SUMMARY")
        if self.summary is not None or step:
            from s2ap_deploy.reporting.ci_formats import summary

            text = summary(verdict, self.folder.resolve().name)
            if self.summary is not None:
                files.write_text(self.summary, text)
            elif step:
                _append(Path(step), text)
        if self.annotations:
            from s2ap_deploy.reporting.ci_formats import workflow_commands

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
    """Print every check, then the overall result. Does not use rich, whose import would double the time."""
    for check in checks:
        terminal.echo(f"{terminal.styled(check.status)} {check.message}")
    terminal.echo(f"{name}: {terminal.styled(status, words[status])}")


def _print_hint(verdict: Verdict) -> None:
    if any(check.reason == "too-few-samples" for check in verdict.checks):
        terminal.echo(
            "  hint: s2ap-deploy gate --plan N says what N images can show; certify --n N --overwrite",
            err=True,
        )


def _print_verdict(value: Verdict | SampleSize) -> None:
    """Print one object on one line of ASCII, which every stream can write."""
    click.echo(json.dumps(value.model_dump(mode="json")))


def _print_sample_size(n: int, threshold: float | None, *, as_json: bool, quiet: bool) -> int:
    from s2ap_deploy.gating.early_stopping import SampleSize

    planned = SampleSize.of(n, threshold)
    if as_json:
        _print_verdict(planned)
    elif not quiet:
        terminal.echo(str(planned))
    return 0


VERIFICATION_WORDS = {"pass": "CONFIRMED", "fail": "CONTRADICTED", "inconclusive": "INCONCLUSIVE"}


@click.command()
@click.argument("certificate", metavar="CERT", type=options.PATH)
@click.option("--run", type=options.PATH, help="The run folder.  [default: the one around CERT]")
@click.option(
    "--files",
    "files_only",
    is_flag=True,
    help="Check only files: hashes, counts, intervals and the recipe. Runs no network; needs no torch.",
)
@click.option("--k", type=click.IntRange(min=0), help="Robust images to attack again.  [default: 10]")
@options.recipe_option(
    "seed", "seed", help="Seed for choosing them and for the attacks.  [default: random, and printed]"
)
@click.option(
    "--in-toto",
    type=options.PATH,
    help="Write an unsigned in-toto statement to this file if everything is confirmed.",
)
@options.import_path_option
@options.compute_options
@options.workers_option
@options.data_options
@options.verbose_option
@options.output_options
def verify_command(
    certificate: Path, in_toto: Path | None, as_json: bool, quiet: bool, **keywords: Any
) -> int:
    """Check a certificate against its files and with new attacks.

    Every file that CERT names is hashed, every stored point is classified again, and the full attack is
    repeated with new random numbers on a sample of the images that are recorded as robust. Exit codes: 0
    confirmed, 1 contradicted, 3 inconclusive. The run folder is only read.

    \b
    s2ap-deploy verify s2ap-run/certify/pruned.json
    s2ap-deploy verify s2ap-run/certify/pruned.json --files
    s2ap-deploy verify s2ap-run/certify/pruned.json --k 50 --in-toto statement.json
    s2ap-deploy verify s2ap-run/artifact/certificate.json
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session

    with session.reporting(quiet or keywords["files_only"]) as reporting:
        found = api.verify(certificate, in_toto=in_toto, **keywords, **reporting)
    if as_json:
        click.echo(found.model_dump_json())
    elif not quiet:
        _show_verification(found, in_toto)
    return found.exit_code


def _show_verification(found: Verification, in_toto: Path | None) -> None:
    """Print every check with its result, then the overall result."""
    name = "files of the certificate" if found.scope == "files" else "certificate"
    show_checks(found.checks, name, found.status, VERIFICATION_WORDS)
    if in_toto is not None and found.status == "pass":
        echo(f"in-toto statement, not yet signed: {in_toto}")
    elif in_toto is not None:
        echo("no in-toto statement was written", err=True)


@click.command()
@click.argument("run", metavar="[RUN]", type=options.PATH, default=Path("s2ap-run"))
@click.option("--private-key", type=options.PATH, required=True, help="Elliptic-curve key (PEM).")
@click.option(
    "--password-env", metavar="NAME", help="Environment variable with the password of the key, if it has one."
)
@options.json_option
def sign_command(run: Path, private_key: Path, password_env: str | None, as_json: bool) -> None:
    """Sign every file of a run folder with a private key.

    RUN is the run folder, s2ap-run unless given. Its signature, signature.json, is a Sigstore bundle of
    OpenSSF's model-signing, which the extra signing installs; nothing is fetched. Whatever changes, adds or
    removes a file afterwards invalidates it. gate --require-signature checks it.

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub
    s2ap-deploy sign s2ap-run --private-key key.pem
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session

    password = os.environ.get(password_env) if password_env is not None else None
    if password_env is not None and password is None:
        raise UsageError(
            f"${password_env} is not set", code="password-missing", hint=f"export {password_env}"
        )
    path = api.sign(run, private_key=private_key, password=password)
    if as_json:
        session.print_json({"run": str(run), "signature": str(path)})
    else:
        click.echo(str(path))


@click.command()
@click.argument("run", metavar="[RUN]", type=options.PATH, default=options.RUN)
@click.option(
    "--file",
    type=options.PATH,
    help="Exported file, or folder of C sources or of a runtime.  [default: the run's only file]",
)
@click.option(
    "--output", type=options.PATH, default=Path("bundle.pyz"), help="The bundle.  [default: bundle.pyz]"
)
@click.option(
    "--images", type=options.PATH, help="Image folder of the certificate: packs image files as well."
)
@click.option("--most-images", type=options.COUNT, default=100, help="The most to pack.  [default: 100]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that exists.")
@options.json_option
def bundle_command(run: Path, as_json: bool, **keywords: Any) -> None:
    """Write one file that judges an exported file on a device.

    RUN is the run folder, s2ap-run unless given. The bundle holds the file, the clean and attacked points of
    its certificate, the expected answers, and a program that needs Python 3.8, NumPy and the file's runtime;
    for C sources, a C compiler or the built library instead of a runtime. On the device it judges every
    point, measures latency and memory, and writes device.json; with --images it also compares the pixels that
    the device makes of image files. Equal runs give equal bytes.

    \b
    s2ap-deploy bundle s2ap-run
    s2ap-deploy bundle s2ap-run --file export-c/c --output bundle-c.pyz
    python bundle.pyz --name board
    """
    from s2ap_deploy import api, files
    from s2ap_deploy.cli import session

    path = api.bundle(run, **keywords)
    if as_json:
        session.print_json({"run": str(run), "bundle": str(path), "sha256": files.sha256(path)})
    else:
        terminal.echo(f"{path}: {path.stat().st_size:,} bytes; on the device: python {path.name} --name NAME")


@click.command()
@click.argument("run", metavar="RUN", type=options.PATH)
@click.argument("record", metavar="RECORD", type=options.PATH)
@click.option("--name", help="Name of the device in the run.  [default: the one in RECORD]")
@click.option("--overwrite", is_flag=True, help="Replace the record of a device of that name.")
@options.json_option
def collect_command(run: Path, record: Path, name: str | None, overwrite: bool, as_json: bool) -> None:
    """Bind what a bundle measured on a device to the run.

    RECORD is the device.json that python bundle.pyz wrote; it must be of the certificate and the file of the
    run folder RUN. Its answers are compared with the certificate's again; gate --require-device judges them.

    \b
    s2ap-deploy collect s2ap-run device.json
    s2ap-deploy collect s2ap-run device.json --name board-2
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session

    device = api.collect(run, record, name=name, overwrite=overwrite, command=session.command_line())
    if as_json:
        session.print_json(device.model_dump(mode="json"))
        return
    for check in filter(None, (device.check(required=True), device.camera(required=True))):
        terminal.echo(f"{terminal.styled(check.status)} {check.message}")
    measured = device.record
    terminal.echo(
        f"one image: p50 {measured.p50_ms:g} ms, p95 {measured.p95_ms:g} ms; threads {measured.threads}"
    )


@click.command()
@click.argument("runs", metavar="RUN RUN [RUN]...", type=options.PATH, nargs=-1, required=True)
@options.json_option
def compare_command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Compare the masks of two or more runs.

    Each RUN is a run folder, and is only read. For every pair: the Hamming distance (fraction of mask bits
    that differ), the fraction of kept weights replaced, and the intersection over union; --json adds every
    layer.

    \b
    s2ap-deploy compare with-s2ap without-s2ap
    s2ap-deploy compare seed-0 seed-1 seed-2 --json
    """
    from s2ap_deploy import api

    found = api.compare(runs)
    if as_json:
        click.echo(json.dumps(found, sort_keys=True))
    else:
        show_comparison(found)


def show_comparison(found: Mapping[str, Any]) -> None:
    """Print one table of the runs and one of their pairs."""
    from rich.text import Text

    from s2ap_deploy.cli import tables

    out = tables.console()
    for number, run in enumerate(found["runs"], 1):
        out.print(Text(f"{number}  {run['run']}"))
    out.print(runs_table(found["runs"]))
    out.print(pairs_table(found["pairs"]))
    out.print(Text(found["note"], style="dim"))


def runs_table(runs: list[dict[str, Any]]) -> Any:
    """Return a table with a row per run."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Without lines between columns, all of it fits a terminal of 80.
    table = Table(
        title="runs", collapse_padding=True, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("")
    table.add_column("method", overflow="fold")
    for title in (
        "seed",
        "sparsity",
        "clean,\nmasked",
        "robust,\nmasked",
        "flip\nrate",
        "clean,\ntuned",
        "robust,\ntuned",
    ):
        table.add_column(title, justify="right", overflow="fold")
    for number, run in enumerate(runs, 1):
        searched, tuned = run["search"], run["finetune"] or {}
        table.add_row(
            str(number),
            Text(method(run)),
            Text(ABSENT if run["seed"] is None else str(run["seed"])),
            percent(run["sparsity"], 2),
            percent(searched["clean_accuracy"], 1),
            percent(searched["robust_accuracy"], 1),
            percent(searched["flip_rate"], 2),
            percent(tuned.get("clean_accuracy"), 1),
            percent(tuned.get("robust_accuracy"), 1),
        )
    return table


def pairs_table(pairs: list[dict[str, Any]]) -> Any:
    """Return a table with a row per pair, and their mean where there are several."""
    from rich import box
    from rich.table import Table

    keys = ("hamming", "by_chance", "replaced", "iou")
    table = Table(title="masks, pair by pair", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("runs")
    for title in ("Hamming", "by chance", "kept replaced", "IoU"):
        table.add_column(title, justify="right")
    for pair in pairs:
        hamming, chance, replaced, iou = (pair[key] for key in keys)
        table.add_row(
            f"{pair['first']}, {pair['second']}",
            percent(hamming, 2),
            percent(chance, 2),
            percent(replaced, 1),
            f"{iou:.3f}",
        )
    if len(pairs) > 1:
        hamming, chance, replaced, iou = (sum(pair[key] for pair in pairs) / len(pairs) for key in keys)
        table.add_section()
        table.add_row("mean", percent(hamming, 2), percent(chance, 2), percent(replaced, 1), f"{iou:.3f}")
    return table


def method(run: Mapping[str, Any]) -> str:
    """Return the method, such as ``hydra + S2AP``."""
    return f"{run['method'] or ABSENT}{' + S2AP' if run['s2ap'] else ''}"


@click.command()
@click.argument("run", metavar="[RUN]", type=options.PATH, default=Path("s2ap-run"))
@click.option(
    "--output",
    type=options.PATH,
    help="Folder for both files.  [default: report in the run folder]",
)
@click.option(
    "--images",
    type=click.IntRange(0, 200),
    default=12,
    show_default=True,
    help="Largest number of attacked images to show.",
)
@options.json_option
def report_command(run: Path, output: Path | None, images: int, as_json: bool) -> None:
    """Write the results of a run as an HTML page and a model card.

    RUN is the run folder, by default s2ap-run; it may be unfinished: missing parts are listed. The page
    is one file, without JavaScript, in light and dark colors.

    \b
    s2ap-deploy report
    s2ap-deploy report s2ap-run --output public
    s2ap-deploy report s2ap-run --images 24 --json
    """
    from s2ap_deploy import api
    from s2ap_deploy.cli import session

    written = api.report(run, output=output, images=images)
    pages = {path.name: path for path in (written.page, written.card)}
    if as_json:
        session.print_json(
            {
                "run": str(run),
                "files": {
                    name: {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                    for name, path in pages.items()
                },
                "status": written.status,
                "missing": dict(written.missing),
                "problems": list(written.problems),
            }
        )
        return
    for path in pages.values():
        click.echo(str(path))
    for words in (*written.problems, *written.missing.values()):
        click.echo(f"note: {words}", err=True)
