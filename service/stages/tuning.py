"""The stage in which the delivered plan's layers are trained."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from quantizer.conversion.checkpoint import pack_model, read_weights, save_checkpoint
from quantizer.durable import PartStore
from quantizer.importance.fisher import squared_gradients
from quantizer.importance.saliency import find_salient_groups
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import LayerSpec, Plan
from quantizer.running.moments import Calibration
from quantizer.running.structure import find_layers
from quantizer.texts.text import TextSpec
from quantizer.training import blockwise, distill
from quantizer.training.descent import TrainingSpec
from service.request.effort import Effort
from service.stages.checkpoint import checkpoint_digest
from service.stages.evaluation import evaluation
from service.stages.guard import nearer
from service.stages.machine import Machine
from service.stages.progress import Reporter
from service.stages.recipe import BLOCKS, MODEL, SCALES, USUAL, Recipe
from service.stages.windows import Windows, windows_without
from service.storage.stage_store import StageKey, StageStore

TRAINING_BYTES = 16
"""Latent code, gradient and two moments of each weight whose code is trained, in float32."""
MEMORY_SHARE = 0.5
"""How much of the machine's memory training may take beside the model itself.

The rest is for what a backward pass keeps.
"""

SALIENCY_WINDOWS, FISHER_WINDOWS = 8, 32
"""Windows that salient groups, and weights that matter, are found on."""
GUARD_BATCH = 4
"""Windows of the guard that are scored at once."""

CODE_RATE, SCALE_RATE, ADAPTER_RATE = 2e-3, 1e-2, 1e-2
"""Learning rates; tests/benchmarks/LOG.md has what was compared."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One piece of training.

    Attributes:
        kind: `blocks`, one block after another, or `model`, end to end.
        spec: how.
    """

    kind: str
    spec: TrainingSpec

    def to_json(self) -> dict[str, Any]:
        """Return the phase as JSON values."""
        return {"kind": self.kind} | asdict(self.spec) | {"precision": str(self.spec.precision)}


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """What a user settles about training.

    Attributes:
        recipe: how.
        effort: how much.
        text: the calibration text; all its windows are trained on, but those of the guard.
        guard: windows that the result is judged by.
        batch: windows that one step sees.
        seed: of everything random.
    """

    recipe: Recipe
    effort: Effort
    text: TextSpec
    guard: Windows
    batch: int
    seed: int


@dataclass(frozen=True, slots=True)
class TuneTask:
    """All that decides a trained checkpoint.

    Attributes:
        model: the original.
        checkpoint: folder of the plan's checkpoint that training starts from.
        plan: its plan.
        windows: what it is trained on.
        phases: how.
        machine: where.
    """

    model: ModelFolder
    checkpoint: Path
    plan: Plan
    windows: Windows
    phases: tuple[Phase, ...]
    machine: Machine

    @property
    def key(self) -> StageKey:
        """What the trained checkpoint is kept under."""
        inputs = {
            "model": self.model.sha256,
            "checkpoint": checkpoint_digest(self.checkpoint),
            "windows": self.windows.sha256,
            "phases": [phase.to_json() for phase in self.phases],
            "method": [blockwise.METHOD, distill.METHOD],
            "machine": self.machine.inputs(),
        }
        return StageKey("tuned", inputs)


def choose_phases(
    effort: Effort,
    layer_weights: int,
    memory_bytes: int,
    batch: int,
    precision: torch.dtype,
    seed: int,
) -> tuple[Phase, ...]:
    """Return how an effort trains a model of this size on a machine of this memory.

    Codes and scales are trained end to end where memory allows; else block by block, and scales
    alone end to end.
    """
    if not effort.steps:
        return ()
    usual = partial(
        TrainingSpec,
        batch=batch,
        code_rate=CODE_RATE,
        adapter_rate=ADAPTER_RATE,
        precision=precision,
        seed=seed,
    )
    whole = usual(effort.steps, trained="codes", scale_rate=SCALE_RATE)
    if TRAINING_BYTES * layer_weights <= MEMORY_SHARE * memory_bytes:
        return (Phase(MODEL, whole),)
    blocks = usual(effort.block_steps, trained="codes", scale_rate=SCALE_RATE)
    scales = usual(effort.steps, **SCALES)
    return (Phase(BLOCKS, blocks), Phase(MODEL, scales))


def phases_for(
    effort: Effort,
    layers: Sequence[LayerSpec],
    machine: Machine,
    batch: int,
    seed: int,
    recipe: Recipe = USUAL,
) -> tuple[Phase, ...]:
    """Return how a model's layers are trained on this machine."""
    weights = sum(layer.weights for layer in layers)
    on_card = machine.device.startswith("cuda")
    memory_bytes = (
        torch.cuda.get_device_properties(machine.device).total_memory
        if on_card
        else psutil.virtual_memory().total
    )
    phases = choose_phases(effort, weights, memory_bytes, batch, machine.precision, seed)
    if not phases or recipe.kind is None:
        return phases
    steps = effort.block_steps if recipe.kind == BLOCKS else effort.steps
    return (Phase(recipe.kind, replace(phases[0].spec, steps=steps, **recipe.changes)),)


def tune_task(
    store: StageStore,
    model: ModelFolder,
    plan: Plan,
    checkpoint: Path,
    request: TuneRequest,
    machine: Machine,
) -> TuneTask:
    """Return all that decides how a plan's checkpoint is trained on this machine.

    No phases if it is not.
    """
    phases = phases_for(
        request.effort,
        plan.without_embeddings.layers,
        machine,
        request.batch,
        request.seed,
        request.recipe,
    )
    windows = (
        training_windows(store, model, request.text, phases, request.guard)
        if phases
        else request.guard
    )
    return TuneTask(model, checkpoint, plan, windows, phases, machine)


def training_windows(
    store: StageStore, model: ModelFolder, text: TextSpec, phases: tuple[Phase, ...], guard: Windows
) -> Windows:
    """Return windows to train on.

    Of all windows of the calibration text but those of the guard, as many as are seen at all.
    """
    return windows_without(
        store, model, text, guard, max(phase.spec.steps * phase.spec.batch for phase in phases)
    )


def tune(store: StageStore, task: TuneTask, reporter: Reporter) -> Path:
    """Train the layers of a checkpoint, or go on where it was left.

    Return the folder of the trained one, of the same bytes.
    """

    def make(folder: Path, parts: PartStore) -> None:
        stored = read_weights(task.checkpoint, task.plan)
        forms = {layer.name: stored[layer.name] for layer in task.plan.without_embeddings.layers}
        for phase in task.phases:
            forms = _train(task, phase, forms, parts, reporter)
        loaded = load_model(task.model, task.machine.dtype, task.machine.device)
        pack_model(loaded, task.plan, stored | forms)
        save_checkpoint(loaded, task.model, task.plan, folder / "model")

    return store.get(task.key, make) / "model"


def better(store: StageStore, task: TuneTask, guard: Windows, reporter: Reporter) -> Path:
    """Return the folder of the trained checkpoint, or of the untrained one where that is nearer to the original on the guard."""
    folders = {"untrained": task.checkpoint, "trained": tune(store, task, reporter)}
    found = evaluation(
        store, task.model, folders, guard, GUARD_BATCH, task.machine, reporter, "guard", fast=True
    )
    return folders["trained" if nearer(found["trained"], found["untrained"]) else "untrained"]


def _train(
    task: TuneTask,
    phase: Phase,
    forms: dict[str, QuantizedWeight],
    parts: PartStore,
    reporter: Reporter,
) -> dict[str, QuantizedWeight]:
    loaded = load_model(task.model, task.machine.dtype, task.machine.device)
    runner, windows = task.machine.runner(loaded), task.windows.tokens.to(task.machine.device)
    told = reporter.step(f"tune: {phase.kind}")
    if phase.kind == MODEL:
        calibration = Calibration(windows[:SALIENCY_WINDOWS], phase.spec.batch)
        chosen = find_salient_groups(
            runner, find_layers(loaded), forms, calibration, phase.spec.salient, phase.spec.seed
        )
        return distill.distill(runner, forms, windows, phase.spec, parts, told, salient=chosen)
    layers, price = find_layers(loaded), None
    if phase.spec.penalty:
        squared = squared_gradients(runner, layers, windows[:FISHER_WINDOWS])
        price = blockwise.Penalty(phase.spec.penalty, squared)
    blocks = blockwise.train_blocks(runner, layers, forms, windows, phase.spec, parts, told, price)
    return {name: form for block in blocks for name, form in block.weights.items()}
