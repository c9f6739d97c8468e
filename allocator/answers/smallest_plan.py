"""The smallest plan for a wanted loss."""

from bisect import bisect_left
from dataclasses import dataclass, replace

from allocator.answers.allocation import Allocation
from allocator.answers.frontier import budgets_between
from allocator.answers.whatif import WhatIf
from allocator.errors import LossUnreachable

_TRIED_BUDGETS = 33
"""Budgets that are tried where more bytes do not always lower the loss."""


@dataclass(frozen=True, slots=True)
class Smallest:
    """The answer to "how small can a plan of this loss be".

    Attributes:
        allocation: the smallest plan that was found with the wanted loss or less.
        bound_bytes: no plan of fewer bytes has it, as the bound of the loss proves.
    """

    allocation: Allocation
    bound_bytes: int


def smallest_plan(whatif: WhatIf, most_loss: float) -> Smallest:
    """Return the smallest plan with a modelled loss of at most `most_loss`, [nats/token].

    Raises:
        LossUnreachable: no plan of the menu has so small a loss; names the smallest that was found.
        SolverFailed: the solver gave no usable answer.
    """
    low, high = whatif.byte_range
    best = whatif.plan(high)
    if best.predicted_loss > most_loss:
        tried = (whatif.plan(budget) for budget in budgets_between(low, high, _TRIED_BUDGETS))
        best = min(tried, key=lambda plan: plan.predicted_loss)
    if best.predicted_loss > most_loss:
        raise LossUnreachable(
            f"no plan has a predicted KL of {most_loss:.6g} nats/token; the best that was found "
            f"has {best.predicted_loss:.6g}, with {best.weight_bytes} bytes"
        )
    while smaller := _smaller_plan(whatif, most_loss, best.weight_bytes):
        best = smaller
    best_bytes = best.weight_bytes
    open_sizes = range(low, best_bytes)
    at = bisect_left(open_sizes, True, key=lambda size: whatif.bound(size) <= most_loss)
    return Smallest(replace(best, budget_bytes=best_bytes), low + at)


def _smaller_plan(whatif: WhatIf, most_loss: float, below_bytes: int) -> Allocation | None:
    """Return a plan of fewer bytes with a modelled loss of at most `most_loss`, if one is found.

    Bisection takes the loss to fall with the budget. It does so only nearly, so that a second
    search below a plan may find a smaller one.
    """
    budgets = range(whatif.byte_range[0], below_bytes)
    at = bisect_left(budgets, True, key=lambda size: whatif.plan(size).predicted_loss <= most_loss)
    return whatif.plan(budgets[at]) if at < len(budgets) else None
