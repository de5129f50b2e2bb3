"""The commands as functions: the same pipeline, run folders and errors, with typed results. No torch by
itself.

Every function takes the run folder as ``run`` (default ``s2ap-run``, as on the command line), skips what is
already done there with the same inputs, and raises the errors of :mod:`s2ap_deploy.errors`. Keywords that say
how the machine works (``device``, ``threads``, ``resume``, ``recorder``, ...) are those of
:class:`s2ap_deploy.stages.open_run.Session`. ``settings`` are keys of a recipe by their dotted name, such as
``{"prune.search.epochs": 5}``, and come before every other argument; a None there is the recipe's null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from s2ap_deploy.stages.results import Certificates, Loaded, Reports, Trained

if TYPE_CHECKING:
    from torch import nn

    from s2ap_deploy.gating.policy import Verdict
    from s2ap_deploy.onnx_export.export_report import ExportReport
    from s2ap_deploy.recipe.schema import Recipe
    from s2ap_deploy.stages.certified_files import Verification
    from s2ap_deploy.stages.context import RunContext
    from s2ap_deploy.stages.open_run import Session

DEFAULT_RUN = "s2ap-run"


class Thresholds(TypedDict, total=False):
    """What :func:`gate` may ask for: shares as fractions, bytes, milliseconds, ratios to the dense file."""

    min_clean: float | None
    min_robust: float | None
    min_proven: float | None
    max_drop: float | None
    max_class_drop: float | None
    min_sparsity: float | None
    max_bytes: int | None
    max_latency_ms: float | None
    max_latency_ratio: float | None
    max_age: str | None
    rule: Literal["lower", "point"]


def load_checkpoint(
    path: Path | str,
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep: float | None = None,
    alpha: float | None = None,
    trust_pickle: bool = False,
) -> Loaded:
    """Read anybody's checkpoint (.pt, .pth, .tar, .safetensors): a strict load, nothing left random.

    ``arch`` is a registered name or an import path (``package.module:factory``), None to find it by names and
    shapes; ``mean`` and ``std`` (one number per channel) become part of the classifier; ``keep`` and
    ``alpha`` rebuild the masks of a file that holds pruning scores. Raises CheckpointError,
    UnsafePickleError, ArchitectureError and UsageError.
    """
    from s2ap_deploy.models.checkpoints import checkpoint
    from s2ap_deploy.spec import Normalization
    from s2ap_deploy.stages.open_run import as_tuple
    from s2ap_deploy.stages.resolve import normalization

    section = normalization(as_tuple(mean), as_tuple(std))
    classifier, info, notes = checkpoint.load(
        path,
        arch=arch,
        normalization=Normalization.model_validate(section) if section is not None else None,
        keep=keep,
        alpha=alpha,
        trust_pickle=trust_pickle,
    )
    return Loaded(classifier, info, notes)


def pretrain(
    arch: str,
    data: str,
    eps: str,
    *,
    run: Path | str = DEFAULT_RUN,
    norm: str = "Linf",
    epochs: int | None = None,
    loss: str | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **session: Unpack[Session],
) -> Trained:
    """Train a robust dense network (adversarial training, Madry et al., 2018, eq. 2.1, unless ``loss``
    differs).

    ``eps`` is the attack's radius as exact text (``8/255``) in units of images in [0, 1]. Raises UsageError,
    ArchitectureError, DataError and RunFolderError.
    """
    from s2ap_deploy.models.architectures import registry
    from s2ap_deploy.stages import open_run, resolve
    from s2ap_deploy.stages.pretrain import dense

    recipe = resolve.resolve(
        {
            "name": "pretrain",
            "seed": seed,
            "model": {"arch": None if registry.is_import_path(arch) else arch},
            "data": {"name": data},
            "threat": {"norm": norm, "eps": eps},
            "pretrain": {},
        },
        {"pretrain.epochs": epochs, "pretrain.objective.loss": loss, **_said(settings)},
    )
    with open_run.opened(run, recipe, command="pretrain", arch=arch, **session) as job:
        dense(job)
        return _trained(job, "pretrain")


def prune(
    model: Path | str | Loaded | nn.Module,
    sparsity: float | None = None,
    *,
    run: Path | str = DEFAULT_RUN,
    method: str | None = None,
    granularity: str | None = None,
    keep_ratio: float | None = None,
    budget: str | None = None,
    s2ap: bool | None = None,
    gamma: float | None = None,
    loss: str | None = None,
    preset: str | None = None,
    search_epochs: int | None = None,
    finetune_epochs: int | None = None,
    data: str | None = None,
    eps: str | None = None,
    norm: str | None = None,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep: float | None = None,
    alpha: float | None = None,
    seed: int = 0,
    trust_pickle: bool = False,
    settings: Mapping[str, Any] | None = None,
    **session: Unpack[Session],
) -> Trained:
    """Search a mask with S2AP (Piras et al., 2025, arXiv 2510.18381) and fine-tune what it kept.

    ``model`` is a checkpoint's path, what :func:`load_checkpoint` gave, or a network that takes images
    float32 [B, C, H, W] in [0, 1]; a network in memory needs ``data`` and ``eps`` (text such as ``8/255``),
    and is known to later calls in this process only, unless ``arch`` says how another one can build it.
    ``sparsity`` is the fraction of zeros among prunable weights. None takes the default of the command line.
    Raises CheckpointError, ArchitectureError, DataError, UsageError and RunFolderError.
    """
    from s2ap_deploy.recipe.methods import n_of_m
    from s2ap_deploy.stages import open_run
    from s2ap_deploy.stages.prune import prune as work

    asked: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "granularity": granularity or "weight",
        "keep_ratio": keep_ratio,
        "budget": budget,
        "s2ap": s2ap,
    }
    said = _said(settings)
    if not {"prune.sparsity", "prune.keep_ratio"} & said.keys() and (sparsity, keep_ratio) == (None, None):
        if n_of_m(asked["granularity"]) is None:
            from s2ap_deploy.errors import UsageError

            raise UsageError("sparsity is missing", hint="for example sparsity=0.9")
        asked.pop("sparsity")
    changes = {
        "prune.gamma": gamma,
        "prune.search.epochs": search_epochs,
        "prune.finetune.epochs": finetune_epochs,
        "prune.search.objective.loss": loss,
        "prune.finetune.objective.loss": loss,
        **said,
    }
    source = open_run.Source(model, data, eps, norm, arch, mean, std, keep, alpha, seed, trust_pickle)
    content = {"prune": {key: value for key, value in asked.items() if value is not None}}
    with open_run.on_model("prune", source, run, content, preset, changes, session) as job:
        work(job)
        return _trained(job, "finetune")


def certify(
    run: Path | str = DEFAULT_RUN,
    *,
    model: Path | str | Loaded | nn.Module | None = None,
    artifact: Path | str | None = None,
    n: int | None = None,
    protocol: str | None = None,
    provable: bool | None = None,
    curve: bool | None = None,
    time_budget: float | None = None,
    min_robust: float | None = None,
    max_drop: float | None = None,
    rule: str | None = None,
    full: bool | None = None,
    data: str | None = None,
    eps: str | None = None,
    norm: str | None = None,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep: float | None = None,
    alpha: float | None = None,
    seed: int | None = None,
    trust_pickle: bool = False,
    settings: Mapping[str, Any] | None = None,
    **session: Unpack[Session],
) -> Certificates:
    """Attack with AutoAttack (Croce and Hein, 2020, arXiv 2003.01690): the networks of ``run``, or one alone.

    ``model`` is attacked in a run folder of its own (as for :func:`prune`); ``artifact`` is an ONNX file that
    answers for itself. ``n`` test images, ``time_budget`` in seconds, accuracies as fractions. With
    ``min_robust`` or ``max_drop``, or a gate in the recipe, attacks stop once that verdict is decided, unless
    ``full``. Robust accuracy here is an upper bound, never a formal guarantee. Raises OutOfTimeError when the
    time runs out (``resume=True`` continues), and the errors of :func:`prune`.
    """
    from s2ap_deploy.errors import UsageError
    from s2ap_deploy.stages import early_certify, open_run, resolve
    from s2ap_deploy.stages.certify import certify as work
    from s2ap_deploy.stages.certify_file import certify_file

    changes: dict[str, Any] = {
        "certify.version": protocol,
        "certify.n": n,
        "certify.provable": provable,
        "certify.curve": curve,
        "certify.full": full,
        **_said(settings),
    }
    policy = {"min_robust": min_robust, "max_drop": max_drop, "rule": rule}
    if full and any(value is not None for value in policy.values()):
        raise UsageError("full attacks to the end, so min_robust, max_drop and rule mean nothing")
    if model is not None and artifact is not None:
        raise UsageError("model and artifact exclude each other")
    if artifact is not None:
        from s2ap_deploy.onnx_export.onnx_file import load

        file = load(Path(artifact))
        recipe = resolve.foreign_recipe(file, Path(run), data=data, eps=eps, norm=norm, seed=seed)
        with open_run.opened(run, recipe, command="certify", changes=changes, **session) as job:
            return Certificates(job.run.path, file=certify_file(job, file, time_budget=time_budget))
    if model is not None:
        source = open_run.Source(
            model, data, eps, norm, arch, mean, std, keep, alpha, seed or 0, trust_pickle
        )
        place = open_run.on_model("certify", source, run, {}, None, changes, session)
    else:
        place = open_run.opened(run, None, command="certify", changes=changes, arch=arch, **session)
    with place as job:
        if model is not None and "search" in job.run.manifest.stages:
            raise UsageError(
                f"{run} holds a pruned network beside this one",
                hint="leave model out to certify both, or name a folder of its own with run=",
            )
        work(job, time_budget=time_budget, policy=early_certify.asked_policy(job.recipe, policy))
        return _certificates(job)


def export(
    run: Path | str = DEFAULT_RUN,
    *,
    output: Path | str | None = None,
    encoding: str | None = None,
    values: str | None = None,
    int8: bool | None = None,
    target: str | None = None,
    bench: bool = False,
    arch: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **session: Unpack[Session],
) -> ExportReport:
    """Write the run's network as sparse ONNX and check it bit for bit, logit for logit, point for point.

    ``output`` gets a copy, also over a file that is there. ``target`` names a device profile.
    ``bench`` measures the file beside its dense twin: milliseconds, ratios with quartiles, peak memory in
    bytes (``report.performance``). Raises VerificationError when the file is not its network or misses a
    budget, and leaves nothing then.
    """
    from s2ap_deploy.stages import open_run, resolve
    from s2ap_deploy.stages.export import export as work

    section = {"encoding": encoding, "values": values, "int8": int8}

    def changes(recipe: Recipe) -> dict[str, Any]:
        return {**resolve.export_changes(section, target, recipe), **_said(settings)}

    with open_run.opened(run, None, command="export", changes=changes, arch=arch, **session) as job:
        return work(job, output=Path(output) if output is not None else None, bench=bench)


def gate(
    run: Path | str = DEFAULT_RUN,
    *,
    baseline: Path | str | None = None,
    thresholds: Mapping[str, Any] | None = None,
    **named: Unpack[Thresholds],
) -> Verdict:
    """Judge the run: ``verdict.status`` is pass, fail or inconclusive, ``verdict.exit_code`` 0, 1 or 3.

    Thresholds are ``min_robust``, ``max_drop``, ``max_class_drop``, ``min_clean``, ``min_proven``,
    ``min_sparsity`` (fractions), ``max_bytes``, ``max_latency_ms``, ``max_latency_ratio``, ``max_age``
    (``30d``) and ``rule`` (``lower`` or ``point``), by keyword or in ``thresholds``; without any, those of
    the run's recipe apply. Imports no torch. Raises UsageError for what is no threshold, InconclusiveError
    where nothing is certified.
    """
    from pydantic import ValidationError

    from s2ap_deploy.errors import UsageError
    from s2ap_deploy.gating.policy import GatePolicy
    from s2ap_deploy.runs.folder import Run
    from s2ap_deploy.stages.gate import gate as work

    given = {key: value for key, value in {**(thresholds or {}), **named}.items() if value is not None}
    with Run.open(run, create=False, command="python: gate") as folder:
        stated: dict[str, Any] = {}
        if not given.keys() - {"rule", "max_age"}:
            recipe = folder.load_recipe()
            stated = recipe.gate.model_dump() if recipe is not None and recipe.gate is not None else {}
        try:
            policy = GatePolicy.model_validate({**stated, **given})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the thresholds"
            raise UsageError(
                f"{where}: {first['msg'].removeprefix('Value error, ')}",
                hint=f"thresholds are {', '.join(GatePolicy.model_fields)}",
            ) from None
        return work(folder, policy, baseline=Path(baseline) if baseline is not None else None)


def verify(
    certificate: Path | str,
    *,
    run: Path | str | None = None,
    files_only: bool = False,
    k: int = 10,
    seed: int | None = None,
    arch: str | None = None,
    **session: Unpack[Session],
) -> Verification:
    """Hold a certificate's file against every file it names, and attack ``k`` of its survivors anew.

    ``files_only`` checks hashes, counts, intervals and the recipe alone, which needs no torch. ``seed`` None
    is drawn, so that whoever made the certificate could not know it. Nothing is written. Raises InputError
    for what is no certificate, UsageError where no run folder is found.
    """
    import secrets

    from s2ap_deploy.stages.certified_files import run_folder, verify_files

    path = Path(certificate)
    folder = run_folder(path, Path(run) if run is not None else None)
    if files_only:
        return verify_files(path, folder)

    from s2ap_deploy.recorder import Silent
    from s2ap_deploy.stages import open_run
    from s2ap_deploy.stages.verify import verify as work

    return work(
        path,
        folder,
        k=k,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        machine=open_run.machine(folder, arch=arch, **session),
        recorder=session.get("recorder") or Silent(),
    )


def report(run: Path | str = DEFAULT_RUN, *, output: Path | str | None = None, images: int = 12) -> Reports:
    """Write the run's HTML page and model card into ``output``, or ``report`` in the run folder.

    ``images`` is the most attacked images to show. Raises RunFolderError and StorageError.
    """
    from s2ap_deploy import files
    from s2ap_deploy.errors import StorageError
    from s2ap_deploy.reporting.report import card, page
    from s2ap_deploy.reporting.run_facts import collect

    facts = collect(Path(run), images=images)
    folder = Path(output) if output is not None else Path(run) / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {folder}: {error.strerror}", hint="name another output") from error
    written = Reports(
        folder / "report.html", folder / "model-card.md", (*facts.problems, *facts.missing.values())
    )
    files.write_text(written.page, page.render(facts))
    files.write_text(written.card, card.render(facts))
    return written


def _said(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings as changes to a recipe, in which None would mean that nobody gave one."""
    from s2ap_deploy.stages.resolve import NULL

    return {key: NULL if value is None else value for key, value in (settings or {}).items()}


def _trained(job: RunContext, stage: Any) -> Trained:
    from s2ap_deploy.runs.folder import MODEL

    results: Any = job.run.manifest.stages[stage].results or {}
    best = results.get("best") or {}
    return Trained(
        run=job.run.path,
        model=job.run.output(stage, MODEL),
        clean_accuracy=best.get("clean_accuracy"),
        robust_accuracy=best.get("robust_accuracy"),
        sparsity=results.get("sparsity"),
    )


def _certificates(job: RunContext) -> Certificates:
    from s2ap_deploy.evaluation.certificate import Certificate

    found = {
        role: Certificate.load(job.run.output("certify", f"{role}.json"))
        for role in ("dense", "pruned")
        if any(output.path == f"certify/{role}.json" for output in job.run.manifest.stages["certify"].outputs)
    }
    return Certificates(job.run.path, dense=found.get("dense"), pruned=found.get("pruned"))
