"""Whole choices within further limits, found by HiGHS as a small integer linear program."""

import numpy as np
from scipy import sparse

from allocator.errors import LimitInfeasible
from allocator.profile import Array
from allocator.solver.hull import hull_starts
from allocator.solver.program import Choice, Limit, Program

_SECONDS = 10.0
"""Time limit of the integer program; it takes milliseconds unless limits are very tight."""

_EXACT = 1e-9
"""Relative gap at which HiGHS stops where the smallest choice is wanted."""

_ROUGH = 0.01
"""Relative gap at which HiGHS stops where any good choice will do."""


def smallest_choice(program: Program) -> Choice:
    """Return the choice of least bytes within the further limits, int64 [G].

    Without further limits, of fidelities of equal bytes the one of least loss by itself.

    Raises:
        LimitInfeasible: there is none, or none was found in time; names the limit that cannot be
            met, or all of them.
    """
    if not program.limits:
        return hull_starts(program.sizes, np.where(program.allowed, program.linear, np.inf))
    for limit in program.limits:
        least = float(np.where(program.allowed, limit.cost, np.inf).min(axis=1).sum())
        if least > limit.ceiling:
            raise LimitInfeasible(
                f"limit {limit.name!r} of {limit.most:.10g} {limit.unit} cannot be met: the least "
                f"that a plan can use is {least:.10g} {limit.unit}"
            )
    choice = _solve(program, program.sizes / program.sizes.max(), program.limits, _EXACT)
    if choice is None:
        names = ", ".join(repr(limit.name) for limit in program.limits)
        raise LimitInfeasible(
            f"no plan was found within the limits {names} together; loosen one of them"
        )
    return choice


def choice_within(program: Program, cost: Array, budget_bytes: int) -> Choice | None:
    """Return a choice within the budget and all limits, int64 [G].

    Args:
        program: gives sizes and limits.
        cost: the choice has little of it, [G, K].
        budget_bytes: the budget.

    Returns:
        The choice, or None where none was found.
    """
    budget = Limit("budget", "bytes", program.sizes.astype(np.float64), float(budget_bytes))
    unit = float(np.abs(cost).max()) or 1.0
    return _solve(program, cost / unit, (*program.limits, budget), _ROUGH)


def _solve(
    program: Program, cost: Array, limits: tuple[Limit, ...], relative_gap: float
) -> Choice | None:
    """Return a choice of little cost within limits, or None where none was found in time."""
    from scipy.optimize import (  # noqa: PLC0415  slow to import, rarely needed
        Bounds,
        LinearConstraint,
        milp,
    )

    groups, menu = program.sizes.shape
    units = [float(limit.cost.max()) or 1.0 for limit in limits]
    scaled = list(zip(limits, units, strict=True))
    within = np.stack([limit.cost.ravel() / unit for limit, unit in scaled])
    most = [limit.most / unit for limit, unit in scaled]
    sums = sparse.kron(sparse.eye(groups), np.ones((1, menu)), format="csr")
    found = milp(
        cost.ravel(),
        integrality=np.ones(groups * menu),
        bounds=Bounds(0, program.allowed.ravel().astype(np.float64)),
        constraints=[LinearConstraint(sums, 1, 1), LinearConstraint(within, -np.inf, most)],
        options={"time_limit": _SECONDS, "mip_rel_gap": relative_gap},
    )
    if found.x is None:
        return None
    choice = found.x.reshape(groups, menu).argmax(axis=1).astype(np.int64)
    # HiGHS allows limits to be exceeded by a millionth
    return choice if all(limit.used(choice) <= limit.ceiling for limit in limits) else None
