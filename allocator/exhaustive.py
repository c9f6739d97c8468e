"""The slow exact twin of the solver: try every plan. For tests, and for problems of a handful of layers."""

from itertools import product

import numpy as np

from allocator.errors import BudgetInfeasible
from allocator.profile import Profile
from allocator.rounding import Choice

LARGEST = 10**6
"""Plans that are tried at most."""


def best_plan(profile: Profile, budget_bytes: int) -> tuple[Choice, float]:
    """Return (menu indices [L], modelled loss) of the best plan within the budget, the first of equals.

    Raises:
        BudgetInfeasible: no plan fits.
        ValueError: there are more than `LARGEST` plans.
    """
    layers, menu = profile.linear.shape
    if menu**layers > LARGEST:
        raise ValueError(f"{menu}^{layers} plans are too many to try")
    sizes = profile.weight_bytes
    best, best_loss = None, np.inf
    for choice in product(range(menu), repeat=layers):
        if sum(int(sizes[layer, option]) for layer, option in enumerate(choice)) > budget_bytes:
            continue
        loss = profile.loss(choice)
        if loss < best_loss:
            best, best_loss = choice, loss
    if best is None:
        raise BudgetInfeasible(f"no plan of this menu fits {budget_bytes} bytes")
    return np.array(best, dtype=np.int64), best_loss
