"""The baseline that an allocation has to beat: every layer stored alike, at the same bytes."""

from collections.abc import Sequence
from dataclasses import replace
from math import floor

from allocator.errors import BudgetInfeasible
from allocator.profile import Profile, shares_of
from allocator.solver.bisection import bisect_real
from quantizer.plans.fidelity import COLUMN_MULTIPLE, Fidelity
from quantizer.plans.plan import LayerSpec, Plan

UNUSED = 0.005
"""Uniform plans that leave this share more of the budget unused than the fullest are left out.

They would be no fair baseline for a plan that uses the budget.
"""

CLOSE = 0.1
"""A uniform plan may be the best one if its modelled loss is at most this share above the least."""

_ANY_RATIO = 0.5
"""Stands for the high-impact share that is searched for."""

_GOLDEN = (5**0.5 - 1) / 2
"""The fractional parts of its multiples are spread evenly between 0 and 1."""

_BISECTIONS = 40


def likely_uniform_plans(profile: Profile, budget_bytes: int) -> list[Plan]:
    """Return those of `uniform_plans` that may be the best one, see `CLOSE`.

    First come plans of a kind that the menu offers at more shares, as the loss of others is
    interpolated over a longer distance; among equals, plans of lower modelled loss.

    Raises:
        BudgetInfeasible: no uniform plan fits.
    """
    plans = uniform_plans(profile.layers, profile.fidelities, budget_bytes)
    losses = [profile.loss_of_shares(shares_of(profile, plan)) for plan in plans]
    limit = min(losses) + CLOSE * abs(min(losses))
    likely = [(plan, loss) for plan, loss in zip(plans, losses, strict=True) if loss <= limit]
    likely.sort(key=lambda each: (-_offers(profile.fidelities, each[0]), each[1]))
    return [plan for plan, _ in likely]


def _offers(fidelities: Sequence[Fidelity], plan: Plan) -> int:
    """Return how many fidelities of a menu differ from those of a uniform plan in ratio only."""
    kind = _kind(max(plan.fidelities, key=lambda fidelity: fidelity.ratio))
    return sum(_kind(fidelity) == kind for fidelity in fidelities)


def _kind(fidelity: Fidelity) -> Fidelity:
    """Return what stands for all fidelities that differ only in a ratio above zero."""
    return replace(fidelity, ratio=_ANY_RATIO) if fidelity.ratio else fidelity


def uniform_plans(
    layers: Sequence[LayerSpec], fidelities: Sequence[Fidelity], budget_bytes: int
) -> list[Plan]:
    """Return a uniform plan for each kind of fidelity on a menu that can use the budget.

    Fidelities are of one kind if they differ only in the share of high-impact columns. See `UNUSED`
    for plans that are left out.

    Raises:
        BudgetInfeasible: no uniform plan fits.
    """
    plans = []
    for kind in dict.fromkeys(map(_kind, fidelities)):
        try:
            plans.append(uniform_plan(layers, kind, budget_bytes))
        except BudgetInfeasible:
            continue
    if not plans:
        raise BudgetInfeasible(
            f"budget {budget_bytes} bytes is below every uniform plan of the menu; let layers "
            "differ"
        )
    fullest = max(plan.weight_bytes for plan in plans)
    return [plan for plan in plans if plan.weight_bytes >= (1 - UNUSED) * fullest]


def uniform_plan(layers: Sequence[LayerSpec], kind: Fidelity, budget_bytes: int) -> Plan:
    """Return the plan with one high-impact share for all layers, as large as the budget allows.

    High-impact columns come in multiples of `COLUMN_MULTIPLE`, so one share for all layers cannot
    meet most budgets. Layers therefore round the share up or down in turns, evenly spread over the
    model, until the budget is used up to a single step of a single layer.

    Args:
        layers: all layers.
        kind: the fidelity but for its ratio; with a ratio of zero, all layers get it as it is.
        budget_bytes: the budget.

    Raises:
        BudgetInfeasible: not even a share of zero fits the budget.
    """
    low, high = 0.0, 1.0 + 1e-9
    smallest = _plan_at(layers, kind, low)
    if smallest.weight_bytes > budget_bytes:
        raise BudgetInfeasible(
            f"budget {budget_bytes} bytes is below {smallest.weight_bytes} bytes, every layer at "
            f"{kind.bits_lo} bits"
        )
    largest = _plan_at(layers, kind, high)
    if largest.weight_bytes <= budget_bytes:
        return largest

    def too_large(ratio: float) -> bool:
        return _plan_at(layers, kind, ratio).weight_bytes > budget_bytes

    low, high = bisect_real(too_large, low, high, steps=_BISECTIONS)
    return _step_by_step(_plan_at(layers, kind, low), _plan_at(layers, kind, high), budget_bytes)


def _step_by_step(below: Plan, above: Plan, budget_bytes: int) -> Plan:
    """Change layers from one plan to a larger one, in order, as far as the budget goes.

    Several layers may take a step at the very same share.
    """
    fidelities = list(below.fidelities)
    used = below.weight_bytes
    for index, (low, high) in enumerate(zip(below.layer_bytes, above.layer_bytes, strict=True)):
        if used + high - low <= budget_bytes:
            fidelities[index] = above.fidelities[index]
            used += high - low
    return Plan(below.layers, tuple(fidelities))


def _plan_at(layers: Sequence[LayerSpec], kind: Fidelity, ratio: float) -> Plan:
    """Return the uniform plan at a high-impact share, rounded in turns."""
    low = replace(kind, bits_hi=kind.bits_lo, ratio=0)
    high = replace(kind, bits_lo=kind.bits_hi, ratio=0)
    fidelities = []
    for index, layer in enumerate(layers):
        steps = floor(ratio * layer.in_features / COLUMN_MULTIPLE + index * _GOLDEN % 1)
        share = steps * COLUMN_MULTIPLE / layer.in_features
        if steps == 0:
            fidelities.append(low)
        elif share >= 1 or ratio >= 1:
            fidelities.append(high)
        else:
            fidelities.append(replace(kind, ratio=round(share, 6)))
    return Plan(tuple(layers), tuple(fidelities))
