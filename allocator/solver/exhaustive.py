"""The slow exact twin of the solver: try every choice.

For tests, and for problems of a handful of groups.
"""

from itertools import product

import numpy as np

from allocator.errors import BudgetInfeasible
from allocator.solver.program import Choice, Program

LARGEST = 10**6
"""Choices that are tried at most."""


def best_choice(program: Program, budget_bytes: int) -> tuple[Choice, float]:
    """Return (fidelity of each group [G], modelled loss) of the best choice within all limits, the first of equals.

    Raises:
        BudgetInfeasible: none is within all limits.
        ValueError: there are more than `LARGEST` choices.
    """
    options = [np.flatnonzero(row).tolist() for row in program.allowed]
    if np.prod([float(len(row)) for row in options]) > LARGEST:
        raise ValueError(f"more than {LARGEST} choices are too many to try")
    rows = np.arange(program.groups)
    best, best_loss = None, np.inf
    for tried in product(*options):
        choice = np.array(tried, dtype=np.int64)
        if program.used_bytes(choice) > budget_bytes:
            continue
        if any(
            limit.cost[rows, choice].sum() > limit.most * (1 + 1e-12) for limit in program.limits
        ):
            continue
        loss = program.loss(choice)
        if loss < best_loss:
            best, best_loss = choice, loss
    if best is None:
        raise BudgetInfeasible(
            f"no choice fits {budget_bytes} bytes and all limits", budget_bytes=budget_bytes
        )
    return best, best_loss
