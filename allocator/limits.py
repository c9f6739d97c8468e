"""Further limits of a plan beside its bytes, and whether anything is within them."""

import numpy as np

from allocator.errors import LimitInfeasible
from allocator.profile import Array
from allocator.program import Program


def smallest_mix(program: Program) -> Array:
    """Return the mix [G, K] of least bytes within the further limits: a linear program.

    Raises:
        LimitInfeasible: there is none; names the limit that cannot be met, or all of them.
    """
    from scipy import sparse  # noqa: PLC0415  most programs have no further limit
    from scipy.optimize import linprog  # noqa: PLC0415

    groups, menu = program.sizes.shape
    for limit in program.limits:
        least = float(np.where(program.allowed, limit.cost, np.inf).min(axis=1).sum())
        if least > limit.most * (1 + 1e-12):
            raise LimitInfeasible(
                f"limit {limit.name!r} of {limit.most:.10g} {limit.unit} cannot be met: the least that a plan can use is "
                f"{least:.10g} {limit.unit}"
            )
    units = [float(limit.cost.max()) or 1.0 for limit in program.limits]
    found = linprog(
        program.sizes.ravel() / program.sizes.max(),
        A_ub=np.stack([limit.cost.ravel() / unit for limit, unit in zip(program.limits, units, strict=True)]),
        b_ub=[limit.most / unit for limit, unit in zip(program.limits, units, strict=True)],
        A_eq=sparse.kron(sparse.eye(groups), np.ones((1, menu)), format="csr"),
        b_eq=np.ones(groups),
        bounds=np.stack([np.zeros(groups * menu), program.allowed.ravel()], axis=1),
        method="highs",
    )
    if not found.success:
        names = ", ".join(repr(limit.name) for limit in program.limits)
        raise LimitInfeasible(f"limits {names} cannot be met together: {found.message}")
    return np.asarray(found.x.reshape(groups, menu).clip(0, 1), dtype=np.float64)
