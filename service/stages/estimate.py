"""What a run would take, from shapes alone: bytes, memory, seconds."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from allocator.answers.uniform import uniform_plans
from allocator.signals import SKETCH_WIDTH, find_signal
from quantizer.plans.plan import by_block
from service.request.request import RunRequest
from service.stages.machine import Machine
from service.stages.prepare import Task
from service.stages.profile import PROBE_BATCH
from service.stages.recipe import MODEL
from service.stages.tuning import TRAINING_BYTES, Phase, phases_for

_FLOAT_BYTES = 4
_BENCH_SIZE, _BENCH_RUNS = 1024, 12

# Measured on SmolLM2-135M with two cores; see tests/benchmarks/LOG.md.
_EFFICIENCY = 0.75
"""Speed of a model's forward pass as a share of that of one large matrix product."""
_CALIBRATION_PASSES = 4.0
"""Forward passes over the calibration windows that quantizing once takes.

Second moments of each group of layers, and outputs.
"""
_SECONDS_PER_COLUMN, _SECONDS_PER_WEIGHT = 4.0e-5, 4.5e-8
"""GPTQ's column loop and its arithmetic."""
_RIVALS = 2
"""Uniform plans that most often may be best, and are quantized and scored beside the solver's plan."""
_ACTIVATION_COPIES = 2.5
"""What a backward pass keeps of a block, as a multiple of what enters and leaves its layers."""
_STEP_PRODUCTS, _HEAD_PRODUCTS = 3, 5
"""Products with all layers, and with all other weights, that each token of a training step costs.

Forward and backward.
"""
_TRAIN_EFFICIENCY = 0.35
"""Speed of a training step as a share of that of one large matrix product in its precision."""
_LIBRARY_BYTES = 900_000_000
"""The interpreter with torch and transformers."""
_METRIC_COPIES, _SCORE_COPIES = 9, 7
"""Arrays of the size of all logits that are held at once, while the output metric is made and while models are scored."""
_SECONDS_PER_LOAD_BYTE = 1.0e-8
_LOADS = 6


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would take.

    Attributes:
        peak_memory_bytes: libraries, model in the compute dtype, hidden states, the largest block's
            working set, logits.
        cache_bytes: what the cache will hold at most while the run goes on.
        seconds: wall time, from a short measurement of this machine's matrix products.
    """

    peak_memory_bytes: int
    cache_bytes: int
    seconds: float


def estimate(request: RunRequest, task: Task) -> Estimate:
    """Estimate memory, disk and time of a run."""
    machine = Machine.choose(request.device)
    cache_bytes = 4 * task.budget_bytes + 2 * (task.budget_bytes + task.unquantized_bytes)
    return Estimate(
        _memory_bytes(request, task, machine), cache_bytes, _seconds(request, task, machine)
    )


def dry_run(request: RunRequest, task: Task) -> dict[str, Any]:
    """Return what a run would do, as JSON values."""
    expected = estimate(request, task)
    uniform = max(
        uniform_plans(task.layers, task.menu.fidelities, task.budget_bytes),
        key=lambda plan: plan.weight_bytes,
    )
    return {
        "model": task.model.name,
        "layers": len(task.layers),
        "layer_weights": task.sizes.layer_weights,
        "original_bytes": task.sizes.file_bytes,
        "original_layer_bytes": task.sizes.layer_bytes,
        "budget": request.budget.text,
        "budget_bytes": task.budget_bytes,
        "checkpoint_bytes": task.budget_bytes + task.unquantized_bytes,
        "tables": [table.name for table in task.tables],
        "uniform_bytes": uniform.weight_bytes,
        "menu": [fidelity.name for fidelity in task.menu.fidelities],
        "context": task.menu.fidelities[task.menu.context].name,
        "peak_memory_bytes": expected.peak_memory_bytes,
        "cache_bytes": expected.cache_bytes,
        "seconds": round(expected.seconds),
    }


def _other_weights(task: Task) -> int:
    return task.sizes.unquantized_bytes // int(getattr(torch, task.model.dtype).itemsize)


def _memory_bytes(request: RunRequest, task: Task, machine: Machine) -> int:
    """The most that is held at once.

    While effects are measured, or while all plans are scored beside the original.
    """
    amounts = request.amounts
    blocks = by_block(task.layers).values()
    block = max(sum(layer.weights for layer in members) for members in blocks)
    widest = max(layer.in_features for layer in task.layers)
    batch = PROBE_BATCH * amounts.probe_tokens
    probes = amounts.probe_windows * amounts.probe_tokens
    kept = (
        sum(layer.in_features + layer.out_features for layer in task.layers)
        * _ACTIVATION_COPIES
        * batch
    )
    states = amounts.calibration.windows * amounts.calibration.tokens + probes
    if find_signal(request.method.signal).cost.all_probes_at_once:
        kept, batch, states = 0, probes, states + probes * (len(blocks) + SKETCH_WIDTH)
    model = (task.sizes.layer_weights + _other_weights(task)) * machine.dtype.itemsize
    packed = task.budget_bytes + _other_weights(task) * machine.dtype.itemsize
    logits = task.sizes.vocabulary * _FLOAT_BYTES
    originals = task.sizes.layer_weights * machine.dtype.itemsize
    measuring = (
        originals
        + (states * widest + kept + 4 * block + 4 * widest**2) * _FLOAT_BYTES
        + _METRIC_COPIES * batch * logits
    )
    measuring = max(measuring, _training_bytes(request, task, machine, logits))
    scoring = (
        1 + _RIVALS
    ) * packed + _SCORE_COPIES * amounts.batch * amounts.evaluation.tokens * logits
    return int(_LIBRARY_BYTES + model + max(measuring, scoring))


def _seconds(request: RunRequest, task: Task, machine: Machine) -> float:
    amounts, weights, others = request.amounts, task.sizes.layer_weights, _other_weights(task)
    calibration = amounts.calibration.windows * amounts.calibration.tokens
    probes = amounts.probe_windows * amounts.probe_tokens
    scored = (
        amounts.evaluation.windows * amounts.evaluation.tokens
        + amounts.guard_windows * amounts.calibration.tokens
    )
    cost = find_signal(request.method.signal).cost
    layer_passes, head_passes = cost.products(len(task.layers))
    products: float = 2 * weights * probes * layer_passes + 2 * others * probes * head_passes
    plans = 1 + min(request.effort.rivals, _RIVALS)
    products += (
        (1 + plans * request.effort.calibration) * 2 * weights * calibration * _CALIBRATION_PASSES
    )
    products += (1 + plans) * 2 * (weights + others) * scored
    loop = sum(
        layer.in_features * _SECONDS_PER_COLUMN + layer.weights * _SECONDS_PER_WEIGHT
        for layer in task.layers
    )
    loads = _LOADS * task.sizes.file_bytes * _SECONDS_PER_LOAD_BYTE
    seconds = products / (_EFFICIENCY * _flops_per_second(machine.device, machine.dtype)) + loads
    return (
        seconds
        + (len(task.menu.fidelities) + plans) * loop
        + _training_seconds(request, task, machine)
    )


def _phases(request: RunRequest, task: Task, machine: Machine) -> tuple[Phase, ...]:
    return phases_for(request.effort, task.layers, machine, request.amounts.batch, request.seed)


def _training_bytes(request: RunRequest, task: Task, machine: Machine, logits: int) -> int:
    """Return what the hungriest phase of training holds beside the model."""
    window = request.amounts.calibration.tokens
    tokens = request.amounts.batch * window
    kept = (
        2
        * sum(layer.in_features + layer.out_features for layer in task.layers)
        * tokens
        * _FLOAT_BYTES
    )
    found = 0
    for phase in _phases(request, task, machine):
        trained = task.sizes.layer_weights if phase.kind == MODEL else 0
        each = TRAINING_BYTES if phase.spec.trained == "codes" else _FLOAT_BYTES
        found = max(found, each * trained + int(kept) + _METRIC_COPIES * window * logits)
    return found


def _training_seconds(request: RunRequest, task: Task, machine: Machine) -> float:
    seconds = 0.0
    for phase in _phases(request, task, machine):
        tokens = phase.spec.steps * phase.spec.batch * request.amounts.calibration.tokens
        products = 2.0 * tokens * _STEP_PRODUCTS * task.sizes.layer_weights
        if phase.kind == MODEL:
            products += 2.0 * tokens * _HEAD_PRODUCTS * _other_weights(task)
        seconds += products / (
            _TRAIN_EFFICIENCY * _flops_per_second(machine.device, phase.spec.precision)
        )
    return seconds


def _flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Measure large matrix products for a moment.

    The fastest counts, as threads start slowly and other programs come and go.
    """
    left = torch.ones(_BENCH_SIZE, _BENCH_SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(_BENCH_RUNS):
        start = time.perf_counter()
        float((left @ left).sum())
        times.append(time.perf_counter() - start)
    return 2 * _BENCH_SIZE**3 / min(times)
