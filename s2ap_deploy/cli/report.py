"""``s2ap-deploy report``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2ap_deploy.cli import options

if TYPE_CHECKING:
    from s2ap_deploy.reporting.run_facts import Facts

PAGE, CARD = "report.html", "model-card.md"


@click.command()
@click.argument("run", metavar="[RUN]", type=click.Path(path_type=Path), default=Path("s2ap-run"))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
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
    """Write what a run shows as an HTML page and a model card.

    RUN is the run folder, s2ap-run unless given; it may be unfinished: what is missing is said. The page is
    one file, without JavaScript, and follows light and dark.

    \b
    s2ap-deploy report
    s2ap-deploy report s2ap-run --output public
    s2ap-deploy report s2ap-run --images 24 --json
    """
    from s2ap_deploy import files
    from s2ap_deploy.errors import StorageError
    from s2ap_deploy.reporting.report import card, page
    from s2ap_deploy.reporting.run_facts import collect

    facts = collect(run, images=images)
    folder = output if output is not None else run / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create {folder}: {error.strerror}", hint="name another --output"
        ) from error
    texts = {PAGE: page.render(facts), CARD: card.render(facts)}
    for name, text in texts.items():
        files.write_text(folder / name, text)
    if as_json:
        click.echo(json.dumps(answer(facts, run, folder, texts), sort_keys=True))
    else:
        for name in texts:
            click.echo(str(folder / name))
        for words in (*facts.problems, *facts.missing.values()):
            click.echo(f"note: {words}", err=True)


def answer(facts: Facts, run: Path, folder: Path, texts: dict[str, str]) -> dict[str, Any]:
    """What was written, and what the report could not show."""
    return {
        "run": str(run),
        "files": {
            name: {"path": str(folder / name), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in texts.items()
        },
        "status": facts.verdict.status if facts.verdict is not None else None,
        "missing": dict(facts.missing),
        "problems": list(facts.problems),
    }
