"""Prune: search the mask, then train what it kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.data.datasets import ImageData
from s2ap_deploy.data.splits import choose
from s2ap_deploy.errors import ArchitectureError, InputError, RecipeError
from s2ap_deploy.models.channels.coupling import Coupling, channel_groups
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.checkpoints.checkpoint import CheckpointInfo
from s2ap_deploy.models.used_weights import UsedWeights, weight_count
from s2ap_deploy.pruning.allocation import Allocation, ChannelQuotas, Fixed, Global, Quotas
from s2ap_deploy.pruning.budgets import (
    ChannelCost,
    Measure,
    Shapes,
    by_ratio,
    erk,
    floors,
    limit_of,
    total_kept,
    uniform,
    within,
)
from s2ap_deploy.pruning.granularity import Channels, Granularity, NOfM, Weights
from s2ap_deploy.pruning.masks import kept, load_tensors, save_tensors, sparsity
from s2ap_deploy.pruning.scores import (
    GRADIENT_BATCHES,
    Batches,
    ScoredNetwork,
    initial_scores,
    mask_gradients,
    reinitialize,
)
from s2ap_deploy.pruning.search import Perturbation, SearchResult, choose_once, search
from s2ap_deploy.pruning.search_diagnostics import diagnosis
from s2ap_deploy.pruning.sparse_training import train_sparse
from s2ap_deploy.recipe.methods import METHODS, n_of_m, origins
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.runs.folder import MASKS, MODEL, Run
from s2ap_deploy.runs.snapshot import Stage
from s2ap_deploy.runtime import generator
from s2ap_deploy.stages.context import HISTORY, RunContext, weights_on_images
from s2ap_deploy.stages.results import IMAGES
from s2ap_deploy.training.objective import Objective, SelfDistillation, Teacher
from s2ap_deploy.training.train import Quantization, TrainingData, train, validation_sample


@dataclass(frozen=True, eq=False)
class Scoring:
    """``kept`` is the exact number of weights to keep, None if the pattern decides.

    ``dense`` names the counted weights that stay whole.
    """

    scored: ScoredNetwork
    kept: int | None
    dense: tuple[str, ...]


def score(
    network: nn.Module,
    used: UsedWeights,
    input_size: tuple[int, int, int],
    section: PruneSection,
    seed: int,
) -> Scoring:
    """Return the network under the section's method, with its initial scores.

    ``used`` are its weights; the last that can be pruned is the classifier's. Those that cannot be pruned
    count as dense layers in the requested sparsity, unless the section allows to leave them out.
    ``input_size`` is (C, H, W). Raises ArchitectureError without any weight to prune, UsageError and
    InputError for what does not fit the network.
    """
    names = used.prunable
    if not names:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(used.outside.items())[:3])
        raise ArchitectureError(
            "nothing to prune: "
            + (listed or "in a forward pass no parameter of the network multiplies activations"),
            code="prunable-layers-missing",
            hint="weights are pruned where the forward pass reads them as they are",
        )
    outside = () if section.allow_unpruned else tuple(used.outside)
    method = METHODS[section.method]
    if method.untrained:
        reinitialize(network, names, generator(seed, "untrain"))
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(parameters[name].shape) for name in (*names, *outside)}
    ends = (*((names[0], names[-1]) if section.dense_ends else ()), *outside)
    pattern = n_of_m(section.granularity)
    if pattern is not None:
        open_shapes = {name: shapes[name] for name in names if name not in ends and used.reads[name] == 1}
        fitting, _ = NOfM.divide(open_shapes, *pattern)
        groups = NOfM(fitting, *pattern)
        scored = ScoredNetwork(
            network,
            groups,
            Fixed(groups.kept(shapes)),
            start(network, groups, section, seed),
            affine=affine(network, section),
        )
        return Scoring(scored, None, tuple(name for name in shapes if name not in fitting))
    if section.granularity == "channel":
        fixed = sum(math.prod(shapes[name]) for name in outside)
        if section.layer_budget == "macs":
            fixed = sum(used.macs[name] for name in outside)
        return score_channels(network, input_size, shapes, section, seed, fixed=fixed)
    assert section.sparsity is not None
    weights = Weights((*names, *outside))
    scored = ScoredNetwork(
        network,
        weights,
        allocation(shapes, section, classifier=names[-1], dense=ends, device=parameters[names[0]].device),
        start(network, weights, section, seed),
        affine=affine(network, section),
        covered=names[-1:] if section.covers_classes and used.reads[names[-1]] == 1 else (),
    )
    total = sum(math.prod(shape) for shape in shapes.values())
    return Scoring(scored, total_kept(total, section.sparsity), ends)


def affine(network: nn.Module, section: PruneSection) -> tuple[str, ...]:
    """Return the names of BatchNorm's scales and shifts, where the section lets them learn in the search."""
    if section.search.bn_affine == "rest" or not METHODS[section.method].learns:
        return ()
    return tuple(
        f"{name}.{key}"
        for name, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for key, _ in layer.named_parameters()
    )


def score_channels(
    network: nn.Module,
    input_size: tuple[int, int, int],
    shapes: Shapes,
    section: PruneSection,
    seed: int,
    *,
    fixed: int = 0,
) -> Scoring:
    """One score per channel of every coupled group; ``fixed`` is the cost of what is never pruned."""
    coupling = channel_groups(network, input_size)
    channels = {group.name: group.channels for group in coupling.groups}
    granularity = Channels(coupling, shapes)
    begin = start(network, granularity, section, seed)
    device = next(network.parameters()).device
    share = share_channels(coupling, channels, shapes, section, device, fixed=fixed)
    scored = ScoredNetwork(network, granularity, share, begin, affine=affine(network, section))
    return Scoring(scored, None, tuple(name for name, _ in coupling.skipped))


def share_channels(
    coupling: Coupling,
    channels: Mapping[str, int],
    shapes: Shapes,
    section: PruneSection,
    device: torch.device | None = None,
    *,
    fixed: int = 0,
) -> Allocation:
    """Return the allocation of kept channels to groups; ``fixed`` is the cost of unprunable parts."""
    if section.keep_ratio is not None:
        return Fixed(by_ratio(channels, section.keep_ratio))
    assert section.sparsity is not None
    measure: Measure = "macs" if section.layer_budget == "macs" else "weights"
    cost = ChannelCost.of(coupling, shapes, measure, fixed=fixed)
    if "learned" in METHODS[section.method].budgets:
        return ChannelQuotas(
            channels, cost, section.sparsity, compression_weight=section.compression_weight, device=device
        )
    whole = {name: float(count) for name, count in channels.items()}
    return Fixed(within(channels, whole, cost, limit_of(cost, channels, section.sparsity)))


def allocation(
    shapes: Shapes,
    section: PruneSection,
    *,
    classifier: str,
    dense: tuple[str, ...],
    device: torch.device | None = None,
) -> Allocation:
    """Return the allocation of kept weights to layers; its learned parameters are on ``device``."""
    assert section.sparsity is not None
    least = floors(shapes, classifier=classifier if section.covers_classes else None, dense=dense)
    budget = section.layer_budget
    if budget == "uniform":
        return Fixed(uniform(shapes, section.sparsity, least))
    if budget == "erk":
        return Fixed(erk(shapes, section.sparsity, least))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if budget == "global":
        return Global(sizes, section.sparsity, least)
    begin: float | dict[str, float] = 0.1
    if section.quota_start == "erk":
        keep = erk(shapes, section.sparsity, least)
        begin = {name: keep[name] / size for name, size in sizes.items()}
    return Quotas(
        shapes,
        section.sparsity,
        least,
        compression_weight=section.compression_weight,
        start=begin,
        device=device,
    )


def start(
    network: nn.Module, granularity: Granularity, section: PruneSection, seed: int
) -> dict[str, Tensor] | None:
    """Return the scores of an earlier run, or those that the method starts from.

    None for a method that starts from gradients: :func:`gradient_scores` computes them once the stage began.
    """
    parameters = dict(network.named_parameters())
    units = granularity.pool({name: parameters[name].detach() for name in granularity.parameters})
    if section.scores_from is None:
        return None if METHODS[section.method].gradients else initial_scores(section.method, units, seed)
    found = load_tensors(scores_file(section.scores_from))
    if missing := [name for name in units if name not in found]:
        raise InputError(
            f"{section.scores_from} has no scores of {missing[0]}",
            code="scores-missing",
            hint="use a run with the same architecture and granularity",
        )
    return {name: found[name].to(unit.device) for name, unit in units.items()}


def gradient_scores(
    scored: ScoredNetwork, method: str, objective: Objective, batches: Batches, seed: int
) -> dict[str, Tensor]:
    """Compute the scores of a method that starts from gradients, on the first of the training batches."""
    first = itertools.islice(batches, GRADIENT_BATCHES)
    gradients = mask_gradients(scored.network, scored.granularity, first, objective, seed)
    return initial_scores(method, scored.granularity.pool(scored.weights), seed, gradients)


def scores_file(folder: str) -> Path:
    """Return the path of the scores of a run folder's search."""
    return Path(folder) / "search" / "scores.safetensors"


SCORES = "scores.safetensors"
RANGES = "ranges.json"
INT8_SETTINGS = ("opset", "calibration", "calibration_images", "weight_bits")
DENOMINATOR = "weights that multiply activations in a forward pass"


def prune(job: RunContext) -> None:
    """Run search and fine-tuning, after those of every lower sparsity of iterative pruning.

    Raises RecipeError for a recipe that does not prune.
    """
    section = job.recipe.prune
    if section is None:
        raise RecipeError(f"recipe {job.recipe.name!r} has no prune section", code="prune-section-missing")
    begin = dense = job.run.output("pretrain", MODEL)
    for lower in section.steps:
        begin = prune_to(job, section, lower, begin, dense)
    search_mask(job, section, begin)
    finetune(job, section, dense)


def prune_to(job: RunContext, section: PruneSection, lower: float, begin: Path, dense: Path) -> Path:
    """Run one step of iterative pruning in its own run folder under ``steps``; return its network."""
    tuning = section.finetune.model_copy(update={"qat_epochs": 0})
    step = section.model_copy(update={"sparsity": lower, "steps": (), "finetune": tuning})
    recipe = job.recipe.model_copy(
        update={
            "prune": step,
            "model": job.recipe.model.model_copy(update={"checkpoint": str(begin)}),
        }
    )
    job.recorder.note(f"pruning to {lower:g} on the way to {section.sparsity:g}")
    folder = job.run.path / "steps" / f"{lower:g}"
    with Run.open(folder, create=True, command="step", ranks=job.machine.ranks) as run:
        inner = RunContext(run, recipe, job.machine, job.recorder, resume=job.resume, overwrite=job.overwrite)
        search_mask(inner, step, begin)
        finetune(inner, step, dense)
        return run.output("finetune", MODEL)


def search_mask(job: RunContext, section: PruneSection, begin: Path) -> None:
    """Write masks, scores and the masked network into the ``search`` stage; ``begin`` is the input."""
    recipe = job.recipe
    classifier, info = job.load(begin)
    job.machine.precision.to_channels_last(classifier)
    images = job.images(info.preprocessing.size)
    used = weights_on_images(job, classifier, info.preprocessing.size, images)
    names = used.prunable
    count = weight_count(classifier, used)
    inputs = {
        "dense": files.sha256(begin),
        "data": job.data_inputs(images.train, images.validation),
        "threat": recipe.threat.model_dump(),
        "prune": section.model_dump(exclude=_unused(section))
        | {"s2ap": section.perturbs, "budget": section.layer_budget},
        "seed": recipe.seed,
    }
    inputs |= job.machine.pieces
    if section.scores_from is not None:
        inputs["scores_from"] = files.sha256(scores_file(section.scores_from))
    inputs |= origins(method=section.method, loss=section.search.objective.loss)
    # Before the stage begins: a budget that no mask can meet is refused without touching the folder.
    scoring = score(classifier, used, info.preprocessing.size, section, recipe.seed)
    stage = job.stage("search", inputs)
    if stage.state == "finished":
        return
    if count.outside:
        job.recorder.note(count.text)
    if scoring.dense:
        job.recorder.note(f"{len(scoring.dense)} layers stay dense: {', '.join(scoring.dense)}")
    result = find_mask(job, section, scoring.scored, images, stage)
    everywhere = {name: torch.ones_like(p, dtype=torch.bool) for name, p in classifier.named_parameters()}
    masks = {name: result.masks.get(name, everywhere[name]) for name in used.counted}
    achieved = sparsity(masks)
    if count.outside:
        share = sparsity({name: masks[name] for name in names})
        job.recorder.note(f"sparsity {share:.2%} of the weights that can be pruned, {achieved:.2%} of all")
    if job.first:
        info = info.model_copy(update={"stage": "search", "sparsity": achieved, "weights": count})
        save_tensors(stage.folder / MASKS, masks)
        save_tensors(stage.folder / SCORES, result.scores)
        checkpoint.save(stage.folder / MODEL, classifier, info)
        files.write_json(stage.folder / HISTORY, [row.figures() for row in result.history])
    outputs = [stage.folder / name for name in (MASKS, SCORES, MODEL, HISTORY)]
    stage.finish(
        outputs,
        {
            "last": result.history[-1].figures() if result.history else None,
            "method": section.method,
            "budget": section.layer_budget,
            "granularity": section.granularity,
            "kept": kept(masks),
            "kept_requested": scoring.kept,
            "prunable": sum(masks[name].numel() for name in names),
            "sparsity": achieved,
            "denominator": DENOMINATOR,
            "weights": count.model_dump(),
            "dense_layers": list(scoring.dense),
            "layers": [
                {"name": name, "kept": int(masks[name].sum()), "weights": masks[name].numel()}
                for name in used.counted
            ],
            "perturbed_steps": result.perturbed_steps,
        },
    )


def find_mask(
    job: RunContext, section: PruneSection, scored: ScoredNetwork, images: ImageData, stage: Stage
) -> SearchResult:
    """Learn the scores, or use the initial ones if the method does not learn any."""
    method, objective = METHODS[section.method], job.objective(section.search.objective)
    env = job.environment(stage)
    if method.gradients and section.scores_from is None:
        batches = images.train.train_batches(
            section.search.batch_size, seed=env.seed, epoch=-2, augment=True, device=env.device
        )
        scored.start_from(gradient_scores(scored, section.method, objective, batches, env.seed))
    if method.sparse is not None:
        env.ranks.copy_from_first_([*scored.network.state_dict().values()])
        data = TrainingData(images.train, images.validation)
        return train_sparse(scored, method.sparse, data, section.search, objective, env)
    if not method.learns:
        return choose_once(scored, images.train, section.search, objective, env)
    measure = diagnosis(
        images.train,
        objective,
        gamma=section.radius,
        seed=env.seed,
        device=env.device,
        recorder=job.recorder,
        **section.diagnostics.model_dump(),
    )
    env.ranks.copy_from_first_([*scored.network.state_dict().values(), *scored.scores.values()])
    return search(
        scored,
        TrainingData(images.train, images.validation),
        section.search,
        objective,
        env,
        perturbation=perturbation(section),
        diagnose=measure,
    )


def perturbation(section: PruneSection) -> Perturbation | None:
    """Return S2AP's perturbation as the section says, None without."""
    if not section.perturbs:
        return None
    return Perturbation(
        section.radius,
        section.warmup,
        until=section.s2ap_until,
        ball=section.s2ap_ball,
        signs=section.s2ap_signs,
        flip_target=section.flip_target if section.gamma == "auto" else None,
    )


_OF_S2AP = ("gamma", "warmup_epochs", "flip_target", "s2ap_ball", "s2ap_signs", "s2ap_epochs")


def _unused(section: PruneSection) -> set[str]:
    """Return the keys of the section that the search does not read; changing them keeps its result."""
    unread = {"finetune", "steps", *(() if section.perturbs else _OF_S2AP)}
    return unread if section.allow_unpruned else unread | {"allow_unpruned"}


def finetune(job: RunContext, section: PruneSection, dense: Path) -> None:
    """Write the pruned, fine-tuned network into the ``finetune`` stage; ``dense`` is the teacher, if any."""
    recipe = job.recipe
    classifier, info, path = job.classifier("search")
    images = job.images(info.preprocessing.size)
    masks_file = job.run.output("search", MASKS)
    distillation, rounded_epochs = section.finetune.distillation, section.finetune.qat_epochs
    inputs = {
        "search": files.sha256(path),
        "masks": files.sha256(masks_file),
        "data": job.data_inputs(images.train, images.validation),
        "threat": recipe.threat.model_dump(),
        "finetune": section.finetune.model_dump(exclude=None if rounded_epochs else {"qat_epochs"}),
        "seed": recipe.seed,
    }
    if rounded_epochs:
        inputs["int8"] = {name: getattr(recipe.export, name) for name in INT8_SETTINGS}
    alone = METHODS[section.method].sparse == "admm"
    if distillation.weight > 0 or alone:
        inputs["teacher"] = files.sha256(dense)
    inputs |= {**origins(loss=section.finetune.objective.loss), **job.machine.pieces}
    stage = job.stage("finetune", inputs)
    if stage.state == "finished":
        return
    masks = {name: mask.bool() for name, mask in load_tensors(masks_file).items()}
    outcome = {
        "kept": kept(masks),
        "sparsity": sparsity(masks),
        "num_classes": info.num_classes,
        IMAGES: len(validation_sample(images.validation, recipe.seed)),
    }
    info = info.model_copy(update={"stage": "finetune", "sparsity": sparsity(masks)})
    if not METHODS[section.method].finetunes:
        if job.first:
            checkpoint.save(stage.folder / MODEL, classifier, info)
        job.recorder.note(f"{section.method} does not fine-tune: its weights keep their random values")
        stage.finish([stage.folder / MODEL], {**outcome, "best": None, "nonzero": nonzero(classifier, masks)})
        return
    teacher: Teacher | None = None
    if alone:
        teacher = SelfDistillation(job.load(dense)[0], list(masks))
    elif distillation.weight > 0:
        teacher = Teacher(
            job.load(dense)[0], weight=distillation.weight, temperature=distillation.temperature
        )
    result = train(
        classifier,
        TrainingData(images.train, images.validation),
        section.finetune,
        job.objective(section.finetune.objective),
        job.environment(stage),
        stage="finetune",
        masks=masks,
        teacher=teacher,
        quantization=_rounding(job, rounded_epochs, info) if rounded_epochs else None,
    )
    outputs = [stage.folder / MODEL, stage.folder / HISTORY]
    if job.first:
        checkpoint.save(stage.folder / MODEL, classifier, info)
        files.write_json(stage.folder / HISTORY, [row.figures() for row in result.history])
    if rounded_epochs:
        outputs.append(stage.folder / RANGES)
        if job.first:
            ranges = {name: limits.tolist() for name, limits in sorted(result.ranges.items())}
            files.write_json(
                stage.folder / RANGES, {"weight_bits": recipe.export.weight_bits, "ranges": ranges}
            )
    best = result.history[result.best_epoch - 1].figures()
    stage.finish(
        outputs,
        {**outcome, "best": best, "nonzero": nonzero(classifier, masks)},
    )


def _rounding(job: RunContext, epochs: int, info: CheckpointInfo) -> Quantization:
    """Return the rounding of the last ``epochs`` of fine-tuning: that of the run's int8 file."""
    from s2ap_deploy.onnx_export.quantization_aware import QuantizationAware

    return QuantizationAware(epochs, calibration_images(job, info), job.recipe.export)


def calibration_images(job: RunContext, info: CheckpointInfo) -> NDArray[np.float32]:
    """Return calibration images from the training split, stratified by class, always the same ones."""
    train_split = job.images(info.preprocessing.size).train
    chosen = choose(train_split.labels, job.recipe.export.calibration_images, seed=0)
    pixels: NDArray[np.float32] = train_split.subset(chosen).tensors()[0].numpy()
    return pixels


def nonzero(network: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Count masked weights that are not zero: at most as many as the masks keep."""
    return sum(int((network.get_parameter(name) != 0).sum()) for name in masks)
