"""Prune: search the mask, then train what it kept."""

from __future__ import annotations

from s2ap_deploy import files
from s2ap_deploy.errors import RecipeError
from s2ap_deploy.models import checkpoint
from s2ap_deploy.models.classifier import prunable
from s2ap_deploy.pipeline.job import HISTORY, MODEL, Job
from s2ap_deploy.pruning.budgets import BUDGETS
from s2ap_deploy.pruning.masks import kept, sparsity
from s2ap_deploy.pruning.search import Perturbation, search
from s2ap_deploy.pruning.tensors import load_tensors, save_tensors
from s2ap_deploy.recipe.schema import PruneSection
from s2ap_deploy.robust.training import train

MASKS = "masks.safetensors"
SCORES = "scores.safetensors"


def prune(job: Job) -> None:
    """Both stages in turn. Raises RecipeError for a recipe that does not prune."""
    section = job.recipe.prune
    if section is None:
        raise RecipeError(f"recipe {job.recipe.name!r} has no prune section")
    search_mask(job, section)
    finetune(job, section)


def search_mask(job: Job, section: PruneSection) -> None:
    """Leave masks, scores and the masked network in the ``search`` stage."""
    recipe = job.recipe
    classifier, info, path = job.classifier("pretrain")
    names = prunable(classifier, info.preprocessing.size)
    parameters = dict(classifier.named_parameters())
    keep = BUDGETS[section.budget]({name: tuple(parameters[name].shape) for name in names}, section.sparsity)
    images = job.images(info.preprocessing.size)
    stage = job.stage(
        "search",
        {
            "dense": files.sha256(path),
            "data": job.data_inputs(images.train, images.validation),
            "threat": recipe.threat.model_dump(),
            "prune": section.model_dump(exclude=_unused(section)),
            "seed": recipe.seed,
        },
    )
    if stage.state == "finished":
        return
    result = search(
        classifier,
        names,
        keep,
        images.train,
        images.validation,
        objective=job.objective(section.search.objective),
        epochs=section.search.epochs,
        learning_rate=section.search.learning_rate,
        momentum=section.search.momentum,
        batch_size=section.search.batch_size,
        perturbation=Perturbation(section.gamma, section.warmup) if section.s2ap else None,
        seed=recipe.seed,
        device=job.machine.device,
        snapshots=stage,
        recorder=job.recorder,
    )
    achieved = sparsity(result.masks)
    save_tensors(stage.folder / MASKS, result.masks)
    save_tensors(stage.folder / SCORES, result.scores)
    checkpoint.save(
        stage.folder / MODEL, classifier, info.model_copy(update={"stage": "search", "sparsity": achieved})
    )
    files.write_json(stage.folder / HISTORY, [row.figures() for row in result.history])
    outputs = [stage.folder / name for name in (MASKS, SCORES, MODEL, HISTORY)]
    stage.finish(
        outputs,
        {
            "last": result.history[-1].figures(),
            "kept": kept(result.masks),
            "prunable": sum(mask.numel() for mask in result.masks.values()),
            "sparsity": achieved,
            "kept_per_layer": keep,
            "perturbed_steps": result.perturbed_steps,
        },
    )


def _unused(section: PruneSection) -> set[str]:
    """What of the section the search does not read: a changed value there is no other search."""
    return {"finetune"} if section.s2ap else {"finetune", "gamma", "warmup_epochs"}


def finetune(job: Job, section: PruneSection) -> None:
    """Leave the pruned, retrained network in the ``finetune`` stage."""
    recipe = job.recipe
    classifier, info, path = job.classifier("search")
    images = job.images(info.preprocessing.size)
    masks_file = job.run.output("search", MASKS)
    stage = job.stage(
        "finetune",
        {
            "search": files.sha256(path),
            "masks": files.sha256(masks_file),
            "data": job.data_inputs(images.train, images.validation),
            "threat": recipe.threat.model_dump(),
            "finetune": section.finetune.model_dump(),
            "seed": recipe.seed,
        },
    )
    if stage.state == "finished":
        return
    masks = {name: mask.bool() for name, mask in load_tensors(masks_file).items()}
    result = train(
        classifier,
        images.train,
        images.validation,
        stage="finetune",
        objective=job.objective(section.finetune.objective),
        epochs=section.finetune.epochs,
        learning_rate=section.finetune.learning_rate,
        momentum=section.finetune.momentum,
        weight_decay=section.finetune.weight_decay,
        batch_size=section.finetune.batch_size,
        seed=recipe.seed,
        device=job.machine.device,
        snapshots=stage,
        recorder=job.recorder,
        masks=masks,
    )
    checkpoint.save(
        stage.folder / MODEL,
        classifier,
        info.model_copy(update={"stage": "finetune", "sparsity": sparsity(masks)}),
    )
    files.write_json(stage.folder / HISTORY, [row.figures() for row in result.history])
    parameters = dict(classifier.named_parameters())
    nonzero = sum(int((parameters[name] != 0).sum()) for name in masks)
    stage.finish(
        [stage.folder / MODEL, stage.folder / HISTORY],
        {
            "best": result.history[result.best_epoch - 1].figures(),
            "kept": kept(masks),
            "nonzero": nonzero,
            "sparsity": sparsity(masks),
        },
    )
