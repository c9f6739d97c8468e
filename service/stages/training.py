"""The stage that trains the layers of the delivered plan, at the same bytes."""

from dataclasses import dataclass
from pathlib import Path

from quantizer.conversion.checkpoint import pack_model, read_weights, save_checkpoint
from quantizer.durable import PartStore
from quantizer.importance.fisher import squared_gradients
from quantizer.importance.saliency import find_salient_groups
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import Plan
from quantizer.running.moments import Calibration
from quantizer.running.quality import Quality
from quantizer.running.structure import find_layers
from quantizer.texts.text import TextSpec
from quantizer.training import blockwise, distill
from service.request.effort import Effort
from service.request.request import RunRequest
from service.stages.calibration_windows import windows_besides
from service.stages.checkpoint import checkpoint_digest
from service.stages.clock import Clock
from service.stages.context import RunContext
from service.stages.evaluation import evaluate
from service.stages.recipe import DEFAULT_RECIPE, MODEL, Recipe
from service.stages.selection import is_nearer
from service.stages.training_phases import Phase, phases_for
from service.stages.windows import Windows
from service.storage.stage_store import StageKey

SALIENCY_WINDOWS, FISHER_WINDOWS = 8, 32
"""Windows on which salient groups, and the importance of weights, are measured."""


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """What a user decides about training.

    Attributes:
        recipe: how.
        effort: how much.
        text: the calibration text; all its windows are trained on, except the held-out ones.
        held_out: windows on which the result is compared with the untrained checkpoint.
        seed: of everything random.
    """

    recipe: Recipe
    effort: Effort
    text: TextSpec
    held_out: Windows
    seed: int

    @classmethod
    def for_run(cls, request: RunRequest, held_out: Windows) -> "TrainingRequest":
        """Return how a run trains the plan that it delivers."""
        text = request.amounts.calibration
        return cls(DEFAULT_RECIPE, request.effort, text, held_out, request.seed)


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """Everything that decides a trained checkpoint, beside the context.

    Attributes:
        checkpoint: folder of the plan's checkpoint that training starts from.
        plan: its plan.
        windows: what it is trained on.
        phases: how; none if it is not trained.
    """

    checkpoint: Path
    plan: Plan
    windows: Windows
    phases: tuple[Phase, ...]

    def key(self, context: RunContext) -> StageKey:
        """Return what the trained checkpoint is stored under."""
        inputs = {
            "model": context.model.sha256,
            "checkpoint": checkpoint_digest(self.checkpoint),
            "windows": self.windows.sha256,
            "phases": [phase.to_json() for phase in self.phases],
            "method": [blockwise.METHOD, distill.METHOD],
            "machine": context.machine.inputs(),
        }
        return StageKey("tuned", inputs)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A trained checkpoint beside the untrained one.

    Attributes:
        untrained: folder of the checkpoint that training started from.
        trained: folder of the trained checkpoint.
        untrained_quality: quality of the former on held-out windows.
        trained_quality: quality of the latter on the same windows.
    """

    untrained: Path
    trained: Path
    untrained_quality: Quality
    trained_quality: Quality

    @property
    def is_nearer(self) -> bool:
        """Whether the trained checkpoint is nearer to the original than the untrained one."""
        return is_nearer(self.trained_quality, self.untrained_quality)

    @property
    def nearer(self) -> Path:
        """Folder of the checkpoint that is nearer to the original."""
        return self.trained if self.is_nearer else self.untrained


def training_task(
    context: RunContext, plan: Plan, checkpoint: Path, request: TrainingRequest
) -> TrainingTask:
    """Return everything that decides how a plan's checkpoint is trained on this machine."""
    phases = phases_for(
        request.effort,
        plan.without_embeddings.layers,
        context.machine,
        context.batch,
        request.seed,
        request.recipe,
    )
    windows = request.held_out
    if phases:
        windows = training_windows(context, request.text, phases, request.held_out)
    return TrainingTask(checkpoint, plan, windows, phases)


def training_windows(
    context: RunContext, text: TextSpec, phases: tuple[Phase, ...], held_out: Windows
) -> Windows:
    """Return windows to train on.

    They are windows of the calibration text without the held-out ones, as many as one phase sees at
    most.
    """
    seen = max(phase.spec.steps * phase.spec.batch for phase in phases)
    return windows_besides(context, text, held_out, seen)


def train_and_compare(
    context: RunContext, task: TrainingTask, untrained: Quality, held_out: Windows, clock: Clock
) -> TrainingResult | None:
    """Train a checkpoint, and compare it with the untrained one on held-out windows.

    Args:
        context: gives the model and the machine.
        task: how it is trained.
        untrained: quality of the untrained checkpoint on the held-out windows.
        held_out: windows that are not trained on.
        clock: measures the time of both steps.

    Returns:
        Both checkpoints; None if nothing is trained.
    """
    if not task.phases:
        return None
    with clock.time("tune"):
        trained = train(context, task)
    with clock.time("guard: tuned"):
        scores = evaluate(context, {"tuned": trained}, held_out, "compare: trained", fast=True)
    return TrainingResult(task.checkpoint, trained, untrained, scores["tuned"])


def train(context: RunContext, task: TrainingTask) -> Path:
    """Train the layers of a checkpoint, or continue where this was interrupted.

    Returns:
        The folder of the trained checkpoint, which has the same bytes.
    """

    def make(folder: Path, parts: PartStore) -> None:
        stored = read_weights(task.checkpoint, task.plan)
        weights = {layer.name: stored[layer.name] for layer in task.plan.without_embeddings.layers}
        for phase in task.phases:
            weights = _train_phase(context, task.windows, phase, weights, parts)
        model = context.load().model
        pack_model(model, task.plan, stored | weights)
        save_checkpoint(model, context.model, task.plan, folder / "model")

    return context.store.get(task.key(context), make) / "model"


def _train_phase(
    context: RunContext,
    training: Windows,
    phase: Phase,
    weights: dict[str, QuantizedWeight],
    parts: PartStore,
) -> dict[str, QuantizedWeight]:
    runner = context.load()
    layers = find_layers(runner.model)
    windows = context.on_device(training)
    progress = context.reporter.step(f"tune: {phase.kind}")
    spec = phase.spec
    if phase.kind == MODEL:
        calibration = Calibration(windows[:SALIENCY_WINDOWS], spec.batch)
        chosen = find_salient_groups(runner, layers, weights, calibration, spec.salient, spec.seed)
        return distill.distill(runner, weights, windows, spec, parts, progress, salient=chosen)
    penalty = None
    if spec.penalty:
        squared = squared_gradients(runner, layers, windows[:FISHER_WINDOWS])
        penalty = blockwise.Penalty(spec.penalty, squared)
    blocks = blockwise.train_blocks(
        runner, layers, weights, windows, spec, parts, progress, penalty
    )
    return {name: weight for block in blocks for name, weight in block.weights.items()}
