"""How embedding and head are stored, where a budget is for the whole checkpoint.

There are a few options for each, so all combinations are tried. Each combination leaves some bytes
to the layers, whose best plan is known for any budget. The losses of embedding, head and layers are
taken to add up.
"""

from collections.abc import Sequence
from itertools import product

from allocator.answers.whatif import WhatIf
from allocator.errors import BudgetInfeasible
from allocator.unquantized import EmbeddingOption


def choose_embedding_options(
    whatif: WhatIf,
    options: Sequence[Sequence[EmbeddingOption]],
    budget_bytes: int,
) -> tuple[EmbeddingOption, ...]:
    """Return the options that, with the best plan of the layers, have the least modelled loss.

    Args:
        whatif: the profile of the layers under its constraints.
        options: of each embedding and head.
        budget_bytes: for embedding, head and layers together.

    Returns:
        One option for each embedding and head.

    Raises:
        BudgetInfeasible: no combination leaves enough for the layers.
    """
    best: tuple[EmbeddingOption, ...] | None = None
    least = float("inf")
    closest: BudgetInfeasible | None = None
    for chosen in sorted(product(*options), key=_weight_bytes, reverse=True):
        left_bytes = max(budget_bytes - _weight_bytes(chosen), 0)
        try:
            loss = whatif.plan(left_bytes).predicted_loss + sum(option.loss for option in chosen)
        except BudgetInfeasible as error:
            closest = error
            continue
        if loss < least:
            best, least = chosen, loss
    if best is None:
        raise closest or BudgetInfeasible("there is no way to store embedding and head")
    return best


def _weight_bytes(options: Sequence[EmbeddingOption]) -> int:
    return sum(option.weight_bytes for option in options)
