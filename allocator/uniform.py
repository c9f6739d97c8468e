"""The plan that an allocator has to beat: every layer the same, at the same bytes."""

from collections.abc import Sequence
from math import floor

from allocator.errors import BudgetInfeasible
from quantizer.fidelity import COLUMN_STEP, Fidelity
from quantizer.plan import LayerSpec, Plan

_GOLDEN = (5**0.5 - 1) / 2
_BISECTIONS = 40


def uniform_plan(layers: Sequence[LayerSpec], bits_lo: int, bits_hi: int, group_size: int, budget_bytes: int) -> Plan:
    """Return the plan with one high-impact share for all layers, as large as the budget allows.

    Parts are whole multiples of `COLUMN_STEP` columns, so one share cannot meet most budgets. Layers therefore round the share up
    or down in turns, evenly spread over the model, until the budget is used up to a single step of a single layer.

    Raises:
        BudgetInfeasible: not even a share of zero fits the budget.
    """
    low, high = 0.0, 1.0 + 1e-9
    best = _plan_at(layers, bits_lo, bits_hi, group_size, low)
    if best.weight_bytes > budget_bytes:
        raise BudgetInfeasible(f"budget {budget_bytes} bytes is below {best.weight_bytes} bytes, every layer at {bits_lo} bits")
    top = _plan_at(layers, bits_lo, bits_hi, group_size, high)
    if top.weight_bytes <= budget_bytes:
        return top
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        plan = _plan_at(layers, bits_lo, bits_hi, group_size, middle)
        if plan.weight_bytes <= budget_bytes:
            low, best = middle, plan
        else:
            high, top = middle, plan
    return _step_by_step(best, top, budget_bytes)


def _step_by_step(below: Plan, above: Plan, budget_bytes: int) -> Plan:
    """Raise layers from one plan to the next as far as the budget goes: layers may take a step at the very same share."""
    fidelities, used = list(below.fidelities), below.weight_bytes
    for index, (low, high) in enumerate(zip(below.layer_bytes, above.layer_bytes, strict=True)):
        if used + high - low <= budget_bytes:
            fidelities[index], used = above.fidelities[index], used + high - low
    return Plan(below.layers, tuple(fidelities))


def _plan_at(layers: Sequence[LayerSpec], bits_lo: int, bits_hi: int, group_size: int, ratio: float) -> Plan:
    fidelities = []
    for index, layer in enumerate(layers):
        steps = floor(ratio * layer.in_features / COLUMN_STEP + index * _GOLDEN % 1)
        share = steps * COLUMN_STEP / layer.in_features
        if steps == 0:
            fidelities.append(Fidelity.uniform(bits_lo, group_size))
        elif share >= 1 or ratio >= 1:
            fidelities.append(Fidelity.uniform(bits_hi, group_size))
        else:
            fidelities.append(Fidelity(bits_lo, bits_hi, round(share, 6), group_size))
    return Plan(tuple(layers), tuple(fidelities))
