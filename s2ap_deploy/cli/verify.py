"""``s2ap-deploy verify``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from s2ap_deploy.cli import options
from s2ap_deploy.cli.gate import SIGNS, _say
from s2ap_deploy.errors import UsageError

if TYPE_CHECKING:
    from s2ap_deploy.stages.certified_files import Verification
    from s2ap_deploy.stages.execution import ExecutionConfig

WORDS = {"pass": "CONFIRMED", "fail": "CONTRADICTED", "inconclusive": "INCONCLUSIVE"}


@click.command()
@click.argument("certificate", metavar="CERT", type=click.Path(path_type=Path))
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="The run folder.  [default: the one around CERT]",
)
@click.option(
    "--files",
    "files_only",
    is_flag=True,
    help="Check files alone: hashes, counts, intervals and the recipe. Runs no network; needs no torch.",
)
@click.option(
    "--k",
    type=click.IntRange(min=0),
    help="Images recorded as robust to attack anew.  [default: 10]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Seed of their choice and of the attacks.  [default: drawn, and told]",
)
@click.option(
    "--in-toto",
    "in_toto",
    type=click.Path(path_type=Path),
    help="Write an in-toto statement there, to be signed, if all is confirmed.",
)
@click.option("--arch", help="The import path again, for a network that was built by one.")
@options.compute_options
@options.workers_option
@options.data_options
@options.verbose_option
@options.output_options
def command(
    certificate: Path,
    folder: Path | None,
    files_only: bool,
    k: int | None,
    seed: int | None,
    in_toto: Path | None,
    arch: str | None,
    device: str,
    threads: int | None,
    workers: int | None,
    data_root: Path | None,
    download: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Hold a certificate against its files and against new attacks.

    Every file that CERT names is hashed, every stored point is judged again, and the full attack runs on
    random images that are recorded as robust, with other random numbers. 0 confirmed, 1 contradicted, 3
    inconclusive. The run folder is only read.

    \b
    s2ap-deploy verify s2ap-run/certify/pruned.json
    s2ap-deploy verify s2ap-run/certify/pruned.json --files
    s2ap-deploy verify s2ap-run/certify/pruned.json --k 50 --in-toto statement.json
    s2ap-deploy verify s2ap-run/artifact/certificate.json
    """
    if files_only:
        if (k, seed, in_toto) != (None, None, None):
            raise UsageError(
                "--files attacks nothing, so --k, --seed and --in-toto do not go with it",
                code="verify-files-excludes-attacks",
            )
        return _check_files(certificate, folder, as_json=as_json, quiet=quiet)

    import secrets

    import torch

    from s2ap_deploy import runtime
    from s2ap_deploy.cli import session
    from s2ap_deploy.cli.progress import recorder
    from s2ap_deploy.stages.certified_files import run_folder
    from s2ap_deploy.stages.execution import ExecutionConfig, remembered_data_root
    from s2ap_deploy.stages.verify import verify

    session.only_import_path(arch, "the certificate")
    session.check_output(in_toto, (".json",), overwrite=True)
    if threads is not None:
        torch.set_num_threads(threads)
    place = run_folder(certificate, folder)
    if in_toto is not None and in_toto.resolve().is_relative_to(place.resolve()):
        raise UsageError(f"{in_toto} is no place for a statement", hint="name a file outside the run folder")
    given = data_root.expanduser().resolve() if data_root is not None else None
    machine = ExecutionConfig(
        device=runtime.device(device),
        data_root=given or remembered_data_root(place),
        download=download,
        workers=workers,
        arch=session.import_path(arch),
    )
    # Whoever made the certificate must not know which images will be drawn.
    seed = secrets.randbelow(2**31) if seed is None else seed
    k = 10 if k is None else k
    with recorder(quiet) as progress:
        if options.told("verbose", False) and not quiet:
            for line in _opening(place, seed, machine):
                progress.note(line)
        found = verify(certificate, place, k=k, seed=seed, machine=machine, recorder=progress)
    if in_toto is not None and found.status == "pass":
        _write_statement(in_toto, certificate, found)
    if as_json:
        click.echo(found.model_dump_json())
    elif not quiet:
        _show(found, in_toto)
    if options.told("verbose", False) and not quiet:
        for line in _closing(found):
            click.echo(line, err=True)
    return found.exit_code


def _check_files(certificate: Path, folder: Path | None, *, as_json: bool, quiet: bool) -> int:
    from s2ap_deploy.stages.certified_files import verify_files

    found = verify_files(certificate, folder)
    if as_json:
        click.echo(found.model_dump_json())
    elif not quiet:
        _show(found, None)
    return found.exit_code


def _opening(place: Path, seed: int, machine: ExecutionConfig) -> Iterator[str]:
    """What is worked with: the folder, the machine, versions, and the seed that was drawn."""
    import torch

    from s2ap_deploy import runtime

    yield (
        f"debug: run folder {place}; device {machine.device}, {torch.get_num_threads()} threads, "
        f"workers {machine.workers or 'one per core'}, data root {machine.data_root or 'default'}; "
        f"seed {seed}"
    )
    yield "debug: " + ", ".join(f"{name} {version}" for name, version in runtime.versions().items())


def _closing(found: Verification) -> Iterator[str]:
    """The hashes of the certificate and of the files that it speaks for."""
    yield f"debug: certificate: SHA-256 {found.certificate_sha256}; {found.attacked} images attacked anew"
    for subject in found.subjects:
        yield f"debug: {subject.name}: SHA-256 {subject.sha256}"


def _write_statement(path: Path, certificate: Path, found: Verification) -> None:
    from s2ap_deploy import files, runtime
    from s2ap_deploy.evaluation.certificate import Certificate
    from s2ap_deploy.reporting.in_toto import statement

    content = statement(
        Certificate.load(certificate),
        subjects=[(subject.name, subject.sha256) for subject in found.subjects],
        verification={
            "status": found.status,
            "attackedAnew": found.attacked,
            "seed": found.seed,
            "tool": f"s2ap-deploy {runtime.versions().get('s2ap-deploy', 'unknown')}",
        },
    )
    files.write_json(path, content)


def _show(found: Verification, in_toto: Path | None) -> None:
    """Every check with its answer, then the answer of all."""
    for check in found.checks:
        sign, color = SIGNS[check.status]
        _say(f"{click.style(sign, fg=color)} {check.words}")
    _, color = SIGNS[found.status]
    of = "files of the certificate" if found.scope == "files" else "certificate"
    _say(f"{of}: {click.style(WORDS[found.status], fg=color, bold=True)}")
    if in_toto is not None and found.status == "pass":
        _say(f"in-toto statement, not yet signed: {in_toto}")
    elif in_toto is not None:
        _say("no in-toto statement was written", err=True)
