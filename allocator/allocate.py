"""From a profile and a budget to a plan: the main function of the allocator."""

from allocator.answers.allocation import Allocation
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import UNCONSTRAINED, Constraints
from allocator.profile import Profile

METHOD = "curve-local-1"
"""Version of the results of this module and of those that it uses.

It is part of the keys under which plans are stored; a change of the results needs a new one.
"""


def allocate(
    profile: Profile, budget_bytes: int, constraints: Constraints = UNCONSTRAINED
) -> Allocation:
    """Return the plan of least modelled loss within a budget, see `WhatIf.plan`.

    Args:
        profile: measured effects of the layers.
        budget_bytes: bytes of the quantized layers.
        constraints: what the plan must respect besides the budget.

    Raises:
        BudgetInfeasible: no plan fits the budget.
        RuleError: the constraints cannot be understood.
        LimitInfeasible: the constraints cannot be met.
        SolverFailed: the solver gave no usable answer.
    """
    return WhatIf(profile, constraints).plan(budget_bytes)
