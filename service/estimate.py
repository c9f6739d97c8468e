"""What a run would take, from shapes alone: bytes, memory, seconds."""

from dataclasses import dataclass
from typing import Any

import torch

from allocator.uniform import uniform_plan
from service.pipeline import Task
from service.request import RunRequest
from service.stages import Machine

_FLOPS_PER_WEIGHT = 2
_FLOAT_BYTES = 4
_BENCH_SIZE, _BENCH_RUNS = 1024, 4
_OVERHEAD = 1.6
"""Measured seconds over those of the matrix products alone, on a model of 135 million parameters and two cores."""
_GPTQ_SECONDS_PER_COLUMN_ROW = 2.2e-7
"""Seconds for each column of each row that GPTQ quantizes, measured likewise; small layers are bound by the column loop."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would take.

    Attributes:
        peak_memory_bytes: model in the compute dtype, hidden states, and the largest block's working set.
        cache_bytes: what the cache will hold at most while the run goes on.
        seconds: wall time, from a short measurement of this machine's matrix products.
    """

    peak_memory_bytes: int
    cache_bytes: int
    seconds: float


def estimate(request: RunRequest, task: Task) -> Estimate:
    """Estimate memory, disk and time of a run."""
    machine, effort = Machine.choose(request.device), request.effort
    itemsize = machine.dtype.itemsize
    elements = task.sizes.unquantized_bytes // getattr(torch, task.model.dtype).itemsize
    weights = task.sizes.layer_weights
    calibration = effort.calibration.windows * effort.calibration.tokens
    probes = effort.probe_windows * effort.probe_tokens
    scored = effort.evaluation.windows * effort.evaluation.tokens
    widest = max(layer.in_features for layer in task.layers)
    block = max(sum(layer.weights for layer in task.layers if layer.block == index) for index in {x.block for x in task.layers})
    blocks = len({layer.block for layer in task.layers})
    memory = (
        (weights + elements) * itemsize
        + 4 * block * _FLOAT_BYTES
        + 4 * widest**2 * _FLOAT_BYTES
        + (calibration + probes * (blocks + 16)) * widest * _FLOAT_BYTES
    )
    flips = 2 * len(task.layers)
    passes = probes * (flips / 2 + 20) + 3 * 3.5 * calibration + 3 * scored
    products = _FLOPS_PER_WEIGHT * passes * (weights + elements * scored / max(passes, 1)) / _flops_per_second(machine)
    gptq = 5 * _GPTQ_SECONDS_PER_COLUMN_ROW * weights / max(1, min(layer.out_features for layer in task.layers) / 192)
    return Estimate(memory, 6 * task.budget_bytes + 2 * task.sizes.unquantized_bytes, products * _OVERHEAD + gptq)


def dry_run(request: RunRequest, task: Task) -> dict[str, Any]:
    """Return what a run would do, as JSON values."""
    expected = estimate(request, task)
    low, high = task.menu.fidelities[0].bits_lo, task.menu.fidelities[-1].bits_lo
    uniform = uniform_plan(task.layers, low, high, request.group_size, task.budget_bytes)
    return {
        "model": task.model.name,
        "layers": len(task.layers),
        "layer_weights": task.sizes.layer_weights,
        "original_bytes": task.sizes.file_bytes,
        "original_layer_bytes": task.sizes.layer_bytes,
        "budget": request.budget.text,
        "budget_bytes": task.budget_bytes,
        "checkpoint_bytes": task.budget_bytes + task.sizes.unquantized_bytes,
        "uniform_bytes": uniform.weight_bytes,
        "menu": [fidelity.name for fidelity in task.menu.fidelities],
        "context": task.menu.fidelities[task.menu.context].name,
        "peak_memory_bytes": expected.peak_memory_bytes,
        "cache_bytes": expected.cache_bytes,
        "seconds": round(expected.seconds),
    }


def _flops_per_second(machine: Machine) -> float:
    """Measure float matrix products for a moment."""
    import time  # noqa: PLC0415

    left = torch.ones(_BENCH_SIZE, _BENCH_SIZE, dtype=machine.dtype, device=machine.device)
    float((left @ left).sum())
    start = time.perf_counter()
    for _ in range(_BENCH_RUNS):
        product = left @ left
    float(product.sum())
    return _BENCH_RUNS * 2 * _BENCH_SIZE**3 / (time.perf_counter() - start)
