"""The allocation program: which mix of fidelities has the least modelled loss within a budget of bytes.

    minimise    linear . x + 1/2 |y|^2
    subject to  y = factor x                      the joint effect on the output, one number for each direction of it
                sum_k x[l, k] = 1,  x >= 0        one fidelity for each layer, relaxed to shares
                weight_bytes . x <= budget

The variable y keeps the Hessian diagonal, whatever the coupling. Only the budget is a parameter, so a compiled problem is
solved again for another budget without being built anew.
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import cvxpy as cp
import numpy as np

from allocator.errors import FormulationError, SolverFailed
from allocator.profile import Array, Profile

_USABLE = {cp.OPTIMAL, cp.OPTIMAL_INACCURATE}
_TOLERANCE = 1e-5
_ITERATIONS = 20_000


@dataclass(frozen=True, slots=True)
class RelaxedSolution:
    """Optimum of the relaxed program.

    Attributes:
        share: share of each fidelity in each layer, rows sum to 1, float64 [L, K].
        loss: modelled loss of the mix, context loss included, [nats/token]. A lower bound for every plan, to the solver's accuracy.
        price: loss that one more byte would save, [nats/token/byte], not negative.
        status: the solver's own word.
        solver: its name and version.
        iterations: how many it took.
    """

    share: Array
    loss: float
    price: float
    status: str
    solver: str
    iterations: int


class AllocationProblem:
    """The program of one profile, built once and solved for many budgets."""

    def __init__(self, profile: Profile) -> None:
        """Build and check the program.

        Raises:
            FormulationError: it is not a convex program with parameters where parameters may be (DPP).
        """
        self._profile = profile
        sizes = profile.weight_bytes
        damage = np.abs(profile.damage()).max()
        self._loss_unit = float(damage) if damage > 0 else 1.0
        self._byte_unit = float(sizes.max())
        self._share = cp.Variable(sizes.shape, nonneg=True)
        self._budget = cp.Parameter(nonneg=True)
        self._within = cp.sum(cp.multiply(sizes / self._byte_unit, self._share)) <= self._budget
        objective = cp.sum(cp.multiply(profile.linear / self._loss_unit, self._share))
        constraints = [cp.sum(self._share, axis=1) == 1, self._within]
        if len(profile.factor):
            effect = cp.Variable(len(profile.factor))
            flat = cp.reshape(self._share, (sizes.size,), order="C")
            objective += cp.sum_squares(effect) / 2
            constraints.append(effect == (profile.factor / self._loss_unit**0.5) @ flat)
        self._problem = cp.Problem(cp.Minimize(objective), constraints)
        if not self._problem.is_dcp(dpp=True):
            raise FormulationError("the allocation program is not a disciplined parametrised convex program")

    def solve(self, budget_bytes: int) -> RelaxedSolution:
        """Return the relaxed optimum within `budget_bytes`.

        Raises:
            SolverFailed: the solver found none.
        """
        self._budget.value = budget_bytes / self._byte_unit
        solver = self._solve(cp.OSQP, eps_abs=_TOLERANCE, eps_rel=_TOLERANCE, max_iter=_ITERATIONS, warm_start=True)
        if self._problem.status != cp.OPTIMAL:
            solver = self._solve(cp.CLARABEL)  # OSQP's adaptive step can cycle on small programs
        status = self._problem.status
        if status not in _USABLE:
            raise SolverFailed(f"{solver} says {status!r} for a budget of {budget_bytes} bytes")
        stats: Any = self._problem.solver_stats
        share = np.clip(self._share.value, 0, None)
        return RelaxedSolution(
            share=share / share.sum(axis=1, keepdims=True),
            loss=float(self._problem.value) * self._loss_unit + self._profile.context_loss,
            price=max(0.0, float(self._within.dual_value)) * self._loss_unit / self._byte_unit,
            status=status,
            solver=solver,
            iterations=int(stats.num_iters),
        )

    def _solve(self, solver: str, **options: Any) -> str:
        """Solve with one solver; return its name and version."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of an inaccurate solution, which the status says too
                self._problem.solve(solver=solver, **options)
        except cp.SolverError as err:
            raise SolverFailed(f"{solver} failed: {err}") from err
        return f"{solver} {version(solver.lower())}"
