"""Whether anything is within further limits, and what is.

A small integer program, solved by HiGHS.
"""

import numpy as np

from allocator.errors import LimitInfeasible
from allocator.profile import Array
from allocator.solver.program import Choice, Program

_SECONDS = 10.0
"""Time that the integer program is given; it takes milliseconds unless limits are very tight."""

_FIRST = 1e-9
"""Relative gap at which the smallest choice counts as found.

A plan within limits is found at the first that is.
"""


def smallest_choice(program: Program) -> Choice:
    """Return the choice of least bytes within the further limits.

    Raises:
        LimitInfeasible: there is none, or none was found in time; names the limit that cannot be
            met, or all of them.
    """
    for limit in program.limits:
        least = float(np.where(program.allowed, limit.cost, np.inf).min(axis=1).sum())
        if least > limit.most * (1 + 1e-12):
            raise LimitInfeasible(
                f"limit {limit.name!r} of {limit.most:.10g} {limit.unit} cannot be met: the least "
                "that a plan can use is "
                f"{least:.10g} {limit.unit}"
            )
    found = _solve(program, program.sizes / program.sizes.max(), None, _FIRST)
    if found is None:
        names = ", ".join(repr(limit.name) for limit in program.limits)
        raise LimitInfeasible(
            f"no plan was found within the limits {names} together; loosen one of them"
        )
    return found


def choice_within(program: Program, cost: Array, budget_bytes: int) -> Choice | None:
    """Return a choice within the budget and all limits, of little `cost` [G, K], or None where none was found."""
    return _solve(program, cost / (float(np.abs(cost).max()) or 1.0), budget_bytes, 0.01)


def _solve(program: Program, cost: Array, budget_bytes: int | None, gap: float) -> Choice | None:
    from scipy import sparse  # noqa: PLC0415  most programs have no further limit
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415

    groups, menu = program.sizes.shape
    rows = [(limit.cost, limit.most) for limit in program.limits]
    if budget_bytes is not None:
        rows.append((program.sizes.astype(np.float64), float(budget_bytes)))
    units = [float(row.max()) or 1.0 for row, _ in rows]
    within = np.stack([row.ravel() / unit for (row, _), unit in zip(rows, units, strict=True)])
    most = [amount / unit for (_, amount), unit in zip(rows, units, strict=True)]
    sums = sparse.kron(sparse.eye(groups), np.ones((1, menu)), format="csr")
    found = milp(
        cost.ravel(),
        integrality=np.ones(groups * menu),
        bounds=Bounds(0, program.allowed.ravel().astype(np.float64)),
        constraints=[LinearConstraint(sums, 1, 1), LinearConstraint(within, -np.inf, most)],
        options={"time_limit": _SECONDS, "mip_rel_gap": gap},
    )
    if found.x is None:
        return None
    choice = found.x.reshape(groups, menu).argmax(axis=1).astype(np.int64)
    places = np.arange(groups)
    exact = all(
        row[places, choice].sum() <= amount * (1 + 1e-12) for row, amount in rows
    )  # HiGHS allows a millionth more
    return choice if exact else None
