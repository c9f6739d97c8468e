"""The relaxed program as OSQP solves it: set up once, then only bounds change.

Variables are the shares x, the groups' effects u and the joint effect y, so that the Hessian is
diagonal and the coupling stands in `rank` rows, see `allocator.solver.program`. Bytes are counted above
the smallest choice and losses in units of the largest one. A solve is judged by the bound that its
mix gives, which holds wherever the solver stops, not by the solver's residuals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import osqp
from numpy.typing import NDArray
from scipy import sparse

from allocator.errors import SolverFailed
from allocator.profile import Array
from allocator.solver.bound import lower_bound
from allocator.solver.program import Program

SOLVER = f"OSQP {version('osqp')}"

ACCURACY = 1e-3
"""A mix is good enough when its loss is above its bound by no more than this share of the loss, see `_RANGE`."""

_RANGE = 0.01
"""Where the loss is near zero, accuracy is a share of this part of the losses from the smallest to the largest choice instead."""

_OFF = 0.1
"""Weight of what a mix uses more or less of a limit than it holds, at its price, in how good it is.

As second-order error.
"""

_CHUNK = 50
"""Iterations between looks at the bound."""

_CHUNKS = 20
_RHO = 0.3
"""Step size that every solve begins with.

One that an earlier solve ended with is too small at the start of the next.
"""

_RHO_EVERY = 50
"""Iterations between changes of the step size.

Counted, not timed, so that the same question has the same answer.
"""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a solve begins, or ended, in OSQP's own vectors."""

    primal: Array
    dual: Array


@dataclass(frozen=True, slots=True)
class Relaxed:
    """A mix near the relaxed optimum of one budget.

    Attributes:
        share: rows sum to 1, [G, K].
        bound: loss that no plan within the limits can be below, [nats/token].
        price: of a byte, [nats/token/byte].
        limit_prices: of one unit of each further limit.
        excess: loss of the mix, and what it uses more or less than the limits hold at its price,
            above the bound, or a part of that price alone if it is more, see `_OFF`; as a share of
            the loss.
        iterations: of the solver.
    """

    share: Array
    bound: float
    price: float
    limit_prices: tuple[float, ...]
    excess: float
    iterations: int


class CompiledProgram:
    """One program in OSQP's hands."""

    def __init__(self, program: Program) -> None:
        """Set the solver up; only the budget is left open.

        Raises:
            SolverFailed: OSQP refuses the program.
        """
        self.program = program
        self._loss_unit = program.scale()
        self._smallest = program.smallest_sizes()[:, None]
        ends = [
            program.loss(np.where(program.allowed, sizes, -np.inf).argmax(axis=1))
            for sizes in (program.sizes, -program.sizes)
        ]
        self._least_scale = max(_RANGE * abs(ends[0] - ends[1]), 1e-6 * self._loss_unit)
        excess = np.where(program.allowed, program.sizes - self._smallest, 0)
        self._byte_unit = float(excess.max()) or 1.0
        self._rows = _Rows.of(program)
        matrix = _constraints(program, excess / self._byte_unit, self._loss_unit)
        width = matrix.shape[1]
        curvature = sparse.diags(
            [np.r_[np.zeros(width - program.rank), np.ones(program.rank)]], [0], format="csc"
        )
        cost = np.r_[
            program.linear.ravel() / self._loss_unit, np.zeros(width - program.linear.size)
        ]
        low, high = self._bounds(0)
        self._solver: Any = osqp.OSQP()
        try:
            self._solver.setup(
                curvature, cost, matrix, low, high,
                verbose=False, eps_abs=1e-9, eps_rel=1e-9, max_iter=_CHUNK, check_termination=0,
                rho=_RHO, adaptive_rho=1, adaptive_rho_interval=_RHO_EVERY, polishing=False,
            )  # fmt: skip
        except (ValueError, osqp.OSQPException) as err:
            raise SolverFailed(f"{SOLVER} refuses the program: {err}") from err

    def begin(self, share: Array, price: float) -> Start:
        """Return a start from a mix [G, K] and a price of a byte, with the multipliers that fit them."""
        program, unit = self.program, self._loss_unit**0.5
        inner = np.einsum("gkd,gk->gd", program.spans, share).ravel() / unit
        joint = program.effect(share) / unit
        pull = joint @ program.flat_base
        cost = program.gradient(joint * unit) / self._loss_unit
        cost = cost + price / self._loss_unit * (program.sizes - self._smallest)
        least = np.where(program.allowed, cost, np.inf).min(axis=1)
        dual = np.zeros(self._rows.total)
        dual[: self._rows.budget] = -least
        dual[self._rows.budget] = price * self._byte_unit / self._loss_unit
        dual[self._rows.shares - len(inner) - len(joint) : self._rows.shares] = np.r_[pull, joint]
        dual[self._rows.shares :] = (least[:, None] - cost).ravel()
        return Start(np.r_[share.ravel(), inner, joint], dual)

    def solve(
        self, budget_bytes: int, start: Start, accuracy: float = ACCURACY, chunks: int = _CHUNKS
    ) -> tuple[Relaxed, Start]:
        """Return a mix near the relaxed optimum, and where the solver ended.

        Raises:
            SolverFailed: the solver gave values that are not finite.
        """
        low, high = self._bounds(budget_bytes)
        self._solver.update_settings(rho=_RHO)
        self._solver.warm_start(start.primal, start.dual)
        self._solver.update(l=low, u=high)
        best, price = None, self._price(start.dual)
        for chunk in range(1, chunks + 1):
            found = self._solver.solve(raise_error=False)
            if not np.isfinite(found.x).all() or not np.isfinite(found.y).all():
                raise SolverFailed(
                    f"{SOLVER} says {found.info.status!r} for a budget of {budget_bytes} bytes"
                )
            relaxed = self.judge(
                found.x, found.y, budget_bytes, price or self._price(found.y), chunk * _CHUNK
            )
            price = relaxed.price
            if best is None or relaxed.excess < best[0].excess:
                best = relaxed, Start(found.x.copy(), found.y.copy())
            if relaxed.excess <= accuracy:
                break
        if best is None:
            raise SolverFailed(f"{SOLVER} was not asked")
        return best

    def judge(
        self, primal: Array, dual: Array, budget_bytes: int, price: float, iterations: int
    ) -> Relaxed:
        """Return the mix in the solver's vectors with the bound that it gives."""
        program = self.program
        share = primal[: program.linear.size].reshape(program.linear.shape).clip(0, None)
        share = np.where(program.allowed, share, 0)
        total = share.sum(axis=1, keepdims=True)
        share = np.divide(
            share,
            total,
            out=program.allowed / program.allowed.sum(axis=1, keepdims=True),
            where=total > 0,
        )
        rows = self._rows
        prices = [
            max(0.0, float(dual[rows.limits + at])) * self._loss_unit / _limit_unit(limit.cost)
            for at, limit in enumerate(program.limits)
        ]
        bound = lower_bound(program, share, budget_bytes, guess=price, prices=prices)
        loss = program.loss_of_shares(share)
        over = [bound.price * (float((program.sizes * share).sum()) - budget_bytes)]
        over += [
            cost * (float((limit.cost * share).sum()) - limit.most)
            for cost, limit in zip(prices, program.limits, strict=True)
        ]
        excess = max(loss + sum(over) - bound.loss, _OFF * float(np.abs(over).max())) / max(
            abs(loss), self._least_scale
        )
        return Relaxed(share, bound.loss, bound.price, tuple(prices), excess, iterations)

    def _price(self, dual: Array) -> float:
        return max(0.0, float(dual[self._rows.budget])) * self._loss_unit / self._byte_unit

    def _bounds(self, budget_bytes: int) -> tuple[Array, Array]:
        program, rows = self.program, self._rows
        low, high = np.zeros(rows.total), np.zeros(rows.total)
        low[: rows.budget] = high[: rows.budget] = 1
        low[rows.budget : rows.limits + len(program.limits)] = -np.inf
        high[rows.budget] = (budget_bytes - int(self._smallest.sum())) / self._byte_unit
        for at, limit in enumerate(program.limits):
            high[rows.limits + at] = limit.most / _limit_unit(limit.cost)
        high[rows.shares :] = np.where(program.allowed.ravel(), np.inf, 0)
        return low, high


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where each kind of constraint begins: one share for each group first, then these."""

    budget: int
    limits: int
    shares: int
    total: int

    @classmethod
    def of(cls, program: Program) -> "_Rows":
        limits = program.groups + 1
        shares = (
            limits + len(program.limits) + program.groups * program.spans.shape[2] + program.rank
        )
        return cls(program.groups, limits, shares, shares + program.linear.size)


def _limit_unit(cost: Array) -> float:
    return float(cost.max()) or 1.0


def _constraints(program: Program, excess: Array, loss_unit: float) -> Any:
    """Return the constraint matrix: sums, budget, limits, groups' effects, joint effect, shares."""
    groups, menu, directions = program.spans.shape
    inner, unit = groups * directions, loss_unit**0.5
    sums = sparse.kron(sparse.eye(groups), np.ones((1, menu)))
    costs: Sequence[NDArray[np.float64]] = [
        excess,
        *(limit.cost / _limit_unit(limit.cost) for limit in program.limits),
    ]
    spans = (
        sparse.block_diag([sparse.csc_matrix(span.T) for span in program.spans]) if inner else None
    )
    blocks = [
        [sums, None, None],
        [sparse.csc_matrix(np.stack([cost.ravel() for cost in costs])), None, None],
        *([[spans / unit, -sparse.eye(inner), None]] if inner else []),
        *(
            [[None, sparse.csc_matrix(program.flat_base), -sparse.eye(program.rank)]]
            if inner
            else []
        ),
        [sparse.eye(groups * menu), None, None],
    ]
    if not inner:
        blocks = [row[:1] for row in blocks]
    return sparse.bmat(blocks, format="csc")
