"""The allocation program as a reader of textbooks would write it, in CVXPY.

The reference that the fast path is tested against.

    minimise    linear . x + 1/2 |y|^2
    subject to  y = sum_g base[:, g] spans[g]' x[g]       the joint effect on the output, one number for each direction of it
                sum_k x[g, k] = 1,  x >= 0                one fidelity for each group, relaxed to shares
                x = 0 where not allowed
                sizes . x <= budget,  cost . x <= most    for every further limit

Only the budget is a parameter, so a compiled problem is solved again for another budget without
being built anew. What-ifs do not come here: `allocator.solver.curve` answers them, with the same optimum,
without CVXPY.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np

from allocator.errors import FormulationError, SolverFailed
from allocator.profile import Array
from allocator.solver.program import Program

_USABLE = {cp.OPTIMAL, cp.OPTIMAL_INACCURATE}


@dataclass(frozen=True, slots=True)
class RelaxedSolution:
    """Optimum of the relaxed program.

    Attributes:
        share: share of each fidelity in each group, rows sum to 1, float64 [G, K].
        loss: modelled loss of the mix, context loss included, [nats/token].
        price: loss that one more byte would save, [nats/token/byte], not negative.
        status: the solver's own word.
    """

    share: Array
    loss: float
    price: float
    status: str


class AllocationProblem:
    """A program in CVXPY, built once and solved for many budgets."""

    def __init__(self, program: Program) -> None:
        """Build and check the program.

        Raises:
            FormulationError: it is not a convex program with parameters where parameters may be
                (DPP).
        """
        self._program, self._loss_unit = program, program.scale()
        self._byte_unit = float(program.sizes.max())
        self._share = cp.Variable(program.sizes.shape, nonneg=True)
        self._budget = cp.Parameter(nonneg=True)
        self._within = (
            cp.sum(cp.multiply(program.sizes / self._byte_unit, self._share)) <= self._budget
        )
        objective = cp.sum(cp.multiply(program.linear / self._loss_unit, self._share))
        constraints = [cp.sum(self._share, axis=1) == 1, self._within]
        if not program.allowed.all():
            constraints.append(cp.multiply(~program.allowed, self._share) == 0)
        for limit in program.limits:
            unit = float(limit.cost.max()) or 1.0
            constraints.append(
                cp.sum(cp.multiply(limit.cost / unit, self._share)) <= limit.most / unit
            )
        if program.rank:
            effect = cp.Variable(program.rank)
            flat = cp.reshape(self._share, (program.sizes.size,), order="C")
            columns = np.einsum("rgd,gkd->rgk", program.base, program.spans).reshape(
                program.rank, -1
            )
            objective += cp.sum_squares(effect) / 2
            constraints.append(effect == (columns / self._loss_unit**0.5) @ flat)
        self._problem = cp.Problem(cp.Minimize(objective), constraints)
        if not self._problem.is_dcp(dpp=True):
            raise FormulationError(
                "the allocation program is not a disciplined parametrised convex program"
            )

    def solve(
        self, budget_bytes: int, solver: str | None = cp.CLARABEL, **options: Any
    ) -> RelaxedSolution:
        """Return the relaxed optimum within `budget_bytes`, by a solver of CVXPY's, None being its default.

        Raises:
            SolverFailed: the solver found none.
        """
        self._budget.value = budget_bytes / self._byte_unit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # of an inaccurate solution, which the status says too
                self._problem.solve(solver=solver, **options)
        except cp.SolverError as err:
            raise SolverFailed(f"{solver} failed: {err}") from err
        status = self._problem.status
        if status not in _USABLE:
            raise SolverFailed(f"{solver} says {status!r} for a budget of {budget_bytes} bytes")
        share = np.clip(self._share.value, 0, None)
        return RelaxedSolution(
            share=share / share.sum(axis=1, keepdims=True),
            loss=float(self._problem.value) * self._loss_unit + self._program.constant,
            price=max(0.0, float(self._within.dual_value)) * self._loss_unit / self._byte_unit,
            status=status,
        )
