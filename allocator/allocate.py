"""The one verb of the allocator: from a profile and a budget to a plan."""

from allocator.answers.allocation import Allocation
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import FREE, Constraints
from allocator.profile import Profile

METHOD = "curve-local-1"
"""Names what this module and those below it compute; a change of their results gets a new name."""


def allocate(profile: Profile, budget_bytes: int, constraints: Constraints = FREE) -> Allocation:
    """Return the plan of least modelled loss that fits `budget_bytes` and respects the constraints, see `WhatIf.plan`.

    Raises:
        BudgetInfeasible: no plan fits the budget.
        RuleError, LimitInfeasible: the constraints cannot be understood, or not be met.
        SolverFailed: the solver gave no usable answer.
    """
    return WhatIf(profile, constraints).plan(budget_bytes)
