"""``s2ap-deploy report``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from s2ap_deploy.cli import options


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
    help="The most attacked images to show.",
)
@options.json_option
def command(run: Path, output: Path | None, images: int, as_json: bool) -> None:
    """Write the results of a run as an HTML page and a model card.

    RUN is the run folder, s2ap-run unless given; it may be unfinished: missing parts are listed. The page
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
