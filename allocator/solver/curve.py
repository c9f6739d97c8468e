"""The relaxed optimum as a function of the budget: solved at few budgets, mixed in between.

The shares of two budgets' optima, mixed linearly, are shares for the budgets between them. As the
loss is convex, they are nearly optimal there, and their bound says how nearly. Where that is not
enough, the interval is halved: the solver runs at the middle, started from the mix. Intervals and
middles depend on the program alone, so the same question has the same answer whatever was asked
before. Without coupling and further limits no solver is needed: `allocator.solver.hull` gives the
curve exactly.
"""

from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol

import numpy as np

from allocator.solver.bound import best_price
from allocator.solver.hull import Hull
from allocator.solver.integer import smallest_choice
from allocator.solver.osqp_solver import SOLVER, Iterate, OsqpProgram
from allocator.solver.program import Choice, Program
from allocator.solver.relaxation import RelaxedSolution

_DEEPEST = 10
"""Halvings at most: down to a thousandth of the range of budgets."""


class Curve(Protocol):
    """The relaxed optima of a program for all budgets.

    Several threads may ask the same curve.

    Attributes:
        smallest_bytes: the smallest budget that a choice within all limits fits.
        largest_bytes: bytes of the largest choice; a larger budget is as good as that.
        solver: name and version of what solves.
        solves: number of budgets at which the solver was run.
    """

    smallest_bytes: int
    largest_bytes: int
    solver: str

    @property
    def solves(self) -> int: ...  # noqa: D102

    def at(self, budget_bytes: int) -> RelaxedSolution:
        """Return a solution near the relaxed optimum of a budget of at least `smallest_bytes`.

        Raises:
            SolverFailed: the solver gave no usable answer.
        """
        ...

    def prepare(self) -> None:
        """Solve wherever that will be needed, so that later questions hardly wait for the solver.

        Raises:
            SolverFailed: the solver gave no usable answer.
        """
        ...


def curve_of(program: Program, smallest: Choice | None = None) -> Curve:
    """Return the curve of a program; nothing is solved yet.

    Args:
        program: the program.
        smallest: `smallest_choice` of the program, where it is known.

    Raises:
        LimitInfeasible: no choice is within the further limits, whatever the budget.
        SolverFailed: the solver refuses the program.
    """
    if program.rank or program.limits:
        return SolvedCurve(program, smallest)
    return ExactCurve(program)


class ExactCurve:
    """The curve of a program without coupling and without further limits."""

    solver = "hull, exact"
    solves = 0

    def __init__(self, program: Program) -> None:
        """Sort the steps of all groups."""
        self._program = program
        self._hull = Hull.of(program)
        self.smallest_bytes, self.largest_bytes = program.byte_range()

    def at(self, budget_bytes: int) -> RelaxedSolution:
        """Return the relaxed optimum."""
        share, price = self._hull.at(min(budget_bytes, self.largest_bytes))
        return RelaxedSolution(share, self._program.loss_of_shares(share), price, (), 0.0, 0)

    def prepare(self) -> None:
        """Do nothing: there is nothing to solve."""


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A budget at which the relaxation was solved.

    Attributes:
        budget_bytes: the budget.
        end: where the solver ended.
        price: of a byte, [nats/token/byte].
    """

    budget_bytes: int
    end: Iterate
    price: float


class SolvedCurve:
    """The curve of a program that needs the solver; halves its intervals as it is asked."""

    solver = SOLVER

    def __init__(self, program: Program, smallest: Choice | None = None) -> None:
        """Set the solver up, see `curve_of`.

        Raises:
            LimitInfeasible: no choice is within the further limits, whatever the budget.
            SolverFailed: the solver refuses the program.
        """
        self._program = program
        self._anchors: dict[int, _Anchor] = {}
        self._lock = Lock()
        if smallest is None:
            smallest = smallest_choice(program)
        self._smallest = program.one_hot(smallest)
        self.smallest_bytes = program.used_bytes(smallest)
        _, self.largest_bytes = program.byte_range()
        self._osqp = OsqpProgram(program)

    @property
    def solves(self) -> int:
        """Number of budgets at which the solver was run."""
        return len(self._anchors)

    def at(self, budget_bytes: int) -> RelaxedSolution:
        """Return a solution near the relaxed optimum, see `Curve.at`."""
        budget_bytes = min(budget_bytes, self.largest_bytes)
        with self._lock:
            left, right = self._low_end(), self._high_end()
            best = self._between(left, right, budget_bytes)
            for _ in range(_DEEPEST):
                middle = (left.budget_bytes + right.budget_bytes) // 2
                if best.accurate or middle in (left.budget_bytes, right.budget_bytes):
                    break
                anchor = self._middle(middle, left, right)
                left, right = (left, anchor) if budget_bytes <= middle else (anchor, right)
                best = _better(best, self._between(left, right, budget_bytes))
        return best

    def prepare(self) -> None:
        """Solve wherever that will be needed, see `Curve.prepare`."""
        for part in (np.arange(2**_DEEPEST) + 0.5) / 2**_DEEPEST:
            self.at(int(self.smallest_bytes + part * (self.largest_bytes - self.smallest_bytes)))

    def _between(self, left: _Anchor, right: _Anchor, budget_bytes: int) -> RelaxedSolution:
        iterate, price = _mix(left, right, budget_bytes)
        return self._osqp.evaluate(iterate, budget_bytes, price)

    def _low_end(self) -> _Anchor:
        """Return the anchor at the smallest budget.

        Without further limits only one choice fits it, and its price of a byte is known.
        """
        budget_bytes = self.smallest_bytes
        if budget_bytes not in self._anchors:
            program = self._program
            if program.limits:
                self._solve(budget_bytes, self._osqp.start_from(self._smallest, 0.0))
            else:
                gradient = program.gradient(program.effect(self._smallest))
                cost = np.where(program.allowed, gradient, np.inf)
                price = best_price(cost, program, budget_bytes)
                end = self._osqp.start_from(self._smallest, price)
                self._anchors[budget_bytes] = _Anchor(budget_bytes, end, price)
        return self._anchors[budget_bytes]

    def _high_end(self) -> _Anchor:
        """Return the anchor at the largest budget, where bytes do not matter."""
        if self.largest_bytes not in self._anchors:
            self._solve(self.largest_bytes, self._osqp.start_from(self._smallest, 0.0))
        return self._anchors[self.largest_bytes]

    def _middle(self, budget_bytes: int, left: _Anchor, right: _Anchor) -> _Anchor:
        if budget_bytes not in self._anchors:
            # a byte is worth far more at the smallest choice than anywhere else, so that a mix with
            # it is no start for a solve
            steep = left.budget_bytes == self.smallest_bytes
            self._solve(budget_bytes, right.end if steep else _mix(left, right, budget_bytes)[0])
        return self._anchors[budget_bytes]

    def _solve(self, budget_bytes: int, start: Iterate) -> None:
        relaxed, end = self._osqp.solve(budget_bytes, start)
        self._anchors[budget_bytes] = _Anchor(budget_bytes, end, relaxed.price)


def _mix(left: _Anchor, right: _Anchor, budget_bytes: int) -> tuple[Iterate, float]:
    """Return the mix of two anchors for a budget between them, and a guess at its price."""
    span = right.budget_bytes - left.budget_bytes
    part = (budget_bytes - left.budget_bytes) / span if span else 0.0
    primal = left.end.primal + part * (right.end.primal - left.end.primal)
    dual = left.end.dual + part * (right.end.dual - left.end.dual)
    return Iterate(primal, dual), max(0.0, left.price + part * (right.price - left.price))


def _better(one: RelaxedSolution, two: RelaxedSolution) -> RelaxedSolution:
    """Return the solution of smaller gap, with the higher of the two bounds: both hold."""
    better = one if one.gap <= two.gap else two
    return replace(better, bound=max(one.bound, two.bound))
