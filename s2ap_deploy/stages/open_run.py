"""A job opened from Python: what ``cli.session`` is to a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from s2ap_deploy import runtime
from s2ap_deploy.data import datasets
from s2ap_deploy.errors import RunFolderError, UsageError
from s2ap_deploy.models.architectures import custom, registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.classifier import Classifier, Normalize, dry_run
from s2ap_deploy.recipe.schema import Recipe, with_preset
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.runs.manifest import tool_version
from s2ap_deploy.spec import Normalization
from s2ap_deploy.stages import resolve
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.stages.execution import ExecutionConfig, remembered_data_root
from s2ap_deploy.stages.pretrain import dense
from s2ap_deploy.stages.results import Loaded
from s2ap_deploy.training.precision import choose_precision

GIVEN = "given.safetensors"
"""Where a run folder keeps the weights of a network that was handed over in memory."""


class Session(TypedDict, total=False):
    """Keyword arguments that every function of the Python interface takes; none is part of a recipe.

    ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``threads`` are torch's, ``workers`` the attack
    processes. ``data_root``: where data sets lie; ``download`` fetches one that is missing. ``resume``
    continues what was interrupted, ``overwrite`` starts again. ``recorder`` is told how far it is.
    ``precision`` (``auto``, ``float32``, ``bf16``) and ``compiled`` are of training steps, ``accumulate`` the
    pieces of a batch; attacks that certify compute in float32.
    """

    device: str
    threads: int | None
    workers: int | None
    data_root: Path | str | None
    download: bool
    resume: bool
    overwrite: bool
    recorder: Recorder
    precision: str
    compiled: bool
    accumulate: int


Changes = Mapping[str, Any] | Callable[[Recipe], Mapping[str, Any]]


@contextmanager
def opened(
    folder: Path | str,
    recipe: Recipe | None,
    *,
    command: str,
    changes: Changes | None = None,
    arch: str | None = None,
    trust_pickle: bool = False,
    **session: Unpack[Session],
) -> Iterator[RunContext]:
    """The job in the run folder, which is made where a ``recipe`` is given; None takes the folder's own.

    ``changes`` (dotted keys of the recipe) are made to it; ``command`` is noted in the manifest. Raises
    TypeError for a keyword that is none of :class:`Session`, and what opening a run folder raises.
    """
    check(session)
    with Run.open(folder, create=recipe is not None, command=f"python: {command}") as run:
        found = recipe or run.load_recipe()
        if found is None:
            raise RunFolderError(f"{folder} holds no recipe yet", hint="start with s2ap_deploy.prune")
        found = resolve.changed(found, changes(found) if callable(changes) else changes or {})
        yield RunContext(
            run,
            found,
            machine(run.path, arch=arch, trust_pickle=trust_pickle, **session),
            session.get("recorder") or Silent(),
            resume=session.get("resume", False),
            overwrite=session.get("overwrite", False),
        )


def check(session: Session) -> None:
    """Raise TypeError for a keyword that is none of :class:`Session`, UsageError for a value that cannot be.

    Ranks are refused too: they are processes, and a function has one.
    """
    if "devices" in session:
        raise UsageError(
            "ranks are processes of a command, and a function has one process",
            hint="type s2ap-deploy prune ... --devices N, which leaves the same run folder",
        )
    if unknown := session.keys() - Session.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    for name in ("threads", "workers", "accumulate"):
        count = session.get(name)
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UsageError(f"{name} must be a whole number from 1 on, not {count!r}")


def machine(
    folder: Path, *, arch: str | None = None, trust_pickle: bool = False, **session: Unpack[Session]
) -> ExecutionConfig:
    """The machine as the keywords describe it; ``folder`` may remember where data lies.

    Raises what :func:`check` raises, and UsageError for a device or a precision that is not there.
    """
    check(session)
    threads, root = session.get("threads"), session.get("data_root")
    if threads is not None:
        torch.set_num_threads(threads)
    device = runtime.device(session.get("device", "auto"))
    return ExecutionConfig(
        device=device,
        data_root=Path(root).expanduser().resolve() if root is not None else remembered_data_root(folder),
        download=session.get("download", False),
        workers=session.get("workers"),
        arch=arch if arch is not None and registry.is_import_path(arch) else None,
        trust_pickle=trust_pickle,
        accumulate=session.get("accumulate", 1),
        precision=choose_precision(
            session.get("precision", "auto"), device, compiled=session.get("compiled", False)
        ),
    )


def content_of(
    network: nn.Module,
    folder: Path | str,
    *,
    name: str,
    info: CheckpointInfo | None,
    arch: str | None,
    data: str | None,
    eps: str | None,
    norm: str | None,
    data_root: Path | str | None = None,
) -> tuple[dict[str, Any], Classifier, CheckpointInfo]:
    """The start of a recipe for a network in memory, with the classifier and facts that its file will hold.

    ``info`` is what a loaded checkpoint said; a network without it needs ``data`` and ``eps``, and takes
    images [B, C, H, W] in [0, 1]. Raises UsageError for what is missing, ArchitectureError for a network
    that cannot run on the data.
    """
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"a network is needed, not {type(network).__name__}",
            hint="give a path, what load_checkpoint gave, or a torch.nn.Module",
        )
    data = data or (info.data if info is not None else None)
    if data is None:
        raise UsageError(
            "a network in memory does not say which data it was trained on",
            hint="add data=: digits, mnist, cifar10, cifar100, svhn or imagefolder:PATH",
        )
    threat = info.threat if info is not None else None
    if eps is None and threat is None:
        raise UsageError(
            "a network in memory does not say which attack it should withstand",
            hint="add eps=, for example eps='8/255' for CIFAR-10 in L-infinity",
        )
    classifier = network if isinstance(network, Classifier) else Classifier(network, None)
    if info is None:
        preprocessing = datasets.spec(data, root=Path(data_root) if data_root else None).preprocessing
        classes = int(dry_run(classifier, preprocessing.size).shape[1])
        info = CheckpointInfo(
            arch=arch
            or custom.register(classifier.network, input_size=preprocessing.size, num_classes=classes),
            num_classes=classes,
            preprocessing=preprocessing,
            normalization=_normalization(classifier),
            stage="foreign",
            tool_version=tool_version(),
        )
    return (
        {
            "name": name,
            "model": {
                "checkpoint": str(Path(folder) / GIVEN),
                "arch": None if registry.is_import_path(info.arch) else info.arch,
            },
            "data": {"name": data},
            "threat": {
                "norm": norm or (threat.norm if threat is not None else "Linf"),
                "eps": eps or (threat.eps if threat is not None else None),
            },
        },
        classifier,
        info,
    )


@dataclass(frozen=True, eq=False)
class Source:
    """A network to start from and what was said of it."""

    model: Path | str | Loaded | nn.Module
    data: str | None
    eps: str | None
    norm: str | None
    arch: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    keep: float | None
    alpha: float | None
    seed: int
    trust_pickle: bool


@contextmanager
def on_model(
    name: str,
    source: Source,
    run: Path | str,
    sections: Mapping[str, Any],
    preset: str | None,
    changes: Mapping[str, Any],
    session: Session,
) -> Iterator[RunContext]:
    """A job whose dense network is the source's, taken over into the run folder."""
    normalization = resolve.normalization(as_tuple(source.mean), as_tuple(source.std))
    memory: tuple[Classifier, CheckpointInfo] | None = None
    if isinstance(source.model, (str, Path)):
        content = resolve.from_checkpoint(
            Path(source.model),
            name=name,
            arch=source.arch,
            data=source.data,
            eps=source.eps,
            norm=source.norm,
            normalization=normalization,
            trust_pickle=source.trust_pickle,
        )
    else:
        loaded = source.model if isinstance(source.model, Loaded) else None
        if normalization is not None or source.keep is not None or source.alpha is not None:
            raise UsageError(
                "mean, std, keep and alpha are for files: a network in memory is taken as it is",
                hint="give them to load_checkpoint, or wrap the network in models.classifier.Classifier",
            )
        content, classifier, info = content_of(
            source.model.classifier if isinstance(source.model, Loaded) else source.model,
            run,
            name=name,
            info=loaded.info if loaded is not None else None,
            arch=source.arch,
            data=source.data,
            eps=source.eps,
            norm=source.norm,
            data_root=session.get("data_root"),
        )
        memory = classifier, info
    changed = {"seed": source.seed, "model.keep": source.keep, "model.alpha": source.alpha}
    recipe = resolve.resolve({**content, **sections}, changed)
    if preset is not None:
        recipe = with_preset(recipe, preset)
    recipe = resolve.changed(recipe, changes)
    arch = source.arch or (memory[1].arch if memory else None)
    with opened(run, recipe, command=name, arch=arch, trust_pickle=source.trust_pickle, **session) as job:
        if memory is not None:
            keep(job, *memory)
        dense(job)
        yield job


def as_tuple(numbers: Sequence[float] | None) -> tuple[float, ...] | None:
    """Any sequence of numbers, or None."""
    return tuple(numbers) if numbers is not None else None


def keep(job: RunContext, classifier: Classifier, info: CheckpointInfo) -> None:
    """Write a network that was handed over into its run folder. Raises StorageError."""
    facts = {"data": job.recipe.data.name, "threat": job.recipe.threat}
    checkpoint.save(job.run.path / GIVEN, classifier, info.model_copy(update=facts))


def _normalization(classifier: Classifier) -> Normalization | None:
    """The one inside; None for a network that takes images as they are."""
    inside = classifier.normalize
    if not isinstance(inside, Normalize):
        return None
    return Normalization(mean=tuple(inside.mean.flatten().tolist()), std=tuple(inside.std.flatten().tolist()))
