"""A choice during local search, and what every single change of it would do."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.profile import Array
from allocator.solver.program import Bytes, Choice, Limit, Program

_GAIN = 1e-9
"""Smallest improvement worth a change, in units of `Program.scale`."""


@dataclass(frozen=True, slots=True)
class Products:
    """Products of a program's factors that every search needs.

    Attributes:
        basis: [rank, G * D].
        gram: inner products of a group's own directions, [G, D, D].
        own: linear loss and half the squared effect of each fidelity, [G, K].
        least: improvements below it are not worth a change.
    """

    basis: Array
    gram: Array
    own: Array
    least: float

    @classmethod
    def of(cls, program: Program) -> "Products":
        """Return the products of a program."""
        basis = program.basis.transpose(1, 0, 2)
        gram = basis.transpose(0, 2, 1) @ basis
        points = program.coordinates
        half_norm = np.einsum("gkd,gde,gke->gk", points, gram, points) / 2
        return cls(
            basis=np.ascontiguousarray(program.flat_basis),
            gram=gram,
            own=program.linear + half_norm,
            least=_GAIN * program.scale(),
        )


class SearchState:
    """A choice, and what every single change of it would do, updated change by change.

    Attributes:
        program: what is chosen.
        products: of the program's factors.
        choice: int64 [G].
        used: exact bytes.
        spent: what the choice uses of each further limit.
    """

    def __init__(self, program: Program, choice: Choice, products: Products) -> None:
        """Begin at a choice."""
        self.program = program
        self.products = products
        self.choice = choice.copy()
        self._rows = np.arange(program.groups)
        here = program.coordinates[self._rows, self.choice]
        self._pull = here
        if program.rank:
            self._pull = (products.basis @ here.ravel() @ products.basis).reshape(here.shape)
        self.used = program.used_bytes(self.choice)
        self.spent = np.array([limit.used(self.choice) for limit in program.limits])

    def losses(self) -> Array:
        """Return the loss change of every single change, [G, K]; infinite where not allowed."""
        program = self.program
        loss = self.products.own
        if program.rank:
            here = program.coordinates[self._rows, self.choice][:, :, None]
            others = self._pull[:, :, None] - self.products.gram @ here
            loss = loss + (program.coordinates @ others)[:, :, 0]
        change = loss - loss[self._rows, self.choice][:, None]
        return np.where(program.allowed, change, np.inf)

    def size_changes(self) -> Bytes:
        """Return the byte change of every single change, [G, K]."""
        sizes = self.program.sizes
        return np.asarray(sizes - sizes[self._rows, self.choice][:, None], dtype=np.int64)

    def cost_changes(self, limit: Limit) -> Array:
        """Return the change of a limit's cost by every single change, [G, K]."""
        return limit.cost - limit.cost[self._rows, self.choice][:, None]

    def within(self, sizes: Bytes, budget_bytes: int) -> NDArray[np.bool_]:
        """Return which single changes lead to a choice within all limits, [G, K].

        Args:
            sizes: byte change of every single change, [G, K].
            budget_bytes: the budget.
        """
        fits = np.asarray(sizes <= budget_bytes - self.used, dtype=np.bool_)
        for limit, spent in zip(self.program.limits, self.spent, strict=True):
            fits &= self.cost_changes(limit) <= limit.ceiling - spent
        return fits

    def move(self, group: int, option: int) -> None:
        """Give one group another fidelity."""
        program = self.program
        before = int(self.choice[group])
        step = program.coordinates[group, option] - program.coordinates[group, before]
        if program.rank:
            pull = program.basis[:, group] @ step @ self.products.basis
            self._pull += pull.reshape(self._pull.shape)
        self.used += int(program.sizes[group, option] - program.sizes[group, before])
        self.spent += np.array(
            [limit.cost[group, option] - limit.cost[group, before] for limit in program.limits]
        )
        self.choice[group] = option

    def effects(self, groups: NDArray[np.int64], options: NDArray[np.int64]) -> Array:
        """Return the change of the joint effect by each of N changes, [rank, N]."""
        points = self.program.coordinates
        steps = points[groups, options] - points[groups, self.choice[groups]]
        return np.asarray(
            np.einsum("rnd,nd->rn", self.program.basis[:, groups], steps), dtype=np.float64
        )
