"""What a run would do and take, without reading any weight."""

from typing import Any

from allocator.answers.uniform import uniform_plans
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.memory_estimate import peak_memory_bytes
from service.stages.prepared_run import PreparedRun
from service.stages.time_estimate import run_seconds


def dry_run(context: RunContext, request: RunRequest, prepared: PreparedRun) -> dict[str, Any]:
    """Return what a run would do and take, as JSON values: sizes [bytes], memory, disk, seconds.

    `download_bytes` is the space that weights take which a run downloads first, `cache_bytes` what
    its stages take.
    """
    sizes = prepared.sizes
    plans = uniform_plans(prepared.layers, prepared.menu.fidelities, prepared.budget_bytes)
    uniform = max(plans, key=lambda plan: plan.weight_bytes)
    checkpoint_bytes = prepared.budget_bytes + prepared.unquantized_bytes
    return {
        "model": context.model.name,
        "layers": len(prepared.layers),
        **prepared.coverage.to_json(),
        "layer_weights": sizes.layer_weights,
        "original_bytes": sizes.file_bytes,
        "original_layer_bytes": sizes.layer_bytes,
        "budget": request.budget.text,
        "budget_bytes": prepared.budget_bytes,
        "checkpoint_bytes": checkpoint_bytes,
        "tables": [table.name for table in prepared.tables],
        "uniform_bytes": uniform.weight_bytes,
        "menu": [fidelity.name for fidelity in prepared.menu.fidelities],
        "context": prepared.menu.fidelities[prepared.menu.context].name,
        "peak_memory_bytes": peak_memory_bytes(request, prepared, context.machine),
        "download_bytes": context.model.download_bytes,
        "cache_bytes": 4 * prepared.budget_bytes + 2 * checkpoint_bytes,
        "seconds": round(run_seconds(request, prepared, context.machine)),
    }
