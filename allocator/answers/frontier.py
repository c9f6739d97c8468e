"""What each budget buys.

The best plans from the smallest to the largest, where they bend, and the smallest one for a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from allocator.answers.allocation import Allocation
from allocator.answers.whatif import WhatIf
from allocator.errors import LossUnreachable
from allocator.profile import Array

KNEE = 0.05
"""A knee lies below the straight line to its neighbours by at least this share of the ranges of bytes and of loss."""

_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of the frontier.

    Attributes:
        allocation: the plan, for the budget that was asked.
        on_hull: whether no mix of two other plans is better: it lies on the lower convex hull of
            (bytes, loss).
        knee: whether the frontier bends here: less would cost much more, more would bring much
            less.
    """

    allocation: Allocation
    on_hull: bool
    knee: bool


def budgets_between(low_bytes: int, high_bytes: int, count: int) -> list[int]:
    """Return `count` budgets from low to high, evenly spaced in bytes, each once."""
    return sorted({round(budget) for budget in np.linspace(low_bytes, high_bytes, count).tolist()})


def frontier(whatif: WhatIf, budgets_bytes: Sequence[int]) -> tuple[Point, ...]:
    """Return the plans of several budgets by rising size.

    Where a smaller plan is better, it stands for the larger budget too.

    Raises:
        BudgetInfeasible: no plan fits the smallest of them.
        SolverFailed: the solver gave no usable answer.
    """
    found: list[Allocation] = []
    for budget in sorted(set(budgets_bytes)):
        allocation = whatif.plan(budget)
        if found and allocation.predicted_loss > found[-1].predicted_loss:
            # a smaller plan fits this budget too, and is better
            kept = found[-1]
            allocation = replace(
                kept,
                budget_bytes=budget,
                bound=allocation.bound,
                price=allocation.price,
                notes=allocation.notes,
            )
        found.append(allocation)
    for at in range(
        len(found) - 2, -1, -1
    ):  # what no plan within a larger budget is below, none within a smaller one is
        found[at] = replace(found[at], bound=max(found[at].bound, found[at + 1].bound))
    sizes = np.array([allocation.weight_bytes for allocation in found], dtype=np.float64)
    losses = np.array([allocation.predicted_loss for allocation in found])
    hull, bends = set(hull_of(sizes, losses)), set(knees_of(sizes, losses))
    return tuple(Point(allocation, at in hull, at in bends) for at, allocation in enumerate(found))


def hull_of(sizes: Array, losses: Array) -> list[int]:
    """Return the indices of the points on the lower convex hull, sizes rising."""
    hull: list[int] = []
    for at in range(len(sizes)):
        if hull and sizes[hull[-1]] == sizes[at]:
            if losses[at] >= losses[hull[-1]]:
                continue
            hull.pop()
        while len(hull) > 1:
            first, second = hull[-2:]
            cross = (sizes[second] - sizes[first]) * (losses[at] - losses[first])
            if cross > (sizes[at] - sizes[first]) * (losses[second] - losses[first]):
                break
            hull.pop()
        hull.append(at)
    return hull


def knees_of(sizes: Array, losses: Array) -> list[int]:
    """Return the indices of the knees.

    The point farthest below the line between the ends, and so on in both halves, see `KNEE`.
    """
    spread = float(np.ptp(sizes)), float(np.ptp(losses))
    if min(spread) <= 0:
        return []
    across, down = (sizes - sizes.min()) / spread[0], (losses - losses.min()) / spread[1]

    def search(first: int, last: int) -> list[int]:
        if last - first < 2 or across[last] == across[first]:  # noqa: PLR2004
            return []
        inner = np.arange(first + 1, last)
        part = (across[inner] - across[first]) / (across[last] - across[first])
        below = down[first] + part * (down[last] - down[first]) - down[inner]
        at = int(inner[below.argmax()])
        return [] if below.max() < KNEE else [*search(first, at), at, *search(at, last)]

    return search(0, len(sizes) - 1)


@dataclass(frozen=True, slots=True)
class Smallest:
    """The answer to "how small can the plan be".

    Attributes:
        allocation: the smallest plan that was found with the wanted loss or less.
        bound_bytes: no plan of fewer bytes has it, as the bound of the loss proves.
    """

    allocation: Allocation
    bound_bytes: int


def smallest_plan(whatif: WhatIf, most_loss: float) -> Smallest:
    """Return the smallest plan with a modelled loss of at most `most_loss`, [nats/token].

    Raises:
        LossUnreachable: no plan of the menu has so small a loss; names the smallest that has been
            found.
    """
    low, high = whatif.byte_range
    best = whatif.plan(high)
    if best.predicted_loss > most_loss:
        top = min(
            (whatif.plan(budget) for budget in budgets_between(low, high, 33)),
            key=lambda plan: plan.predicted_loss,
        )
        if top.predicted_loss > most_loss:
            raise LossUnreachable(
                f"no plan has a predicted KL of {most_loss:.6g} nats/token; the best that was "
                "found has "
                f"{top.predicted_loss:.6g}, with {top.weight_bytes} bytes"
            )
        best = top
    small, large = low - 1, best.weight_bytes
    for _ in range(_BISECTIONS):
        if large - small <= 1:
            break
        middle = (small + large) // 2
        found = whatif.plan(middle)
        if found.predicted_loss <= most_loss:
            best, large = found, min(middle, found.weight_bytes)
        else:
            small = middle
    return Smallest(
        replace(best, budget_bytes=best.weight_bytes),
        _bound_bytes(whatif, most_loss, best.weight_bytes),
    )


def _bound_bytes(whatif: WhatIf, most_loss: float, found_bytes: int) -> int:
    """Return the smallest budget whose bound does not rule the loss out."""
    low, high = whatif.byte_range[0], found_bytes
    if whatif.bound(low) <= most_loss:
        return low
    for _ in range(_BISECTIONS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if whatif.bound(middle) > most_loss:
            low = middle
        else:
            high = middle
    return high
