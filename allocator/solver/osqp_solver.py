"""The relaxation as OSQP solves it: set up once, then only the bounds change with the budget.

The variables are the shares x [G, K], the effects u [G, D] of the groups and the joint effect
y [rank], see `allocator.solver.program`. This makes the Hessian diagonal and leaves the coupling to
`rank` rows of the constraint matrix. Bytes are counted above the smallest choice, in units of the
largest of them; losses in units of `Program.scale`.

A solution is judged by its duality gap, which holds wherever the solver stops, and not by the
solver's residuals. With the prices p_i and the excess v_i = p_i (cost_i . x - most_i) of the budget
and of each further limit, it is

    gap = max(loss(x) + sum_i v_i - bound, 0.1 max_i |v_i|) / max(|loss(x)|, 0.01 range)

where `range` is the difference of the losses of the smallest and the largest choice. The second
argument of the first maximum bounds how far a limit is missed, or left unused, despite its price.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import osqp
from scipy import sparse

from allocator.errors import SolverFailed
from allocator.profile import Array
from allocator.solver.bound import lower_bound
from allocator.solver.program import Limit, Program
from allocator.solver.relaxation import ACCURACY, RelaxedSolution

SOLVER = f"OSQP {version('osqp')}"

_RANGE_SHARE = 0.01
"""Share of the range of losses that the gap is relative to where the loss is near zero."""

_COMPLEMENTARITY_WEIGHT = 0.1
"""Weight, in the gap, of the value of what a limit is missed by or leaves unused.

It is small because the error in the loss that this causes is of second order.
"""

_CHUNK = 50
"""Iterations between two evaluations of the gap."""

_CHUNKS = 20
_RHO = 0.3
"""Step size that every solve begins with.

The one that an earlier solve ended with is too small at the start of the next.
"""

_RHO_EVERY = 50
"""Iterations between changes of the step size.

Counted, not timed, so that the same question has the same answer.
"""

_SETTINGS = {
    "verbose": False,
    "eps_abs": 1e-9,
    "eps_rel": 1e-9,
    "max_iter": _CHUNK,
    "check_termination": 0,
    "rho": _RHO,
    "adaptive_rho": 1,
    "adaptive_rho_interval": _RHO_EVERY,
    "polishing": False,
}


@dataclass(frozen=True, slots=True)
class Iterate:
    """Where a solve begins, or ended, in OSQP's own vectors."""

    primal: Array
    dual: Array


class OsqpProgram:
    """One program, set up in OSQP. Not thread-safe: a solve changes the state of OSQP."""

    def __init__(self, program: Program) -> None:
        """Set OSQP up; only the budget is left open.

        Raises:
            SolverFailed: OSQP refuses the program.
        """
        self.program = program
        self._loss_unit = program.scale()
        self._smallest = program.smallest_sizes()[:, None]
        self._least_scale = max(_RANGE_SHARE * _loss_range(program), 1e-6 * self._loss_unit)
        excess = np.where(program.allowed, program.sizes - self._smallest, 0)
        self._byte_unit = float(excess.max()) or 1.0
        self._rows = _Rows.of(program)
        matrix = _constraints(program, excess / self._byte_unit, self._loss_unit)
        width = matrix.shape[1]
        curvature = np.zeros(width)
        curvature[width - program.rank :] = 1
        cost = np.zeros(width)
        cost[: program.linear.size] = program.linear.ravel() / self._loss_unit
        low, high = self._bounds(0)
        self._solver: Any = osqp.OSQP()
        try:
            self._solver.setup(
                sparse.diags([curvature], [0], format="csc"), cost, matrix, low, high, **_SETTINGS
            )
        except (ValueError, osqp.OSQPException) as err:
            raise SolverFailed(f"{SOLVER} refuses the program: {err}") from err

    def start_from(self, share: Array, price: float) -> Iterate:
        """Return a start from shares [G, K] and a price of a byte, with fitting multipliers."""
        program = self.program
        unit = self._loss_unit**0.5
        inner = np.einsum("gkd,gk->gd", program.coordinates, share).ravel() / unit
        joint = program.effect(share) / unit
        pull = joint @ program.flat_basis
        cost = program.gradient(joint * unit) / self._loss_unit
        cost = cost + price / self._loss_unit * (program.sizes - self._smallest)
        least = np.where(program.allowed, cost, np.inf).min(axis=1)
        rows = self._rows
        dual = np.zeros(rows.total)
        dual[: rows.budget] = -least
        dual[rows.budget] = price * self._byte_unit / self._loss_unit
        dual[rows.effects : rows.shares] = np.r_[pull, joint]
        dual[rows.shares :] = (least[:, None] - cost).ravel()
        return Iterate(np.r_[share.ravel(), inner, joint], dual)

    def solve(
        self, budget_bytes: int, start: Iterate, accuracy: float = ACCURACY, chunks: int = _CHUNKS
    ) -> tuple[RelaxedSolution, Iterate]:
        """Return the best solution of a run of the solver, and where it was found.

        Args:
            budget_bytes: the budget.
            start: where to begin.
            accuracy: gap at which the run ends.
            chunks: runs of `_CHUNK` iterations at most.

        Raises:
            SolverFailed: the solver gave values that are not finite.
        """
        low, high = self._bounds(budget_bytes)
        self._solver.update_settings(rho=_RHO)
        self._solver.warm_start(start.primal, start.dual)
        self._solver.update(l=low, u=high)
        best: tuple[RelaxedSolution, Iterate] | None = None
        price = self._price(start.dual)
        for chunk in range(1, chunks + 1):
            found = self._solver.solve(raise_error=False)
            if not np.isfinite(found.x).all() or not np.isfinite(found.y).all():
                raise SolverFailed(
                    f"{SOLVER} says {found.info.status!r} for a budget of {budget_bytes} bytes"
                )
            iterate = Iterate(found.x.copy(), found.y.copy())
            price = price or self._price(iterate.dual)
            relaxed = self.evaluate(iterate, budget_bytes, price, chunk * _CHUNK)
            price = relaxed.price
            if best is None or relaxed.gap < best[0].gap:
                best = relaxed, iterate
            if relaxed.gap <= accuracy:
                break
        if best is None:
            raise SolverFailed(f"{SOLVER} was given no iterations")
        return best

    def evaluate(
        self, iterate: Iterate, budget_bytes: int, price: float, iterations: int = 0
    ) -> RelaxedSolution:
        """Return the solution at an iterate, with its bound and its gap.

        Args:
            iterate: the solver's vectors; shares are clipped and scaled to sum to 1.
            budget_bytes: the budget.
            price: a price of a byte that is likely to be near the best one.
            iterations: that led to the iterate.
        """
        program = self.program
        share = self._shares(iterate.primal)
        prices = [
            max(0.0, float(iterate.dual[self._rows.limits + at])) * self._loss_unit / _unit(limit)
            for at, limit in enumerate(program.limits)
        ]
        bound = lower_bound(program, share, budget_bytes, guess=price, prices=prices)
        loss = program.loss_of_shares(share)
        values = [bound.price * (float((program.sizes * share).sum()) - budget_bytes)]
        values += [
            cost * (float((limit.cost * share).sum()) - limit.most)
            for cost, limit in zip(prices, program.limits, strict=True)
        ]
        missed = _COMPLEMENTARITY_WEIGHT * float(np.abs(values).max())
        gap = max(loss + sum(values) - bound.loss, missed) / max(abs(loss), self._least_scale)
        return RelaxedSolution(share, bound.loss, bound.price, tuple(prices), gap, iterations)

    def _shares(self, primal: Array) -> Array:
        """Return shares that are allowed, not negative, and sum to 1 in each group."""
        allowed = self.program.allowed
        share = primal[: allowed.size].reshape(allowed.shape).clip(0, None)
        share = np.where(allowed, share, 0)
        total = share.sum(axis=1, keepdims=True)
        even = allowed / allowed.sum(axis=1, keepdims=True)
        return np.asarray(np.divide(share, total, out=even, where=total > 0))

    def _price(self, dual: Array) -> float:
        return max(0.0, float(dual[self._rows.budget])) * self._loss_unit / self._byte_unit

    def _bounds(self, budget_bytes: int) -> tuple[Array, Array]:
        """Return the lower and upper bounds of all rows."""
        program = self.program
        rows = self._rows
        low = np.zeros(rows.total)
        high = np.zeros(rows.total)
        low[: rows.budget] = 1
        high[: rows.budget] = 1
        low[rows.budget : rows.effects] = -np.inf
        high[rows.budget] = (budget_bytes - int(self._smallest.sum())) / self._byte_unit
        for at, limit in enumerate(program.limits):
            high[rows.limits + at] = limit.most / _unit(limit)
        high[rows.shares :] = np.where(program.allowed.ravel(), np.inf, 0)
        return low, high


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where each kind of constraint begins; first comes the sum of shares of each group."""

    budget: int
    limits: int
    effects: int
    shares: int
    total: int

    @classmethod
    def of(cls, program: Program) -> "_Rows":
        limits = program.groups + 1
        effects = limits + len(program.limits)
        shares = effects + program.flat_basis.shape[1] + program.rank
        return cls(program.groups, limits, effects, shares, shares + program.linear.size)


def _loss_range(program: Program) -> float:
    """Return the difference of the losses of the smallest and the largest choice."""
    smallest = np.where(program.allowed, -program.sizes, -np.inf).argmax(axis=1)
    return abs(program.loss(program.largest_choice()) - program.loss(smallest))


def _unit(limit: Limit) -> float:
    return float(limit.cost.max()) or 1.0


def _constraints(program: Program, excess: Array, loss_unit: float) -> Any:
    """Return the constraint matrix, sparse.

    Rows: sums of shares, budget, limits, effects of groups, joint effect, single shares.
    Columns: x, u, y.
    """
    groups, menu, directions = program.coordinates.shape
    inner = groups * directions
    sums = sparse.kron(sparse.eye(groups), np.ones((1, menu)))
    costs: Sequence[Array] = [excess, *(limit.cost / _unit(limit) for limit in program.limits)]
    flat_costs = sparse.csc_matrix(np.stack([cost.ravel() for cost in costs]))
    shares = sparse.eye(groups * menu)
    if not inner:
        return sparse.bmat([[sums], [flat_costs], [shares]], format="csc")
    spans = sparse.block_diag([sparse.csc_matrix(each.T) for each in program.coordinates])
    basis = sparse.csc_matrix(program.flat_basis)
    return sparse.bmat(
        [
            [sums, None, None],
            [flat_costs, None, None],
            [spans / loss_unit**0.5, -sparse.eye(inner), None],
            [None, basis, -sparse.eye(program.rank)],
            [shares, None, None],
        ],
        format="csc",
    )
