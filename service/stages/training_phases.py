"""How a model's layers are trained: in which phases, by effort and memory."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from quantizer.plans.plan import LayerSpec
from quantizer.training.spec import TrainingSpec
from service.request.effort import Effort
from service.stages.machine import Machine
from service.stages.recipe import BLOCKS, CODES, DEFAULT_RECIPE, MODEL, SCALES, Recipe

TRAINING_BYTES = 16
"""Latent code, gradient and two moments of each weight whose code is trained, in float32."""
MEMORY_SHARE = 0.5
"""Share of the machine's memory that training may take beside the model itself.

The rest is for the activations that a backward pass keeps.
"""

CODE_RATE, ADAPTER_RATE = 2e-3, 1e-2
"""Learning rates; tests/benchmarks/LOG.md states what was compared."""


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


def phases_for(
    effort: Effort,
    layers: Sequence[LayerSpec],
    machine: Machine,
    batch: int,
    seed: int,
    recipe: Recipe = DEFAULT_RECIPE,
) -> tuple[Phase, ...]:
    """Return how a model's layers are trained on this machine; no phases if they are not."""
    weights = sum(layer.weights for layer in layers)
    phases = choose_phases(effort, weights, _memory_bytes(machine), batch, machine.precision, seed)
    if not phases or recipe.kind is None:
        return phases
    steps = effort.block_steps if recipe.kind == BLOCKS else effort.steps
    spec = _base_spec(steps, batch, machine.precision, seed)
    return (Phase(recipe.kind, recipe.parameters.applied_to(spec)),)


def choose_phases(
    effort: Effort,
    layer_weights: int,
    memory_bytes: int,
    batch: int,
    precision: torch.dtype,
    seed: int,
) -> tuple[Phase, ...]:
    """Return how an effort trains a model of this size on a machine of this memory.

    Codes and scales are trained end to end if memory allows. Otherwise they are trained block by
    block, and then scales alone end to end.
    """
    if not effort.steps:
        return ()
    whole = _base_spec(effort.steps, batch, precision, seed)
    if TRAINING_BYTES * layer_weights <= MEMORY_SHARE * memory_bytes:
        return (Phase(MODEL, CODES.applied_to(whole)),)
    block = _base_spec(effort.block_steps, batch, precision, seed)
    return (Phase(BLOCKS, CODES.applied_to(block)), Phase(MODEL, SCALES.applied_to(whole)))


def _base_spec(steps: int, batch: int, precision: torch.dtype, seed: int) -> TrainingSpec:
    return TrainingSpec(
        steps,
        batch=batch,
        code_rate=CODE_RATE,
        adapter_rate=ADAPTER_RATE,
        precision=precision,
        seed=seed,
    )


def _memory_bytes(machine: Machine) -> int:
    if machine.device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(machine.device).total_memory)
    return int(psutil.virtual_memory().total)
