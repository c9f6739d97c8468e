"""The stage that trains the layers of the delivered plan, at the same bytes."""

from dataclasses import dataclass
from pathlib import Path

from quantizer.conversion.checkpoint import read_weights
from quantizer.conversion.pack import pack_model
from quantizer.durable import PartStore
from quantizer.packed.weight import QuantizedWeight
from quantizer.running.quality import Quality
from quantizer.training import blockwise, distill
from service.stages.checkpoint import store_checkpoint
from service.stages.clock import Clock
from service.stages.context import RunContext
from service.stages.evaluation import evaluate
from service.stages.recipe import MODEL
from service.stages.selection import is_nearer
from service.stages.training_phases import Phase
from service.stages.training_task import TrainingTask
from service.stages.windows import Windows


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


def train_and_compare(
    context: RunContext, task: TrainingTask, untrained: Quality, clock: Clock
) -> TrainingResult | None:
    """Train a checkpoint, and compare it with the untrained one on held-out windows.

    Args:
        context: gives the model and the machine.
        task: how it is trained.
        untrained: quality of the untrained checkpoint on the task's held-out windows.
        clock: measures the time of both steps.

    Returns:
        Both checkpoints; None if nothing is trained.
    """
    if not task.phases:
        return None
    with clock.time("tune"):
        trained = train(context, task)
    with clock.time("guard: tuned"):
        scores = evaluate(context, {"tuned": trained}, task.held_out, "compare: trained", fast=True)
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
        store_checkpoint(model, context.model, task.plan, folder / "model")

    return context.store.get(task.key(context), make) / "model"


def _train_phase(
    context: RunContext,
    training: Windows,
    phase: Phase,
    weights: dict[str, QuantizedWeight],
    parts: PartStore,
) -> dict[str, QuantizedWeight]:
    runner = context.load()
    windows = context.on_device(training)
    progress = context.reporter.step(f"tune: {phase.kind}")
    spec = phase.spec
    if phase.kind == MODEL:
        return distill.distill(runner, weights, windows, spec, parts, progress)
    blocks = blockwise.train_blocks(runner, weights, windows, spec, parts, progress)
    return {name: weight for block in blocks for name, weight in block.weights.items()}
