"""``s2ap-deploy verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2ap_deploy.cli import options
from s2ap_deploy.cli.gate import show_checks
from s2ap_deploy.cli.terminal import echo

if TYPE_CHECKING:
    from s2ap_deploy.stages.certified_files import Verification

WORDS = {"pass": "CONFIRMED", "fail": "CONTRADICTED", "inconclusive": "INCONCLUSIVE"}


@click.command()
@click.argument("certificate", metavar="CERT", type=options.PATH)
@click.option("--run", type=options.PATH, help="The run folder.  [default: the one around CERT]")
@click.option(
    "--files",
    "files_only",
    is_flag=True,
    help="Check files alone: hashes, counts, intervals and the recipe. Runs no network; needs no torch.",
)
@click.option("--k", type=click.IntRange(min=0), help="Robust images to attack again.  [default: 10]")
@options.recipe_option(
    "seed", "seed", help="Seed of their choice and of the attacks.  [default: drawn, and printed]"
)
@click.option(
    "--in-toto",
    type=options.PATH,
    help="Write an in-toto statement there, to be signed, if everything is confirmed.",
)
@options.import_path_option
@options.compute_options
@options.workers_option
@options.data_options
@options.verbose_option
@options.output_options
def command(certificate: Path, in_toto: Path | None, as_json: bool, quiet: bool, **keywords: Any) -> int:
    """Check a certificate against its files and with new attacks.

    Every file that CERT names is hashed, every stored point is classified again, and the full attack runs on
    random images that are recorded as robust, with other random numbers. 0 confirmed, 1 contradicted, 3
    inconclusive. The run folder is only read.

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
        _show(found, in_toto)
    return found.exit_code


def _show(found: Verification, in_toto: Path | None) -> None:
    """Print every check with its result, then the overall result."""
    name = "files of the certificate" if found.scope == "files" else "certificate"
    show_checks(found.checks, name, found.status, WORDS)
    if in_toto is not None and found.status == "pass":
        echo(f"in-toto statement, not yet signed: {in_toto}")
    elif in_toto is not None:
        echo("no in-toto statement was written", err=True)
