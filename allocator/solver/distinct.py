"""Plans of few distinct fidelities.

Which parts of the menu are worth solving for, and a bound for all others.

For every part S of the menu the Lagrangian at a mix x0 and a price p, see `allocator.solver.bound`,
bounds the loss of the plans that use nothing but S. All parts are bounded at a few prices, in one
pass; the best are solved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from allocator.errors import RuleError
from allocator.solver.bound import linearised
from allocator.solver.osqp_solver import Relaxed
from allocator.solver.program import Program

EXAMINED = 12
"""Parts of the menu that are solved."""

LARGEST = 20_000
"""Parts of the menu that are bounded at most."""

_PRICES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
"""Where parts are bounded, in units of the price of a byte with the whole menu."""


@dataclass(frozen=True, slots=True)
class Subset:
    """A part of the menu.

    Attributes:
        allowed: bool [K].
        bound: loss that no plan of it can be below, [nats/token].
        examined: whether it is among the most promising ones.
    """

    allowed: NDArray[np.bool_]
    bound: float
    examined: bool


def smallest_of_few(program: Program, most_distinct: int) -> int | None:
    """Return the bytes of the smallest choice of at most `most_distinct` fidelities, or None where the rules leave none.

    Raises:
        RuleError: the menu has too many parts of this size.
    """
    sizes = np.where(program.allowed, program.sizes, np.inf)
    found = min(
        float(sizes[:, list(part)].min(axis=1).sum()) for part in _parts(program, most_distinct)
    )
    return int(found) if np.isfinite(found) else None


def _parts(program: Program, most_distinct: int) -> Iterator[tuple[int, ...]]:
    menu = program.sizes.shape[1]
    count = min(most_distinct, menu)
    if comb(menu, count) > LARGEST:
        raise RuleError(
            f"a menu of {menu} has {comb(menu, count)} parts of {count}; at most {LARGEST} are "
            "looked at"
        )
    return combinations(range(menu), count)


def likely_subsets(
    program: Program, whole: Relaxed, budget_bytes: int, most_distinct: int
) -> Iterator[Subset]:
    """Yield every part of the menu with `most_distinct` fidelities that some plan within the budget uses, lowest bound first.

    Args:
        program: with the whole menu.
        whole: its relaxed solution at the budget.
        budget_bytes: the budget.
        most_distinct: how many fidelities a plan may use.

    Raises:
        RuleError: the menu has too many parts of this size.
    """
    gradient, constant = linearised(program, whole.share, whole.limit_prices)
    bounds: list[tuple[float, tuple[int, ...]]] = []
    sizes = np.where(program.allowed, program.sizes, np.iinfo(np.int64).max // program.groups)
    for part in _parts(program, most_distinct):
        columns = list(part)
        if int(sizes[:, columns].min(axis=1).sum()) > budget_bytes:
            continue
        found = max(
            float((gradient[:, columns] + price * program.sizes[:, columns]).min(axis=1).sum())
            - price * budget_bytes
            for price in (factor * whole.price for factor in _PRICES)
        )
        if np.isfinite(found):
            bounds.append((constant + found, part))
    for place, (bound, part) in enumerate(sorted(bounds)):
        allowed = np.zeros(program.sizes.shape[1], dtype=np.bool_)
        allowed[list(part)] = True
        yield Subset(allowed, bound, place < EXAMINED)
