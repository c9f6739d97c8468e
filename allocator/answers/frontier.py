"""The frontier of size and loss: the best plans from the smallest to the largest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from allocator.answers.allocation import Allocation
from allocator.answers.whatif import WhatIf
from allocator.profile import Array
from allocator.solver.hull import lower_hull

KNEE_DEPTH = 0.05
"""A knee lies below the straight line between its neighbours by at least this share of the ranges.

Bytes and loss are each measured in units of their range.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of the frontier.

    Attributes:
        allocation: the plan, for the budget that was asked.
        on_hull: whether it is a corner of the lower convex hull of (bytes, loss), so that no mix of
            two other plans is better.
        knee: whether the frontier bends here: with fewer bytes the loss rises fast, with more it
            falls slowly.
    """

    allocation: Allocation
    on_hull: bool
    knee: bool


def budgets_between(low_bytes: int, high_bytes: int, count: int) -> list[int]:
    """Return `count` budgets from low to high, evenly spaced in bytes, each once."""
    return sorted({round(budget) for budget in np.linspace(low_bytes, high_bytes, count).tolist()})


def frontier(whatif: WhatIf, budgets_bytes: Sequence[int]) -> tuple[Point, ...]:
    """Return the best plans of several budgets, by rising budget.

    Where the plan of a smaller budget has less loss, it is the plan of the larger budget too.

    Raises:
        BudgetInfeasible: no plan fits the smallest of them.
        SolverFailed: the solver gave no usable answer.
    """
    found: list[Allocation] = []
    for budget in sorted(set(budgets_bytes)):
        allocation = whatif.plan(budget)
        if found and allocation.predicted_loss > found[-1].predicted_loss:
            allocation = replace(
                found[-1],
                budget_bytes=budget,
                bound=allocation.bound,
                price=allocation.price,
                notes=allocation.notes,
            )
        found.append(allocation)
    found = _with_falling_bounds(found)
    sizes = np.array([allocation.weight_bytes for allocation in found], dtype=np.int64)
    losses = np.array([allocation.predicted_loss for allocation in found])
    corners = set(lower_hull(sizes, losses))
    knees = set(knees_of(sizes.astype(np.float64), losses))
    return tuple(
        Point(allocation, at in corners, at in knees) for at, allocation in enumerate(found)
    )


def _with_falling_bounds(allocations: Sequence[Allocation]) -> list[Allocation]:
    """Return allocations by rising budget with the best bound that is known for each.

    A bound for a larger budget holds for all smaller ones.
    """
    found: list[Allocation] = []
    best = float("-inf")
    for allocation in reversed(allocations):
        best = max(best, allocation.bound)
        found.append(replace(allocation, bound=best))
    return found[::-1]


def knees_of(sizes: Array, losses: Array) -> list[int]:
    """Return the indices of the knees, sizes rising.

    A knee is the point farthest below the line between two ends, see `KNEE_DEPTH`; the search then
    goes on in both parts (the algorithm of Ramer, Douglas and Peucker).
    """
    if min(float(np.ptp(sizes)), float(np.ptp(losses))) <= 0:
        return []
    across = (sizes - sizes.min()) / float(np.ptp(sizes))
    down = (losses - losses.min()) / float(np.ptp(losses))

    def search(first: int, last: int) -> list[int]:
        inner = np.arange(first + 1, last)
        if not len(inner) or across[last] == across[first]:
            return []
        part = (across[inner] - across[first]) / (across[last] - across[first])
        below = down[first] + part * (down[last] - down[first]) - down[inner]
        if below.max() < KNEE_DEPTH:
            return []
        at = int(inner[below.argmax()])
        return [*search(first, at), at, *search(at, last)]

    return search(0, len(sizes) - 1)
