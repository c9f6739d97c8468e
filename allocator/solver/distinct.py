"""Plans of few distinct fidelities: which subsets of the menu are worth solving for.

For every subset S of the menu, the Lagrangian at given shares and a price of a byte, see
`allocator.solver.bound`, bounds the loss of all plans that use only S: the minimum over k runs over
S. All subsets are bounded at a few prices in one pass, and only the most promising are solved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from allocator.errors import RuleError
from allocator.solver.bound import linearised
from allocator.solver.program import Program
from allocator.solver.relaxation import RelaxedSolution

SOLVED_SUBSETS = 12
"""Subsets that are solved."""

MOST_SUBSETS = 20_000
"""Subsets that are bounded at most."""

_PRICES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
"""Prices at which subsets are bounded, in units of the price of a byte with the whole menu."""


@dataclass(frozen=True, slots=True)
class Subset:
    """A subset of the menu.

    Attributes:
        allowed: bool [K].
        bound: loss that no plan of it can be below, [nats/token].
        promising: whether its bound is among the `SOLVED_SUBSETS` lowest.
    """

    allowed: NDArray[np.bool_]
    bound: float
    promising: bool


def smallest_distinct(program: Program, most_distinct: int) -> int | None:
    """Return the bytes of the smallest choice of at most `most_distinct` fidelities.

    It is None where the rules leave none.

    Raises:
        RuleError: the menu has too many subsets of this size.
    """
    sizes = np.where(program.allowed, program.sizes, np.inf)
    smallest = min(
        float(sizes[:, list(subset)].min(axis=1).sum())
        for subset in _subsets(program, most_distinct)
    )
    return int(smallest) if np.isfinite(smallest) else None


def _subsets(program: Program, most_distinct: int) -> Iterator[tuple[int, ...]]:
    menu = program.sizes.shape[1]
    count = min(most_distinct, menu)
    if comb(menu, count) > MOST_SUBSETS:
        raise RuleError(
            f"a menu of {menu} fidelities has {comb(menu, count)} subsets of {count}, more than "
            f"the {MOST_SUBSETS} that can be examined; allow more or fewer distinct fidelities"
        )
    return combinations(range(menu), count)


def bounded_subsets(
    program: Program, whole: RelaxedSolution, budget_bytes: int, most_distinct: int
) -> Iterator[Subset]:
    """Yield every subset of the menu that some plan within the budget uses, lowest bound first.

    Args:
        program: with the whole menu.
        whole: its relaxed solution at the budget.
        budget_bytes: the budget.
        most_distinct: size of the subsets.

    Raises:
        RuleError: the menu has too many subsets of this size.
    """
    gradient, constant = linearised(program, whole.share, whole.limit_prices)
    bounds: list[tuple[float, tuple[int, ...]]] = []
    sizes = np.where(program.allowed, program.sizes, np.iinfo(np.int64).max // program.groups)
    for subset in _subsets(program, most_distinct):
        columns = list(subset)
        if int(sizes[:, columns].min(axis=1).sum()) > budget_bytes:
            continue
        bound = max(
            float((gradient[:, columns] + price * program.sizes[:, columns]).min(axis=1).sum())
            - price * budget_bytes
            for price in (factor * whole.price for factor in _PRICES)
        )
        if np.isfinite(bound):
            bounds.append((constant + bound, subset))
    for place, (bound, subset) in enumerate(sorted(bounds)):
        allowed = np.zeros(program.sizes.shape[1], dtype=np.bool_)
        allowed[list(subset)] = True
        yield Subset(allowed, bound, place < SOLVED_SUBSETS)
