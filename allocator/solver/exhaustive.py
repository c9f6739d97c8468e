"""The exact solution by trying every choice: the slow reference of tests, for a few groups."""

from itertools import product

import numpy as np

from allocator.errors import BudgetInfeasible
from allocator.solver.program import Choice, Program

MOST_CHOICES = 10**6
"""Choices that are tried at most."""


def best_choice(program: Program, budget_bytes: int) -> tuple[Choice, float]:
    """Return the choice of least loss within the budget and all limits, with its loss.

    Of choices of equal loss it is the first in the order of the menu.

    Args:
        program: what is chosen.
        budget_bytes: the budget.

    Returns:
        The fidelity of each group, int64 [G], and the loss, [nats/token].

    Raises:
        BudgetInfeasible: no choice is within the budget and all limits.
        ValueError: there are more than `MOST_CHOICES` choices.
    """
    options = [np.flatnonzero(row).tolist() for row in program.allowed]
    if np.prod([float(len(row)) for row in options]) > MOST_CHOICES:
        raise ValueError(f"more than {MOST_CHOICES} choices are too many to try")
    best: Choice | None = None
    best_loss = np.inf
    for tried in product(*options):
        choice = np.array(tried, dtype=np.int64)
        if program.used_bytes(choice) > budget_bytes:
            continue
        if any(limit.used(choice) > limit.ceiling for limit in program.limits):
            continue
        loss = program.loss(choice)
        if loss < best_loss:
            best, best_loss = choice, loss
    if best is None:
        raise BudgetInfeasible(
            f"no choice fits {budget_bytes} bytes and all limits", budget_bytes=budget_bytes
        )
    return best, best_loss
