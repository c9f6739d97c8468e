"""The plan that an allocator has to beat: every layer the same, at the same bytes."""

from collections.abc import Sequence
from dataclasses import replace
from math import floor

from allocator.errors import BudgetInfeasible
from allocator.profile import Profile, shares_of
from quantizer.plans.fidelity import COLUMN_MULTIPLE, Fidelity
from quantizer.plans.plan import LayerSpec, Plan

UNUSED = 0.005
"""Uniform plans that leave more of the budget unused are no match for a plan that uses it."""

_ANY_RATIO = 0.5
"""Stands for the share that is sought."""
_GOLDEN = (5**0.5 - 1) / 2
_BISECTIONS = 40


CLOSE = 0.1
"""Uniform plans whose modelled loss is above the least one by no more than this share may be the best in truth."""


def likely_uniform_plans(profile: Profile, budget_bytes: int) -> list[Plan]:
    """Return those of `uniform_plans` that may be the best one, see `CLOSE`.

    Those of a kind that the menu offers at more shares come first, as the loss of the others is the
    more of a guess; among equals, those of lower modelled loss.

    Raises:
        BudgetInfeasible: no uniform plan fits.
    """
    plans = uniform_plans(profile.layers, profile.fidelities, budget_bytes)
    losses = [profile.loss_of_shares(shares_of(profile, plan)) for plan in plans]
    limit = min(losses) + CLOSE * abs(min(losses))
    likely = [(plan, loss) for plan, loss in zip(plans, losses, strict=True) if loss <= limit]
    return [
        plan
        for plan, _ in sorted(
            likely, key=lambda each: (-_offers(profile.fidelities, each[0]), each[1])
        )
    ]


def _offers(fidelities: Sequence[Fidelity], plan: Plan) -> int:
    """Return how many fidelities of a menu are of the plan's kind.

    The same but for the high-impact share.
    """
    kind = _kind(max(plan.fidelities, key=lambda fidelity: fidelity.ratio))
    return sum(_kind(fidelity) == kind for fidelity in fidelities)


def _kind(fidelity: Fidelity) -> Fidelity:
    """Return what stands for all fidelities that are the same but for a high-impact share above zero."""
    return replace(fidelity, ratio=_ANY_RATIO) if fidelity.ratio else fidelity


def uniform_plans(
    layers: Sequence[LayerSpec], fidelities: Sequence[Fidelity], budget_bytes: int
) -> list[Plan]:
    """Return a uniform plan for each pair of code widths, group size and further options on a menu that can use the budget.

    Plans that leave more than `UNUSED` of what the fullest one uses are left out.

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

    All else is as in `kind`, whose own share does not matter; one without such a share gives all
    layers that very fidelity.

    Parts are whole multiples of `COLUMN_MULTIPLE` columns, so one share cannot meet most budgets.
    Layers therefore round the share up or down in turns, evenly spread over the model, until the
    budget is used up to a single step of a single layer.

    Raises:
        BudgetInfeasible: not even a share of zero fits the budget.
    """
    low, high = 0.0, 1.0 + 1e-9
    best = _plan_at(layers, kind, low)
    if best.weight_bytes > budget_bytes:
        raise BudgetInfeasible(
            f"budget {budget_bytes} bytes is below {best.weight_bytes} bytes, every layer at "
            f"{kind.bits_lo} bits"
        )
    top = _plan_at(layers, kind, high)
    if top.weight_bytes <= budget_bytes:
        return top
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        plan = _plan_at(layers, kind, middle)
        if plan.weight_bytes <= budget_bytes:
            low, best = middle, plan
        else:
            high, top = middle, plan
    return _step_by_step(best, top, budget_bytes)


def _step_by_step(below: Plan, above: Plan, budget_bytes: int) -> Plan:
    """Raise layers from one plan to the next as far as the budget goes.

    Layers may take a step at the very same share.
    """
    fidelities, used = list(below.fidelities), below.weight_bytes
    for index, (low, high) in enumerate(zip(below.layer_bytes, above.layer_bytes, strict=True)):
        if used + high - low <= budget_bytes:
            fidelities[index], used = above.fidelities[index], used + high - low
    return Plan(below.layers, tuple(fidelities))


def _plan_at(layers: Sequence[LayerSpec], kind: Fidelity, ratio: float) -> Plan:
    low, high = (
        replace(kind, bits_hi=kind.bits_lo, ratio=0),
        replace(kind, bits_lo=kind.bits_hi, ratio=0),
    )
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
