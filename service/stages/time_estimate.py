"""How long a run would take, from shapes and a short measurement of the machine.

Constants were measured on SmolLM2-135M with two cores, see tests/benchmarks/LOG.md.
"""

import time

import torch

from allocator.signals import find_signal
from service.request.request import RunRequest
from service.stages.machine import Machine
from service.stages.memory_estimate import EXPECTED_RIVALS
from service.stages.prepared_run import PreparedRun
from service.stages.recipe import MODEL
from service.stages.training_phases import phases_for

_BENCH_SIZE, _BENCH_RUNS = 1024, 12

_EFFICIENCY = 0.75
"""Speed of a model's forward pass as a share of that of one large matrix product."""
_CALIBRATION_PASSES = 4.0
"""Forward passes over the calibration windows that quantizing once takes.

For second moments of each group of layers, and for outputs.
"""
_SECONDS_PER_COLUMN, _SECONDS_PER_WEIGHT = 4.0e-5, 4.5e-8
"""GPTQ's loop over columns, and its arithmetic."""
_STEP_PRODUCTS, _HEAD_PRODUCTS = 3, 5
"""Products that each token of a training step costs, forward and backward.

The first with all layers, the second with all other weights.
"""
_TRAIN_EFFICIENCY = 0.35
"""Speed of a training step as a share of that of one large matrix product in its precision."""
_SECONDS_PER_LOAD_BYTE = 1.0e-8
_LOADS = 6


def run_seconds(request: RunRequest, prepared: PreparedRun, machine: Machine) -> float:
    """Return the wall time of a run [s]."""
    products = _profile_products(request, prepared) + _candidate_products(request, prepared)
    speed = _EFFICIENCY * _flops_per_second(machine.device, machine.dtype)
    loads = _LOADS * prepared.sizes.file_bytes * _SECONDS_PER_LOAD_BYTE
    rounding = sum(
        layer.in_features * _SECONDS_PER_COLUMN + layer.weights * _SECONDS_PER_WEIGHT
        for layer in prepared.layers
    )
    quantizations = len(prepared.menu.fidelities) + _candidates(request)
    return (
        products / speed
        + loads
        + quantizations * rounding
        + _training_seconds(request, prepared, machine)
    )


def _candidates(request: RunRequest) -> int:
    """Return the number of plans that are quantized and scored."""
    return 1 + min(request.effort.rivals, EXPECTED_RIVALS)


def _calibration_tokens(request: RunRequest) -> int:
    return request.amounts.calibration.windows * request.amounts.calibration.tokens


def _profile_products(request: RunRequest, prepared: PreparedRun) -> float:
    """Return the floating-point operations of the profile."""
    sizes = prepared.sizes
    probes = request.amounts.probe_windows * request.amounts.probe_tokens
    cost = find_signal(request.method.signal).cost
    layer_passes, head_passes = cost.products(len(prepared.layers))
    measuring = sizes.layer_weights * layer_passes + sizes.other_weights * head_passes
    calibrating = sizes.layer_weights * _calibration_tokens(request) * _CALIBRATION_PASSES
    return 2 * probes * measuring + 2 * calibrating


def _candidate_products(request: RunRequest, prepared: PreparedRun) -> float:
    """Return the floating-point operations of quantizing and scoring all candidates."""
    amounts, sizes = request.amounts, prepared.sizes
    scored = (
        amounts.evaluation.windows * amounts.evaluation.tokens
        + amounts.guard_windows * amounts.calibration.tokens
    )
    tokens = _candidates(request) * request.effort.calibration * _calibration_tokens(request)
    calibrating = sizes.layer_weights * tokens * _CALIBRATION_PASSES
    scoring = (1 + _candidates(request)) * (sizes.layer_weights + sizes.other_weights) * scored
    return 2 * calibrating + 2 * scoring


def _training_seconds(request: RunRequest, prepared: PreparedRun, machine: Machine) -> float:
    sizes = prepared.sizes
    seconds = 0.0
    phases = phases_for(
        request.effort, prepared.layers, machine, request.amounts.batch, request.seed
    )
    for phase in phases:
        tokens = phase.spec.steps * phase.spec.batch * request.amounts.calibration.tokens
        products = 2.0 * tokens * _STEP_PRODUCTS * sizes.layer_weights
        if phase.kind == MODEL:
            products += 2.0 * tokens * _HEAD_PRODUCTS * sizes.other_weights
        speed = _TRAIN_EFFICIENCY * _flops_per_second(machine.device, phase.spec.precision)
        seconds += products / speed
    return seconds


def _flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Measure the speed of large matrix products.

    The fastest of several runs counts: threads start slowly, and other programs disturb.
    """
    left = torch.ones(_BENCH_SIZE, _BENCH_SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(_BENCH_RUNS):
        start = time.perf_counter()
        float((left @ left).sum())
        times.append(time.perf_counter() - start)
    return 2 * _BENCH_SIZE**3 / min(times)
