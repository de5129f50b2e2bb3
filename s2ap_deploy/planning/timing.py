"""How long each stage of a run takes, from a few of its steps."""

from __future__ import annotations

from s2ap_deploy.data.sampling import choose
from s2ap_deploy.data.splits import train_steps
from s2ap_deploy.evaluation.autoattack.cost import expected_cost
from s2ap_deploy.evaluation.autoattack.scheduler import default_block_size
from s2ap_deploy.planning.cost_estimate import StepCost, search_cost, training_cost
from s2ap_deploy.planning.scene import ModelAndData
from s2ap_deploy.pruning.search import RECALIBRATION_BATCHES
from s2ap_deploy.recipe.methods import METHODS
from s2ap_deploy.recipe.prune_section import PruneSection
from s2ap_deploy.recipe.train_section import TrainSection
from s2ap_deploy.stages.context import RunContext
from s2ap_deploy.stages.execution import ExecutionConfig
from s2ap_deploy.training.schedule import VALIDATION_IMAGES

VALIDATION_STEPS = 10


class Timing:
    """How long a stage takes; steps of one kind are timed once for a whole sweep."""

    def __init__(self, machine: ExecutionConfig) -> None:
        self.machine = machine
        self._costs: dict[object, StepCost] = {}
        self._attacks: dict[object, float] = {}

    def pretrain(self, scene: ModelAndData, job: RunContext, section: TrainSection) -> float | None:
        """Seconds of training the dense network."""
        return self._train(scene, job, section)

    def finetune(self, scene: ModelAndData, job: RunContext, section: PruneSection) -> float | None:
        """Seconds of fine-tuning, after each of the steps on the way."""
        if not METHODS[section.method].finetunes:
            return 0.0
        seconds = self._train(scene, job, section.finetune)
        return None if seconds is None else seconds * (1 + len(section.steps))

    def search(self, scene: ModelAndData, job: RunContext, section: PruneSection) -> float | None:
        """Seconds of the search, or of choosing once; after each of the steps on the way."""
        if scene.images is None:
            return None
        part, objective = section.search, job.objective(section.search.objective)
        steps = train_steps(len(scene.images.train), part.batch_size)
        rest = self._search(scene, job, section, perturbed=False)
        recalibration = (
            min(steps, RECALIBRATION_BATCHES // 2) * rest.attack_step * part.batch_size * objective.steps
        )
        if not METHODS[section.method].learns:
            return recalibration * (1 + len(section.steps))
        seconds = part.epochs * steps * rest.step
        if section.perturbs:
            top = self._search(scene, job, section, perturbed=True)
            seconds += (part.epochs - section.warmup) * steps * max(top.step - rest.step, 0.0)
        seconds += part.epochs * self._validation(scene, rest)
        told = section.diagnostics
        if told.every:
            # Lanczos differentiates twice, three passes per product; each direction is a forward pass or two.
            passes = objective.steps + 3 * told.iterations + told.directions
            seconds += part.epochs // told.every * told.images * passes * rest.attack_step
        return (seconds + recalibration) * (1 + len(section.steps))

    def certify(self, scene: ModelAndData, job: RunContext) -> float | None:
        """At most so many seconds for one network."""
        if scene.images is None:
            return None
        section, test = job.recipe.certify, scene.images.test
        key = (scene.size, section.model_dump_json(), str(job.recipe.threat))
        if key not in self._attacks:
            chosen = choose(test.labels, section.n, seed=section.sample_seed)
            images, _ = test.subset(chosen).tensors()
            self._attacks[key] = expected_cost(
                scene.classifier.to(self.machine.device).eval(),
                images,
                threat=job.recipe.threat,
                device=self.machine.device,
                block_size=default_block_size(images, self.machine.device),
                workers=self.machine.workers,
                version=section.version,
            ).seconds
        return self._attacks[key]

    def _train(self, scene: ModelAndData, job: RunContext, section: TrainSection) -> float | None:
        if scene.images is None:
            return None
        objective = job.objective(section.objective)
        key = ("train", str(job.recipe.threat), section.objective.model_dump_json(), section.batch_size)
        if key not in self._costs:
            self._costs[key] = training_cost(
                scene.classifier,
                scene.size,
                scene.classes,
                objective,
                section.batch_size,
                self.machine.device,
            )
        cost, steps = self._costs[key], train_steps(len(scene.images.train), section.batch_size)
        seconds = section.epochs * (steps * cost.step + self._validation(scene, cost))
        if section.awp_gamma > 0:
            seconds += (
                (section.epochs - section.awp_warmup_epochs) * steps * cost.attack_step * section.batch_size
            )
        return seconds

    def _search(
        self, scene: ModelAndData, job: RunContext, section: PruneSection, *, perturbed: bool
    ) -> StepCost:
        kind = section.model_copy(update={"sparsity": None, "steps": ()}).model_dump_json()
        key = ("search", str(job.recipe.threat), kind, perturbed)
        if key not in self._costs:
            objective = job.objective(section.search.objective)
            self._costs[key] = search_cost(
                scene.classifier,
                scene.size,
                scene.classes,
                section,
                objective,
                self.machine.device,
                perturbed=perturbed,
            )
        return self._costs[key]

    def _validation(self, scene: ModelAndData, cost: StepCost) -> float:
        """PGD-10 on the validation sample, once per epoch."""
        assert scene.images is not None
        return min(len(scene.images.validation), VALIDATION_IMAGES) * VALIDATION_STEPS * cost.attack_step
