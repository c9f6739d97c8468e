"""What is trained, on which windows and how."""

from dataclasses import dataclass
from pathlib import Path

from quantizer.plans.plan import Plan
from quantizer.texts.text import TextSpec
from quantizer.training import blockwise, distill
from service.request.effort import Effort
from service.request.request import RunRequest
from service.stages.calibration_windows import windows_besides
from service.stages.checkpoint import checkpoint_digest
from service.stages.context import RunContext
from service.stages.recipe import DEFAULT_RECIPE, Recipe
from service.stages.training_phases import Phase, phases_for
from service.stages.windows import Windows
from service.storage.stage_store import StageKey


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
        held_out: windows that are not trained on, on which the result is compared with the
            untrained checkpoint.
        phases: how; none if it is not trained.
    """

    checkpoint: Path
    plan: Plan
    windows: Windows
    held_out: Windows
    phases: tuple[Phase, ...]

    def key(self, context: RunContext) -> StageKey:
        """Return what the trained checkpoint is stored under; held-out windows do not matter."""
        inputs = {
            "model": context.model.sha256,
            "checkpoint": checkpoint_digest(self.checkpoint),
            "windows": self.windows.sha256,
            "phases": [phase.to_json() for phase in self.phases],
            "method": [blockwise.METHOD, distill.METHOD],
            "machine": context.machine.inputs(),
        }
        return StageKey("tuned", inputs)


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
    return TrainingTask(checkpoint, plan, windows, request.held_out, phases)


def training_windows(
    context: RunContext, text: TextSpec, phases: tuple[Phase, ...], held_out: Windows
) -> Windows:
    """Return windows to train on.

    They are windows of the calibration text without the held-out ones, as many as one phase sees at
    most.
    """
    seen = max(phase.spec.steps * phase.spec.batch for phase in phases)
    return windows_besides(context, text, held_out, seen)
