"""Prune: search the mask, then train what it kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.data.datasets import ImageData
from s2ap_deploy.errors import RecipeError
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.models.classifier import prunable
from s2ap_deploy.pruning.diagnosis import diagnosis
from s2ap_deploy.pruning.masks import kept, load_tensors, save_tensors, sparsity
from s2ap_deploy.pruning.scores import ScoredNetwork
from s2ap_deploy.pruning.search import Perturbation, SearchResult, choose_once, search
from s2ap_deploy.recipe.methods import METHODS, origins
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.runs.folder import MASKS, MODEL, Run
from s2ap_deploy.runs.stage import Stage
from s2ap_deploy.stages.context import HISTORY, RunContext
from s2ap_deploy.stages.scoring import gradient_scores, score, scores_file
from s2ap_deploy.training.distillation import Teacher
from s2ap_deploy.training.loop import TrainingData
from s2ap_deploy.training.train import train

SCORES = "scores.safetensors"
DENOMINATOR = "weights of the convolutions and linear layers that a forward pass uses"


def prune(job: RunContext) -> None:
    """Search and fine-tuning, after those of every lower sparsity on the way there.

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
    """One step of iterative pruning, in a run folder of its own under ``steps``; returns its network."""
    step = section.model_copy(update={"sparsity": lower, "steps": ()})
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
    """Leave masks, scores and the masked network in the ``search`` stage; ``begin`` is the network before."""
    recipe = job.recipe
    classifier, info = job.load(begin)
    job.machine.precision.to_channels_last(classifier)
    names = prunable(classifier, info.preprocessing.size)
    images = job.images(info.preprocessing.size)
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
    scoring = score(classifier, names, info.preprocessing.size, section, recipe.seed)
    stage = job.stage("search", inputs)
    if stage.state == "finished":
        return
    if scoring.dense:
        job.recorder.note(f"{len(scoring.dense)} layers stay dense: {', '.join(scoring.dense)}")
    result = find_mask(job, section, scoring.scored, images, stage)
    everywhere = {name: torch.ones_like(p, dtype=torch.bool) for name, p in classifier.named_parameters()}
    masks = {name: result.masks.get(name, everywhere[name]) for name in names}
    achieved = sparsity(masks)
    if job.first:
        info = info.model_copy(update={"stage": "search", "sparsity": achieved})
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
            "prunable": sum(mask.numel() for mask in masks.values()),
            "sparsity": achieved,
            "denominator": DENOMINATOR,
            "dense_layers": list(scoring.dense),
            "layers": [
                {"name": name, "kept": int(masks[name].sum()), "weights": masks[name].numel()}
                for name in names
            ],
            "perturbed_steps": result.perturbed_steps,
        },
    )


def find_mask(
    job: RunContext, section: PruneSection, scored: ScoredNetwork, images: ImageData, stage: Stage
) -> SearchResult:
    """Learn the scores, or take them as they are where the method does not learn any."""
    method, objective = METHODS[section.method], job.objective(section.search.objective)
    env = job.environment(stage)
    if method.gradients and section.scores_from is None:
        batches = images.train.train_batches(
            section.search.batch_size, seed=env.seed, epoch=-2, augment=True, device=env.device
        )
        scored.start_from(gradient_scores(scored, section.method, objective, batches, env.seed))
    if not method.learns:
        return choose_once(scored, images.train, section.search.batch_size, objective, env)
    measure = diagnosis(
        images.train,
        objective,
        gamma=section.gamma,
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
        perturbation=Perturbation(section.gamma, section.warmup) if section.perturbs else None,
        diagnose=measure,
    )


def _unused(section: PruneSection) -> set[str]:
    """What of the section the search does not read: a changed value there is no other search."""
    return {"finetune", "steps", *(() if section.perturbs else ("gamma", "warmup_epochs"))}


def finetune(job: RunContext, section: PruneSection, dense: Path) -> None:
    """Leave the pruned, retrained network in the ``finetune`` stage; ``dense`` is whom it may distil from."""
    recipe = job.recipe
    classifier, info, path = job.classifier("search")
    images = job.images(info.preprocessing.size)
    masks_file = job.run.output("search", MASKS)
    distillation = section.finetune.distillation
    inputs = {
        "search": files.sha256(path),
        "masks": files.sha256(masks_file),
        "data": job.data_inputs(images.train, images.validation),
        "threat": recipe.threat.model_dump(),
        "finetune": section.finetune.model_dump(),
        "seed": recipe.seed,
    }
    if distillation.weight > 0:
        inputs["teacher"] = files.sha256(dense)
    inputs |= {**origins(loss=section.finetune.objective.loss), **job.machine.pieces}
    stage = job.stage("finetune", inputs)
    if stage.state == "finished":
        return
    masks = {name: mask.bool() for name, mask in load_tensors(masks_file).items()}
    outcome = {"kept": kept(masks), "sparsity": sparsity(masks)}
    info = info.model_copy(update={"stage": "finetune", "sparsity": sparsity(masks)})
    if not METHODS[section.method].finetunes:
        if job.first:
            checkpoint.save(stage.folder / MODEL, classifier, info)
        job.recorder.note(f"{section.method} does not fine-tune: its weights stay as they were drawn")
        stage.finish([stage.folder / MODEL], {**outcome, "best": None, "nonzero": nonzero(classifier, masks)})
        return
    teacher = None
    if distillation.weight > 0:
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
    )
    if job.first:
        checkpoint.save(stage.folder / MODEL, classifier, info)
        files.write_json(stage.folder / HISTORY, [row.figures() for row in result.history])
    best = result.history[result.best_epoch - 1].figures()
    stage.finish(
        [stage.folder / MODEL, stage.folder / HISTORY],
        {**outcome, "best": best, "nonzero": nonzero(classifier, masks)},
    )


def nonzero(network: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Masked weights that are not zero: at most as many as the masks keep."""
    return sum(int((network.get_parameter(name) != 0).sum()) for name in masks)
