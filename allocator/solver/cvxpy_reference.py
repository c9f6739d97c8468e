"""The relaxation as a textbook would write it, in CVXPY: the reference for the fast path.

    minimise    linear . x + 1/2 |y|^2
    subject to  y = sum_g basis[:, g] coordinates[g]' x[g]     joint effect, one row per direction
                sum_k x[g, k] = 1,  x >= 0                     shares of fidelities in each group
                x = 0 where not allowed
                sizes . x <= budget,  cost . x <= most         for every further limit

Only the budget is a parameter, so a compiled problem is solved again for another budget without
being built anew. What-ifs do not use it: `allocator.solver.curve` gives the same optimum without
importing CVXPY, and the tests compare the two.
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
class ReferenceSolution:
    """Optimum of the relaxation.

    Attributes:
        share: of each fidelity in each group, rows sum to 1, float64 [G, K].
        loss: modelled loss of the shares, context loss included, [nats/token].
        price: dual price of a byte, [nats/token/byte], not negative.
        status: of the solver, in CVXPY's words.
    """

    share: Array
    loss: float
    price: float
    status: str


class AllocationProblem:
    """A program in CVXPY, built once and solved for many budgets."""

    def __init__(self, program: Program) -> None:
        """Build and check the problem.

        Raises:
            FormulationError: it does not follow the rules of disciplined parametrised programming.
        """
        self._program = program
        self._loss_unit = program.scale()
        self._byte_unit = float(program.sizes.max())
        self._share = cp.Variable(program.sizes.shape, nonneg=True)
        self._budget = cp.Parameter(nonneg=True)
        used = cp.sum(cp.multiply(program.sizes / self._byte_unit, self._share))
        self._within = used <= self._budget
        objective = cp.sum(cp.multiply(program.linear / self._loss_unit, self._share))
        constraints = [cp.sum(self._share, axis=1) == 1, self._within]
        if not program.allowed.all():
            constraints.append(cp.multiply(~program.allowed, self._share) == 0)
        for limit in program.limits:
            unit = float(limit.cost.max()) or 1.0
            cost = cp.sum(cp.multiply(limit.cost / unit, self._share))
            constraints.append(cost <= limit.most / unit)
        if program.rank:
            effect = cp.Variable(program.rank)
            flat = cp.reshape(self._share, (program.sizes.size,), order="C")
            columns = np.einsum("rgd,gkd->rgk", program.basis, program.coordinates)
            columns = columns.reshape(program.rank, -1) / self._loss_unit**0.5
            objective += cp.sum_squares(effect) / 2
            constraints.append(effect == columns @ flat)
        self._problem = cp.Problem(cp.Minimize(objective), constraints)
        if not self._problem.is_dcp(dpp=True):
            raise FormulationError(
                "the allocation program is not a disciplined parametrised convex program"
            )

    def solve(
        self, budget_bytes: int, solver: str | None = cp.CLARABEL, **options: Any
    ) -> ReferenceSolution:
        """Return the optimum within a budget.

        Args:
            budget_bytes: the budget.
            solver: the name that CVXPY has for a solver; None lets CVXPY choose.
            options: of the solver.

        Raises:
            SolverFailed: the solver found no optimum.
        """
        self._budget.value = budget_bytes / self._byte_unit
        try:
            with warnings.catch_warnings():
                # CVXPY warns of an inaccurate solution, which the status says too
                warnings.simplefilter("ignore", UserWarning)
                self._problem.solve(solver=solver, **options)
        except cp.SolverError as err:
            raise SolverFailed(f"{solver} failed: {err}") from err
        status = self._problem.status
        if status not in _USABLE:
            raise SolverFailed(f"{solver} says {status!r} for a budget of {budget_bytes} bytes")
        share = np.clip(self._share.value, 0, None)
        return ReferenceSolution(
            share=share / share.sum(axis=1, keepdims=True),
            loss=float(self._problem.value) * self._loss_unit + self._program.constant,
            price=max(0.0, float(self._within.dual_value)) * self._loss_unit / self._byte_unit,
            status=status,
        )
