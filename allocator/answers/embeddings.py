"""How embedding and head are stored, where a budget is for the whole file.

A few ways each, so all of them are tried.

Each way leaves some bytes to the layers, whose best plan is known for any budget; damage of tables
and layers is taken to add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.errors import BudgetInfeasible
from allocator.profile import Profile
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec


@dataclass(frozen=True, slots=True)
class TableChoice:
    """One way to store one table.

    Attributes:
        table: which.
        fidelity: how; None leaves it as it is.
        weight_bytes: what it takes.
        loss: what it costs, [nats/token].
    """

    table: LayerSpec
    fidelity: Fidelity | None
    weight_bytes: int
    loss: float


def choose_tables(
    profile: Profile,
    constraints: Constraints,
    choices: Sequence[Sequence[TableChoice]],
    budget_bytes: int,
) -> tuple[TableChoice, ...]:
    """Return for each table the way that leaves, with the best plan of the layers, the least modelled loss.

    Args:
        profile: of the layers.
        constraints: what their plan must respect.
        choices: the ways of each table.
        budget_bytes: for tables and layers together.

    Raises:
        BudgetInfeasible: no way leaves enough for the layers.
    """
    whatif, best, least = WhatIf(profile, constraints), None, float("inf")
    closest: BudgetInfeasible | None = None
    for ways in sorted(
        product(*choices), key=lambda ways: sum(way.weight_bytes for way in ways), reverse=True
    ):
        left = budget_bytes - sum(way.weight_bytes for way in ways)
        try:
            loss = whatif.plan(max(left, 0)).predicted_loss + sum(way.loss for way in ways)
        except BudgetInfeasible as error:
            closest = error
            continue
        if loss < least:
            best, least = ways, loss
    if best is None:
        raise closest or BudgetInfeasible("there is no way to store the tables")
    return best
