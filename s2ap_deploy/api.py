"""The Python interface. Commands call these functions: same run folders, same errors, typed results.

Every function takes the run folder as ``run`` (default ``s2ap-run``), skips stages that are finished with the
same inputs, and raises the errors of :mod:`s2ap_deploy.errors`. The keyword arguments are those of
:mod:`s2ap_deploy.stages.arguments`. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from s2ap_deploy.errors import StorageError, UsageError
from s2ap_deploy.recipe import keys
from s2ap_deploy.stages import arguments
from s2ap_deploy.stages.results import Certificates, Finished, Loaded, Reports, Trained

if TYPE_CHECKING:
    from torch import nn

    from s2ap_deploy.gating.check import Verdict
    from s2ap_deploy.gating.devices import Device
    from s2ap_deploy.onnx_export.decoding import Decoded
    from s2ap_deploy.onnx_export.export_report import ExportReport
    from s2ap_deploy.planning.dry_run import DryRunReport, SweepDryRunReport
    from s2ap_deploy.planning.generated_recipe import GeneratedRecipe
    from s2ap_deploy.recipe.schema import Recipe
    from s2ap_deploy.stages.arguments import (
        CertifyArguments,
        ExportArguments,
        PlanArguments,
        PretrainArguments,
        PruneArguments,
        SessionArguments,
        Settings,
        SweepArguments,
        ThresholdArguments,
    )
    from s2ap_deploy.stages.benchmark_entry import Submission
    from s2ap_deploy.stages.certified_files import Verification
    from s2ap_deploy.stages.context import RunContext
    from s2ap_deploy.stages.plan import Plan
    from s2ap_deploy.sweeps.aggregate import SweepReport
    from s2ap_deploy.sweeps.grid import Combination
    from s2ap_deploy.sweeps.runner import Parts

    Model = Path | str | Loaded | nn.Module

DEFAULT_RUN = "s2ap-run"


def load_checkpoint(
    path: Path | str,
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep: float | None = None,
    alpha: float | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
) -> Loaded:
    """Read a checkpoint of any origin (.pt, .pth, .tar, .safetensors) with a strict load.

    Args:
        path: the file.
        arch: a registered name or an import path (``package.module:factory``); None finds it by shapes.
        mean, std: normalization, one number per channel, which becomes part of the classifier.
        keep, alpha: rebuild the masks of a file that holds pruning scores.
        key: the path to the weights inside the file, where it holds several.
        trust_pickle: let the pickle run code.

    Raises:
        CheckpointError, UnsafePickleError, ArchitectureError, UsageError.
    """
    from s2ap_deploy.models.checkpoints import checkpoint
    from s2ap_deploy.stages.resolve import normalization

    classifier, info, notes = checkpoint.load(
        path,
        arch=arch,
        normalization=normalization(_tuple(mean), _tuple(std)),
        keep=keep,
        alpha=alpha,
        key=key,
        trust_pickle=trust_pickle,
    )
    return Loaded(classifier, info, notes)


def inspect(path: Path | str, **options: Any) -> dict[str, Any]:
    """Describe a checkpoint: format, architecture, layers, sparsity.

    ``benchmark`` is what the name of a file of the Adversarial Pruning Benchmark says: method, architecture,
    data, structure (US: single weights, S: filters or channels) and sparsity; None for other names.
    ``options`` are ``arch``, ``keep``, ``alpha``, ``key`` and ``trust_pickle`` of :func:`load_checkpoint`.

    Raises:
        CheckpointError, UnsafePickleError, ArchitectureError.
    """
    from dataclasses import asdict

    from s2ap_deploy.models.checkpoints.checkpoint import describe
    from s2ap_deploy.stages.benchmark_entry import BenchmarkModel

    named = BenchmarkModel.of_file(Path(path).name)
    return {**describe(Path(path), **options), "benchmark": named and asdict(named)}


def pretrain(
    arch: str,
    data: str,
    eps: str,
    *,
    run: Path | str = DEFAULT_RUN,
    output: Path | str | None = None,
    **keywords: Unpack[PretrainArguments],
) -> Trained:
    """Train a robust dense network by adversarial training (Madry et al., 2018, eq. 2.1) or another ``loss``.

    Args:
        arch: a registered architecture or an import path.
        data: a data set, such as ``digits`` or ``imagefolder:PATH``.
        eps: radius of the attack as exact text (``8/255``), for images in [0, 1].
        run: the run folder.
        output: also write the network here (.pt, .pth, .safetensors).

    Raises:
        UsageError, ArchitectureError, DataError, RunFolderError.
    """
    from s2ap_deploy.models.architectures import registry
    from s2ap_deploy.models.checkpoints import checkpoint
    from s2ap_deploy.stages import open_run, resolve
    from s2ap_deploy.stages.pretrain import dense

    arguments.check(keywords, arguments.PretrainArguments)
    target = _output(output, (".pt", ".pth", ".safetensors"), keywords)
    recipe = resolve.resolve(
        {
            "name": "pretrain",
            "model": {"arch": None if registry.is_import_path(arch) else arch},
            "pretrain": {},
        },
        _changes({**keywords, "data": data, "eps": eps}, keys.NETWORK, keys.PRETRAIN),
    )
    with open_run.opened(run, recipe, {**keywords, "arch": arch}, name="pretrain") as job:
        dense(job)
        if target is not None and job.first:
            classifier, info, _ = job.classifier("pretrain")
            checkpoint.save(target, classifier, info)
        return _trained(job, "pretrain")


def prune(
    model: Model,
    sparsity: float | None = None,
    *,
    run: Path | str = DEFAULT_RUN,
    **keywords: Unpack[PruneArguments],
) -> Trained:
    """Search a mask with S2AP (Piras et al., 2025, arXiv 2510.18381) and fine-tune the kept weights.

    Args:
        model: path of a checkpoint, result of :func:`load_checkpoint`, or a network that takes images float32
            [B, C, H, W] in [0, 1]. A network in memory needs ``data`` and ``eps``, and is known to later
            calls in this process only, unless ``arch`` says how another process can build it.
        sparsity: fraction of zeros among prunable weights.
        run: the run folder.

    Raises:
        CheckpointError, ArchitectureError, DataError, UsageError, RunFolderError.
    """
    from s2ap_deploy.reporting.charts import draw_search
    from s2ap_deploy.stages import open_run
    from s2ap_deploy.stages.prune import prune as work

    arguments.check(keywords, arguments.PruneArguments)
    changes = _pruning({**keywords, "sparsity": sparsity})
    with open_run.opened_with(model, run, keywords, name="prune", changes=changes) as job:
        work(job)
        if job.first:
            job.recorder.note(f"plot of the search: {draw_search(job.run)}")
        return _trained(job, "finetune")


def dry_run_prune(
    model: Path | str,
    sparsity: float | None = None,
    *,
    run: Path | str = DEFAULT_RUN,
    **keywords: Unpack[PruneArguments],
) -> DryRunReport:
    """Estimate the time and bytes of :func:`prune` with the same arguments; write nothing."""
    from s2ap_deploy.stages import open_run

    arguments.check(keywords, arguments.PruneArguments)
    changes = _pruning({**keywords, "sparsity": sparsity})
    recipe = open_run.checkpoint_recipe(Path(model), keywords, name="prune", changes=changes)
    return _dry_run(recipe, run, keywords, stages=("pretrain", "search", "finetune"))


def certify(
    run: Path | str = DEFAULT_RUN,
    *,
    model: Model | None = None,
    artifact: Path | str | None = None,
    **keywords: Unpack[CertifyArguments],
) -> Certificates:
    """Attack with AutoAttack (Croce and Hein, 2020, arXiv 2003.01690): the networks of ``run``, or one alone.

    With ``min_robust`` or ``max_drop``, or a gate in the recipe, attacks stop once that verdict is decided,
    unless ``full``. Robust accuracy here is an upper bound, never a formal guarantee.

    Args:
        run: the run folder.
        model: a network to attack in its own run folder, as for :func:`prune`.
        artifact: an ONNX file whose own predictions are attacked, by default with the protocol, the images
            and the seeds of the run's own certificate.

    Raises:
        OutOfTimeError: the time budget ran out; ``resume=True`` continues.
        UsageError, RunFolderError and the errors of :func:`prune`.
    """
    from s2ap_deploy.stages import open_run
    from s2ap_deploy.stages.benchmark_entry import check_entry, write_entry
    from s2ap_deploy.stages.certify import certify as work
    from s2ap_deploy.stages.early_certify import asked_policy

    arguments.check(keywords, arguments.CertifyArguments)
    # Attacks always compute in float32; only training may use another precision.
    session: dict[str, Any] = {"precision": "float32", **keywords}
    changes = _changes(keywords, keys.NETWORK, keys.CERTIFY)
    policy = {name: keywords.get(name) for name in ("min_robust", "max_drop", "rule")}
    if keywords.get("full") and any(value is not None for value in policy.values()):
        raise UsageError(
            "--full attacks every image, so --min-robust, --max-drop and --gate have no effect",
            code="gate-with-full",
        )
    if keywords.get("first"):
        if keywords.get("sample_seed") is not None:
            raise UsageError("first and sample_seed exclude each other", code="first-with-sample-seed")
        changes["certify.sample_seed"] = None
    submission = _submission(keywords, alone=model is not None or artifact is not None)
    if submission is not None:
        changes["certify.curve"] = True
    with ExitStack() as stack:
        session = stack.enter_context(open_run.on_cluster(session))
        if artifact is not None:
            return _certify_file(Path(run), Path(artifact), model, session, changes)
        if model is not None:
            place = open_run.opened_with(model, run, session, name="certify", changes=changes)
        else:
            _refuse_decided(keywords)
            place = open_run.opened(run, None, session, name="certify", changes=changes)
        job = stack.enter_context(place)
        if model is not None and "search" in job.run.manifest.stages:
            raise UsageError(
                f"{run} also holds a pruned network",
                code="run-holds-pruned-network",
                hint="leave the checkpoint out to certify both, or name another folder with --run",
            )
        if submission is not None:
            check_entry(job, submission)
        work(
            job,
            time_budget=keywords.get("time_budget"),
            policy=asked_policy(job.recipe, policy),
            sparse_compute=keywords.get("sparse_compute", "off"),
        )
        if not job.first:
            return Certificates(job.run.path)
        if submission is not None:
            write_entry(job, submission, Path(keywords["entry"] or ""))
            job.recorder.note(f"entry for the Adversarial Pruning Benchmark: {keywords['entry']}")
        return _certified(job)


def export(
    run: Path | str = DEFAULT_RUN, *, output: Path | str | None = None, **keywords: Unpack[ExportArguments]
) -> ExportReport:
    """Write the run's network as sparse ONNX and check it bit for bit, logit for logit, point for point.

    A run may hold several files, each under its own name: another form is added beside those that are there.

    Args:
        run: the run folder.
        output: also copy the file here.

    Raises:
        VerificationError: the file differs from its network or misses a budget; it is removed.
        UsageError, RunFolderError.
    """
    from s2ap_deploy.stages import open_run, resolve
    from s2ap_deploy.stages.export import export as work

    arguments.check(keywords, arguments.ExportArguments)
    target = _output(output, (".onnx",), keywords)
    open_run.refuse_registered(keywords.get("arch"), "the run folder")
    changes = _changes(keywords, keys.EXPORT)
    with open_run.opened(
        run,
        None,
        keywords,
        name="export",
        changes=lambda recipe: resolve.export_changes(changes, recipe, onnx=bool(keywords.get("onnx"))),
    ) as job:
        return work(job, output=target, bench=keywords.get("bench", False))


def decode(path: Path | str, output: Path | str, *, overwrite: bool = False) -> Decoded:
    """Write the dense ONNX file of a sparse one.

    Raises:
        VerificationError: the weights or logits of both differ.
        CheckpointError, UsageError.
    """
    from s2ap_deploy.onnx_export.decoding import decode_file
    from s2ap_deploy.onnx_export.onnx_file import load

    target = _output(output, (".onnx",), {"overwrite": overwrite})
    assert target is not None
    return decode_file(load(Path(path)), target)


def gate(
    run: Path | str = DEFAULT_RUN,
    *,
    baseline: Path | str | None = None,
    public_key: Path | str | None = None,
    thresholds: Mapping[str, Any] | None = None,
    command: str = "python: gate",
    **named: Unpack[ThresholdArguments],
) -> Verdict:
    """Judge the run against thresholds; ``verdict.exit_code`` is 0 (pass), 1 (fail) or 3 (inconclusive).

    Imports no torch.

    Args:
        run: the run folder.
        baseline: certificate that drops are measured against, instead of the run's dense one.
        public_key: require the signature of this key's holder (see :func:`sign`). The folder is then only
            read, as one that cannot be written is, and the verdict not kept in it.
        thresholds: thresholds by name, also accepted as keywords; by default the recipe's.
        command: text that the manifest records.

    Raises:
        UsageError: an unknown threshold or an invalid value.
        InconclusiveError: nothing is certified.
    """
    from s2ap_deploy.recipe.thresholds import Thresholds
    from s2ap_deploy.runs.folder import Run
    from s2ap_deploy.stages.gate import gate as work

    def opened() -> Run:
        if public_key is not None:
            return Run.look(run)
        try:
            return Run.open(run, create=False, command=command)
        except StorageError as error:
            if error.code not in ("file-not-created", "file-not-written", "folder-not-locked"):
                raise
            return Run.look(run)  # an artifact of CI, mounted to be read

    given = {key: value for key, value in {**(thresholds or {}), **named}.items() if value is not None}
    with opened() as folder:
        stated: dict[str, Any] = {}
        if not given.keys() - {"rule", "max_age", "require_device"}:
            recipe = folder.load_recipe()
            stated = recipe.gate.model_dump() if recipe is not None and recipe.gate is not None else {}
        policy = Thresholds.of({**stated, **given})
        return work(
            folder,
            policy,
            baseline=Path(baseline) if baseline is not None else None,
            public_key=Path(public_key) if public_key is not None else None,
        )


def sign(run: Path | str = DEFAULT_RUN, *, private_key: Path | str, password: str | None = None) -> Path:
    """Sign every file of a run folder with a key pair; return the path of the signature in it.

    Needs the extra ``signing``. Nothing is fetched.

    Args:
        run: the run folder; it is locked while its files are hashed.
        private_key: an elliptic-curve key in PEM.
        password: of the key, if it has one.

    Raises:
        UsageError: the library is missing, the key cannot be used, or the folder holds a link.
    """
    from s2ap_deploy.runs.folder import FolderLock, Run
    from s2ap_deploy.stages import signature

    folder = Run.look(run).path
    with FolderLock(folder):
        return signature.sign(folder, Path(private_key), password)


def bundle(
    run: Path | str = DEFAULT_RUN,
    *,
    file: Path | str | None = None,
    output: Path | str = "bundle.pyz",
    images: Path | str | None = None,
    most_images: int = 100,
    overwrite: bool = False,
) -> Path:
    """Write one file that judges the run's exported file on a device: ``python bundle.pyz`` there.

    Args:
        run: the run folder, which is only read.
        file: an exported file, or the folder of its C sources; by default the run's only file.
        output: the bundle.
        images: the image folder that the run was certified on: its files are packed, for a comparison of the
            pixels that the device makes of them.
        most_images: the most image files to pack.
        overwrite: replace an ``output`` that exists.

    Raises:
        UsageError: no such file, several to choose from, or none whose answers are certified.
        RunFolderError: a file is not as recorded.
    """
    from s2ap_deploy.runs.folder import Run
    from s2ap_deploy.stages import devices

    target = _output(output, (".pyz",), {"overwrite": overwrite})
    assert target is not None
    devices.bundle(
        Run.look(run),
        target,
        Path(file) if file is not None else None,
        images=Path(images) if images is not None else None,
        most_images=most_images,
    )
    return target


def collect(
    run: Path | str,
    record: Path | str,
    *,
    name: str | None = None,
    overwrite: bool = False,
    command: str = "python: collect",
) -> Device:
    """Bind what a bundle measured on a device to the run, and judge the answers in it.

    Args:
        run: the run folder that the bundle was made of.
        record: ``device.json``.
        name: the device's name in the run, by default the one in the record.
        overwrite: replace the record of a device of that name.
        command: text that the manifest records.

    Raises:
        InputError: the record is damaged, was edited, contradicts itself, or is of another run.
        RunFolderError: the run holds another record of that name.
    """
    from s2ap_deploy.runs.folder import Run
    from s2ap_deploy.stages import devices

    with Run.open(run, create=False, command=command) as opened:
        return devices.collect(opened, Path(record), name=name, overwrite=overwrite)


def verify(
    certificate: Path | str,
    *,
    run: Path | str | None = None,
    files_only: bool = False,
    k: int | None = None,
    seed: int | None = None,
    in_toto: Path | str | None = None,
    **session: Unpack[SessionArguments],
) -> Verification:
    """Check a certificate against every file it names, and attack ``k`` of its robust images again.

    The run folder is only read.

    Args:
        certificate: the certificate's file.
        run: its run folder, by default the one around it.
        files_only: check hashes, counts, intervals and the recipe alone, which needs no torch.
        k: number of images to attack again, 10 by default.
        seed: seed of their choice and of the attacks; None draws one.
        in_toto: write an unsigned in-toto statement here, if everything is confirmed.

    Raises:
        InputError: the file is not a certificate.
        UsageError: there is no run folder.
    """
    from s2ap_deploy.stages.certified_files import run_folder, verify_files

    arguments.check(session, arguments.SessionArguments)
    if files_only:
        if (k, seed, in_toto) != (None, None, None):
            raise UsageError(
                "--files runs no attack, so --k, --seed and --in-toto cannot be combined with it",
                code="verify-files-excludes-attacks",
            )
        return verify_files(Path(certificate), Path(run) if run is not None else None)

    import secrets

    from s2ap_deploy.stages import open_run
    from s2ap_deploy.stages.verify import verify as work

    open_run.refuse_registered(session.get("arch"), "the certificate")
    statement = _output(in_toto, (".json",), {"overwrite": True})
    path = Path(certificate)
    folder = run_folder(path, Path(run) if run is not None else None)
    if statement is not None and statement.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{statement} is inside the run folder",
            code="output-inside-run",
            hint="name a file outside the run folder",
        )
    recorder, machine = open_run.recorder(session), open_run.machine(folder, session)
    seed = secrets.randbelow(2**31) if seed is None else seed
    if session.get("verbose"):
        for line in (*open_run.machine_lines(folder, machine), f"seed {seed}"):
            recorder.note(f"debug: {line}")
    found = work(path, folder, k=10 if k is None else k, seed=seed, machine=machine, recorder=recorder)
    if statement is not None and found.status == "pass":
        _write_statement(statement, path, found)
    if session.get("verbose"):
        certified = (
            f"certificate: SHA-256 {found.certificate_sha256}; {found.attacked} images attacked again",
        )
        for line in (*certified, *(f"{each.name}: SHA-256 {each.sha256}" for each in found.subjects)):
            recorder.note(f"debug: {line}")
    return found


def report(run: Path | str = DEFAULT_RUN, *, output: Path | str | None = None, images: int = 12) -> Reports:
    """Write the run's HTML page and model card.

    Args:
        run: the run folder; it may be unfinished.
        output: folder for both files, by default ``report`` in the run folder.
        images: the most attacked images to show.

    Raises:
        RunFolderError, StorageError.
    """
    from s2ap_deploy import files
    from s2ap_deploy.reporting.report import page
    from s2ap_deploy.reporting.run_facts import collect

    facts = collect(Path(run), images=images)
    folder = Path(output) if output is not None else Path(run) / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create {folder}: {error.strerror}", code="folder-not-created", hint="name another output"
        ) from error
    written = Reports(
        page=folder / "report.html",
        card=folder / "model-card.md",
        status=facts.verdict.status if facts.verdict is not None else None,
        missing=dict(facts.missing),
        problems=(*facts.problems, *facts.doubts),
    )
    files.write_text(written.page, page.render_page(facts))
    files.write_text(written.card, page.render_card(facts))
    return written


def run(
    recipe: Path | str,
    *,
    run: Path | str = DEFAULT_RUN,
    overrides: Sequence[str] = (),
    time_budget: float | None = None,
    **session: Unpack[Settings],
) -> Finished:
    """Run a recipe from its first stage to its verdict.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        run: the run folder.
        overrides: ``key.path=value`` with the value in YAML, as ``--set``.
        time_budget: seconds that attacks may take.

    Raises:
        The errors of the stages.
    """
    from s2ap_deploy.reporting.charts import draw_curves, draw_search
    from s2ap_deploy.reporting.ci_formats import summarize
    from s2ap_deploy.stages import open_run
    from s2ap_deploy.stages.pipeline import whole

    arguments.check(session, arguments.Settings)
    resolved = _resolved(recipe, overrides, session)
    with open_run.opened(run, resolved, session, name="run") as job:
        verdict = whole(job, time_budget=time_budget)
        if not job.first:
            return Finished(job.run.path, {}, None)
        if resolved.prune is not None:
            draw_search(job.run)
        if resolved.certify.curve:
            draw_curves(job.run)
        return Finished(job.run.path, summarize(job.run, verdict), verdict)


def dry_run(
    recipe: Path | str,
    *,
    run: Path | str = DEFAULT_RUN,
    overrides: Sequence[str] = (),
    **session: Unpack[Settings],
) -> DryRunReport:
    """Estimate the time and bytes of :func:`run` with the same arguments; write nothing."""
    arguments.check(session, arguments.Settings)
    return _dry_run(_resolved(recipe, overrides, session), run, session)


def sweep(
    recipe: Path | str,
    axes: Mapping[str, Sequence[Any]],
    *,
    run: Path | str = "s2ap-sweep",
    seeds: int = 1,
    overrides: Sequence[str] = (),
    **session: Unpack[SweepArguments],
) -> SweepReport:
    """Run a recipe in all combinations of ``axes`` and compare them.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        axes: values of ``sparsity``, ``method``, ``s2ap``, ``granularity`` and ``budget`` to combine.
        run: the sweep's folder.
        seeds: repetitions of every combination, with seeds that count up from the recipe's.
        overrides: ``key.path=value`` with the value in YAML, as ``--set``.

    With ``on``, combinations run as tasks of a Ray cluster; ``run`` must be on storage that all nodes share.

    Raises:
        UsageError: no combination is possible, or the folder holds another sweep.
    """
    from s2ap_deploy import tracking
    from s2ap_deploy.stages import open_run
    from s2ap_deploy.sweeps.cluster_engine import OnCluster
    from s2ap_deploy.sweeps.runner import OneByOne, SweepFolder, possible
    from s2ap_deploy.sweeps.runner import sweep as work

    arguments.check(session, arguments.SweepArguments)
    points = _grid(recipe, axes, seeds, overrides, session)
    folder = Path(run)
    here = session if session.get("on") is None else {**session, "device": "cpu"}
    parts = _parts(folder, here)
    # Refuse before the folder is made.
    possible(points)
    tracking.require(session.get("track", ()))
    resume, overwrite = session.get("resume", False), session.get("overwrite", False)
    with ExitStack() as stack:
        opened = stack.enter_context(SweepFolder(folder, resume=resume, overwrite=overwrite))
        parts.machine.save(folder)
        connected = stack.enter_context(open_run.on_cluster(session, folder.resolve()))
        tasks = connected.get("cluster")
        return work(
            opened,
            points,
            OneByOne(parts) if tasks is None else OnCluster(tasks, folder.resolve(), connected),
            open_run.recorder(session),
            axes={**{key: value for key, value in axes.items() if value}, "seeds": seeds},
            changed=_write_sweep,
        )


def sweep_parts(
    recipe: Path | str,
    axes: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 1,
    overrides: Sequence[str] = (),
    arch: str | None = None,
) -> tuple[str, ...]:
    """List the parts of :func:`sweep`, dense networks first; each part is one run folder in the sweep's.

    Raises:
        UsageError: no combination is possible.
    """
    from s2ap_deploy.sweeps.runner import part_names

    return part_names(_grid(recipe, axes, seeds, overrides, {"arch": arch}))


def sweep_part(
    recipe: Path | str,
    axes: Mapping[str, Sequence[Any]],
    part: str,
    *,
    run: Path | str = "s2ap-sweep",
    seeds: int = 1,
    overrides: Sequence[str] = (),
    **session: Unpack[SessionArguments],
) -> None:
    """Run one of :func:`sweep_parts` alone, for schedulers that start each part as a job of its own.

    The folder's table is made by :func:`sweep` with ``resume``, which skips finished parts.

    Raises:
        UsageError: the sweep has no such part.
        RunFolderError: the dense network of a combination is not finished.
    """
    from s2ap_deploy.sweeps.runner import run_part

    arguments.check(session, arguments.SessionArguments)
    run_part(_parts(Path(run), session), _grid(recipe, axes, seeds, overrides, session), part)


def dry_run_sweep(
    recipe: Path | str,
    axes: Mapping[str, Sequence[Any]],
    *,
    run: Path | str = "s2ap-sweep",
    seeds: int = 1,
    overrides: Sequence[str] = (),
    **session: Unpack[SessionArguments],
) -> SweepDryRunReport:
    """Estimate the time and bytes of :func:`sweep` with the same arguments; write nothing."""
    from s2ap_deploy.planning.dry_run import rehearse_sweep
    from s2ap_deploy.stages import open_run

    arguments.check(session, arguments.SessionArguments)
    points = _grid(recipe, axes, seeds, overrides, session)
    return rehearse_sweep(points, Path(run), open_run.machine(Path(run), session), open_run.recorder(session))


def plan(
    checkpoint: Path | str | None = None,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    **keywords: Unpack[PlanArguments],
) -> Plan:
    """Predict bytes, multiply-accumulates and parameters of pruning and export from shapes alone.

    Args:
        checkpoint: a file, of which only names and shapes are read; without it ``arch`` is required.
        arch: a registered architecture or an import path.
        num_classes: number of classes, by default the architecture's.
        input_size: image size (C, H, W), by default the architecture's.

    Raises:
        UsageError, CheckpointError, ArchitectureError.
    """
    from s2ap_deploy.planning.generated_recipe import blueprint, read
    from s2ap_deploy.stages import resolve
    from s2ap_deploy.stages.plan import plan as work

    arguments.check(keywords, arguments.PlanArguments)
    if checkpoint is None and arch is None:
        raise UsageError(
            "name a checkpoint or an architecture",
            code="model-missing",
            hint="s2ap-deploy plan model.pt --sparsity 0.9, or plan --arch cifar-resnet18 --sparsity 0.9",
        )
    shape: dict[str, Any] = {"num_classes": num_classes, "input_size": input_size}
    pruning, exporting, found = resolve.plan_sections(keywords)
    if checkpoint is not None:
        masks: dict[str, Any] = {name: keywords.get(name) for name in ("keep", "alpha", "key")}
        trusted = keywords.get("trust_pickle", False)
        drawn = read(Path(checkpoint), arch=arch, trust_pickle=trusted, **shape, **masks)
    else:
        assert arch is not None
        drawn = blueprint(arch, real=pruning.granularity == "channel", **shape)
    return work(drawn.network, drawn.input_size, pruning, exporting, name=drawn.name, found=found)


def init(
    checkpoint: Path | str,
    output: Path | str = "recipe.yaml",
    *,
    sparsity: float = 0.9,
    arch: str | None = None,
    data: str | None = None,
    eps: str | None = None,
    norm: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep: float | None = None,
    alpha: float | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
) -> GeneratedRecipe:
    """Write a commented recipe for a checkpoint into the YAML file ``output``.

    The other arguments are those of :func:`prune`. ``guesses`` of the result are keys to check,
    ``blanks`` are keys to fill in.

    Raises:
        CheckpointError, ArchitectureError, UsageError.
    """
    from s2ap_deploy import files
    from s2ap_deploy.planning.generated_recipe import draft
    from s2ap_deploy.spec import parse_eps
    from s2ap_deploy.stages.resolve import normalization

    target = _output(output, (".yaml", ".yml"), {"overwrite": overwrite})
    assert target is not None
    try:
        radius = None if eps is None else parse_eps(eps)
    except ValueError as error:
        raise UsageError(f"eps: {error}", code="eps-invalid") from None
    written = draft(
        Path(checkpoint),
        recipe_file=target,
        arch=arch,
        data=data,
        eps=radius,
        norm=norm,
        sparsity=sparsity,
        normalization=normalization(_tuple(mean), _tuple(std)),
        trust_pickle=trust_pickle,
        masking={key: value for key, value in (("keep", keep), ("alpha", alpha)) if value is not None},
        key=key,
    )
    files.write_text(target, written.text)
    return written


def compare(runs: Sequence[Path | str]) -> dict[str, Any]:
    """Compare the masks of two or more run folders, which are only read.

    Returns, for every pair, the Hamming distance (fraction of mask bits that differ), the fraction of kept
    weights replaced and the intersection over union, also per layer.

    Raises:
        UsageError, RunFolderError.
    """
    from s2ap_deploy.stages.compare import compare as work

    return work([Path(each) for each in runs])


def _changes(given: Mapping[str, Any], *tables: keys.Keywords) -> dict[str, Any]:
    """Return the recipe keys that keyword arguments set, with ``settings`` last."""
    found: dict[str, Any] = {}
    for table in tables:
        found |= keys.changes(table, given)
    return {**found, **(given.get("settings") or {})}


def _certify_file(
    folder: Path, path: Path, model: Model | None, session: dict[str, Any], changes: dict[str, Any]
) -> Certificates:
    """Certify an ONNX file, which may also be named by its path inside the run folder."""
    from s2ap_deploy.stages import open_run, resolve
    from s2ap_deploy.stages.certify_file import artifact_stage, certify_file, settings_of
    from s2ap_deploy.stages.export_device import open_artifact

    of_networks = (
        "arch",
        "mean",
        "std",
        "keep",
        "alpha",
        "key",
        "expect_clean",
        "provable",
        "curve",
        "min_robust",
        "max_drop",
        "rule",
    )
    unfit = [name for name in of_networks if session.get(name) is not None]
    if model is not None:
        unfit.insert(0, "model")
    if unfit:
        raise UsageError(
            f"{_options(unfit)}: cannot be combined with --artifact, which certifies the file as it is",
            code="artifact-with-network-options",
            hint="leave one of them out",
        )
    found = path if path.exists() or not (folder / path).exists() else folder / path
    file = open_artifact(found)
    recipe = resolve.foreign_recipe(file, folder, changes)
    if recipe is None:
        changes = {**settings_of(folder), **changes}
    with open_run.opened(folder, recipe, session, name="certify", changes=changes) as job:
        certificate = certify_file(job, file, time_budget=session.get("time_budget"))
        if not job.first:
            return Certificates(job.run.path)
        stage = artifact_stage(job.run, file)
        results: Any = job.run.manifest.stages[stage].results
        return Certificates(job.run.path, file=certificate, results=results or {}, folder=stage)


def _write_statement(path: Path, certificate: Path, found: Verification) -> None:
    """Write an unsigned in-toto statement on a verified certificate. Raises StorageError."""
    from s2ap_deploy import files, runtime
    from s2ap_deploy.evaluation.certificate import Certificate
    from s2ap_deploy.reporting.ci_formats import statement

    verification = {
        "status": found.status,
        "attackedAnew": found.attacked,
        "seed": found.seed,
        "tool": f"s2ap-deploy {runtime.versions().get('s2ap-deploy', 'unknown')}",
    }
    subjects = [(subject.name, subject.sha256) for subject in found.subjects]
    files.write_json(
        path, statement(Certificate.load(certificate), subjects=subjects, verification=verification)
    )


def _options(names: Sequence[str]) -> str:
    """Format keyword arguments as options of the command line: their names with dashes."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _refuse_decided(given: Mapping[str, Any]) -> None:
    """Refuse arguments about the network that the run folder has already decided."""
    from s2ap_deploy.stages import open_run

    if decided := [name for name in keys.NETWORK if given.get(name) is not None]:
        raise UsageError(
            f"{_options(decided)}: the run folder has already decided this",
            code="already-decided",
            hint="leave it out, or name the checkpoint and another folder with --run",
        )
    open_run.refuse_registered(given.get("arch"), "the run folder")


def _submission(given: Mapping[str, Any], *, alone: bool) -> Submission | None:
    """Return the requested entry for the Adversarial Pruning Benchmark, if any."""
    partners: dict[str, Any] = {name: given.get(f"ap_{name}") for name in ("method", "paper", "pretraining")}
    if given.get("entry") is None:
        if useless := [f"ap_{name}" for name, value in partners.items() if value is not None]:
            raise UsageError(
                f"{_options(useless)}: only for an entry",
                code="entry-missing",
                hint="add --ap-benchmark-entry FILE",
            )
        return None
    if partners["method"] is None or partners["paper"] is None:
        raise UsageError(
            "an entry for the benchmark needs --ap-method and --ap-paper",
            code="entry-incomplete",
            hint="for example --ap-method HARP_Zhao2023Holistic --ap-paper https://arxiv.org/abs/2412.14714",
        )
    if alone:
        raise UsageError(
            "an entry for the benchmark is for a pruned run",
            code="entry-needs-pruned-run",
            hint="leave CHECKPOINT and --artifact out",
        )
    from s2ap_deploy.stages.benchmark_entry import Submission

    _output(given["entry"], (".json",), {"overwrite": True})
    return Submission(**partners)


def _certified(job: RunContext) -> Certificates:
    """Return the certificates of a run, after drawing its security curve."""
    from s2ap_deploy.evaluation.certificate import Certificate
    from s2ap_deploy.reporting.charts import draw_curves

    if job.recipe.certify.curve:
        job.recorder.note(f"security curve: {draw_curves(job.run)}")
    stage = job.run.manifest.stages["certify"]
    results: Any = stage.results
    found = {
        role: Certificate.load(job.run.output("certify", f"{role}.json"))
        for role in ("dense", "pruned")
        if any(output.path == f"certify/{role}.json" for output in stage.outputs)
    }
    return Certificates(
        job.run.path, dense=found.get("dense"), pruned=found.get("pruned"), results=results or {}
    )


def _pruning(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe keys that the arguments of :func:`prune` set, over those of its preset."""
    from s2ap_deploy.recipe.schema import preset

    start = preset(given["preset"]) if given.get("preset") is not None else {}
    if given.get("steps"):
        given = {**given, **_steps(tuple(given["steps"]), given.get("sparsity"))}
    return {"prune": {}, **start, **_changes(given, keys.NETWORK, keys.PRUNE)}


def _steps(path: tuple[float, ...], sparsity: float | None) -> dict[str, Any]:
    """Split a sequence of sparsities into the steps and the final one, which ``sparsity`` may repeat."""
    if sparsity is None or sparsity == path[-1]:
        return {"steps": path[:-1], "sparsity": path[-1]}
    return {"steps": path, "sparsity": sparsity}


def _resolved(recipe: Path | str, overrides: Sequence[str], session: Mapping[str, Any]) -> Recipe:
    from s2ap_deploy.recipe import catalog
    from s2ap_deploy.stages import open_run, resolve

    open_run.refuse_registered(session.get("arch"), "the recipe")
    found = catalog.load(str(recipe), overrides=overrides)
    return resolve.changed(found, session["settings"]) if session.get("settings") else found


def _grid(
    recipe: Path | str,
    axes: Mapping[str, Sequence[Any]],
    seeds: int,
    overrides: Sequence[str],
    session: Mapping[str, Any],
) -> tuple[Combination, ...]:
    from s2ap_deploy.recipe import catalog
    from s2ap_deploy.stages import open_run
    from s2ap_deploy.sweeps.grid import Axes, combinations

    open_run.refuse_registered(session.get("arch"), "the recipe")
    return combinations(catalog.document(str(recipe), overrides=overrides), Axes(**axes, seeds=seeds))


def _parts(folder: Path, session: Mapping[str, Any]) -> Parts:
    import functools

    from s2ap_deploy.stages import open_run
    from s2ap_deploy.sweeps.runner import Parts

    return Parts(
        folder,
        open_run.machine(folder, session),
        open_run.recorder(session),
        resume=session.get("resume", False),
        command=session.get("command", "python: sweep"),
        telling=functools.partial(open_run.reported, session=session),
    )


def _dry_run(recipe: Recipe, run: Path | str, session: Mapping[str, Any], **options: Any) -> DryRunReport:
    import dataclasses

    from s2ap_deploy.distributed.collectives import SINGLE_PROCESS
    from s2ap_deploy.planning import dry_run as planning
    from s2ap_deploy.stages import open_run

    open_run.recorder(session).note("timing a few steps of each kind")
    again: dict[str, Any] = {key: bool(session.get(key)) for key in ("resume", "overwrite")}
    machine = open_run.machine(Path(run), session)
    alone = dataclasses.replace(machine, ranks=SINGLE_PROCESS)
    return machine.ranks.on_first(
        lambda: planning.dry_run_report(recipe, Path(run), alone, **again, **options)
    )


def _write_sweep(report: SweepReport, folder: Path) -> None:
    """Write the sweep's tables and plots, after every combination."""
    from s2ap_deploy.reporting import sweep_report

    sweep_report.write(report, folder)
    sweep_report.draw_pareto(report, folder)
    sweep_report.draw_accuracy(report, folder)


def _output(path: Path | str | None, suffixes: tuple[str, ...], given: Mapping[str, Any]) -> Path | None:
    """Refuse an output that could not be written at the end. Raises UsageError."""
    if path is None:
        return None
    found = Path(path)
    if found.suffix not in suffixes:
        raise UsageError(
            f"cannot tell the format of {found}",
            code="output-format-unknown",
            hint=f"use the suffix {' or '.join(suffixes)}",
        )
    if found.is_dir() or (found.exists() and not given.get("overwrite")):
        raise UsageError(
            f"{found} exists", code="output-exists", hint="add --overwrite, or choose another --output"
        )
    if not found.parent.is_dir():
        raise UsageError(
            f"there is no folder {found.parent} for {found.name}",
            code="folder-missing",
            hint="create it first",
        )
    return found


def _tuple(numbers: Sequence[float] | None) -> tuple[float, ...] | None:
    return tuple(numbers) if numbers is not None else None


def _trained(job: RunContext, stage: Any) -> Trained:
    from s2ap_deploy.runs.folder import MODEL

    stages = job.run.manifest.stages
    results: Any = stages[stage].results or {}
    names = [name for name in stages if name in ("pretrain", "search", "finetune")]
    search: Any = stages["search"].results if "search" in stages else {}
    best = results.get("best") or (search or {}).get("last") or {}
    section, first = job.recipe.prune, job.recipe.pretrain
    epochs = {"pretrain": first.epochs} if first is not None else {}
    if section is not None:
        epochs |= {"search": section.search.epochs, "finetune": section.finetune.epochs}
    return Trained(
        run=job.run.path,
        model=job.run.output(stage, MODEL),
        clean_accuracy=best.get("clean_accuracy"),
        robust_accuracy=best.get("robust_accuracy"),
        sparsity=results.get("sparsity"),
        stages={name: stages[name].results for name in names},
        epochs=epochs,
        seconds={name: seconds for name in names if (seconds := stages[name].seconds) is not None},
        threat=str(job.recipe.threat),
        num_classes=results.get("num_classes"),
    )
