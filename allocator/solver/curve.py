"""The relaxed optimum as a function of the budget, solved at few budgets and mixed in between.

A mix of the optima of two budgets is a mix for the budgets between them, and as the loss is convex
it is nearly as good as the optimum there. How good, its bound says, and where that is not good
enough the interval is halved: the solver runs at the middle, started from the mix. Intervals and
middles depend on the program alone, so the same question has the same answer whatever was asked
before. Where damages just add up and bytes are the only limit, no solver is needed:
`allocator.solver.hull` knows the curve exactly.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from allocator.profile import Array
from allocator.solver.bound import best_price
from allocator.solver.hull import Hull
from allocator.solver.integer import smallest_choice
from allocator.solver.osqp_solver import ACCURACY, SOLVER, CompiledProgram, Relaxed, Start
from allocator.solver.program import Program

_DEEPEST = 10
"""Halvings at most: intervals of a thousandth of the range of budgets."""


class Curve(Protocol):
    """The relaxed optima of a program for all budgets.

    Attributes:
        smallest_bytes: the smallest budget that a choice within all limits fits.
        largest_bytes: bytes of the largest choice; a larger budget is as good as that.
        solver: what solves, and its version.
        solves: at how many budgets it was run.
    """

    smallest_bytes: int
    largest_bytes: int
    solver: str

    @property
    def solves(self) -> int: ...  # noqa: D102

    def at(self, budget_bytes: int) -> Relaxed:
        """Return a mix near the relaxed optimum of a budget of at least `smallest_bytes`.

        Raises:
            SolverFailed: the solver gave no usable answer.
        """
        ...

    def prepare(self) -> None:
        """Solve wherever it will be needed, so that later questions hardly ever wait for the solver.

        Raises:
            SolverFailed: the solver gave no usable answer.
        """
        ...


def curve_of(program: Program) -> Curve:
    """Return the curve of a program; nothing is solved yet.

    Raises:
        LimitInfeasible: no choice is within the further limits, whatever the budget.
        SolverFailed: the solver refuses the program.
    """
    return SolvedCurve(program) if program.rank or program.limits else ExactCurve(program)


class ExactCurve:
    """The curve of a program without coupling and without further limits."""

    solver = "hull, exact"
    solves = 0

    def __init__(self, program: Program) -> None:
        """Sort the steps of all groups."""
        self._program, self._hull = program, Hull.of(program)
        self.smallest_bytes, self.largest_bytes = program.byte_range()

    def at(self, budget_bytes: int) -> Relaxed:
        """Return the relaxed optimum."""
        share, price = self._hull.at(min(budget_bytes, self.largest_bytes))
        return Relaxed(share, self._program.loss_of_shares(share), price, (), 0.0, 0)

    def prepare(self) -> None:
        """Do nothing: there is nothing to solve."""


@dataclass(frozen=True, slots=True)
class _Anchor:
    budget_bytes: int
    start: Start
    price: float


class SolvedCurve:
    """The curve of a program as the solver finds it; halves its intervals when it is asked."""

    solver = SOLVER

    def __init__(self, program: Program) -> None:
        """Set the solver up.

        Raises:
            LimitInfeasible: no choice is within the further limits, whatever the budget.
            SolverFailed: the solver refuses the program.
        """
        self._program = program
        self._anchors: dict[int, _Anchor] = {}
        self.smallest_bytes, self.largest_bytes = program.byte_range()
        self._smallest = smallest_share(program)
        if program.limits:
            choice = smallest_choice(program)
            self._smallest = np.eye(program.sizes.shape[1])[choice]
            self.smallest_bytes = program.used_bytes(choice)
        self._compiled = CompiledProgram(program)

    @property
    def solves(self) -> int:
        """At how many budgets the solver was run."""
        return len(self._anchors)

    def at(self, budget_bytes: int) -> Relaxed:
        """Return a mix near the relaxed optimum, see `Curve.at`."""
        budget_bytes = min(budget_bytes, self.largest_bytes)
        left, right = self._low_end(), self._high_end()
        best = self._between(left, right, budget_bytes)
        for _ in range(_DEEPEST):
            middle = (left.budget_bytes + right.budget_bytes) // 2
            if best.excess <= ACCURACY or middle in (left.budget_bytes, right.budget_bytes):
                break
            anchor = self._middle(middle, left, right)
            left, right = (left, anchor) if budget_bytes <= middle else (anchor, right)
            best = _better(best, self._between(left, right, budget_bytes))
        return best

    def prepare(self) -> None:
        """Solve wherever it will be needed, see `Curve.prepare`."""
        for part in (np.arange(2**_DEEPEST) + 0.5) / 2**_DEEPEST:
            self.at(int(self.smallest_bytes + part * (self.largest_bytes - self.smallest_bytes)))

    def _between(self, left: _Anchor, right: _Anchor, budget_bytes: int) -> Relaxed:
        start, price = _mix(left, right, budget_bytes)
        return self._compiled.judge(start.primal, start.dual, budget_bytes, price, 0)

    def _low_end(self) -> _Anchor:
        """Return the smallest mix.

        Without further limits there is but one, and the price of a byte there is known.
        """
        if self.smallest_bytes not in self._anchors:
            program, budget_bytes = self._program, self.smallest_bytes
            if program.limits:
                self._solve(budget_bytes, self._compiled.begin(self._smallest, 0.0))
            else:
                gradient = np.where(
                    program.allowed, program.gradient(program.effect(self._smallest)), np.inf
                )
                price = best_price(gradient, program, budget_bytes)
                self._anchors[budget_bytes] = _Anchor(
                    budget_bytes, self._compiled.begin(self._smallest, price), price
                )
        return self._anchors[self.smallest_bytes]

    def _high_end(self) -> _Anchor:
        """Return the best mix where bytes do not matter."""
        if self.largest_bytes not in self._anchors:
            self._solve(self.largest_bytes, self._compiled.begin(self._smallest, 0.0))
        return self._anchors[self.largest_bytes]

    def _middle(self, budget_bytes: int, left: _Anchor, right: _Anchor) -> _Anchor:
        if budget_bytes not in self._anchors:
            # at the smallest mix a byte is worth far more than anywhere else, which is no start for
            # a solve
            steep = left.budget_bytes == self.smallest_bytes
            self._solve(budget_bytes, right.start if steep else _mix(left, right, budget_bytes)[0])
        return self._anchors[budget_bytes]

    def _solve(self, budget_bytes: int, start: Start) -> None:
        relaxed, end = self._compiled.solve(budget_bytes, start)
        self._anchors[budget_bytes] = _Anchor(budget_bytes, end, relaxed.price)


def smallest_share(program: Program) -> Array:
    """Return the smallest choice that is allowed as shares, [G, K].

    Of equal sizes the least harmful alone.
    """
    loss = np.where(
        program.allowed & (program.sizes == program.smallest_sizes()[:, None]),
        program.linear,
        np.inf,
    )
    return np.asarray(np.eye(program.sizes.shape[1])[loss.argmin(axis=1)], dtype=np.float64)


def _mix(left: _Anchor, right: _Anchor, budget_bytes: int) -> tuple[Start, float]:
    """Return the mix of two anchors for a budget between them, and a guess at its price."""
    span = right.budget_bytes - left.budget_bytes
    part = (budget_bytes - left.budget_bytes) / span if span else 0.0
    one, two = left.start, right.start
    start = Start(
        one.primal + part * (two.primal - one.primal),
        one.dual + part * (two.dual - one.dual),
    )
    return start, max(0.0, left.price + part * (right.price - left.price))


def _better(one: Relaxed, two: Relaxed) -> Relaxed:
    """Return the mix nearer to its bound, with the higher of the two bounds, which both hold."""
    better = one if one.excess <= two.excess else two
    return replace(better, bound=max(one.bound, two.bound))
