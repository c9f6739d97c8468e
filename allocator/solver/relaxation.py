"""The optimum of the relaxation, as the solvers of this room return it."""

from dataclasses import dataclass

from allocator.profile import Array

ACCURACY = 1e-3
"""A relaxed solution is accurate if its `RelaxedSolution.gap` is at most this."""


@dataclass(frozen=True, slots=True)
class RelaxedSolution:
    """Shares near the relaxed optimum of one budget.

    Attributes:
        share: of each fidelity in each group, rows sum to 1, [G, K].
        bound: loss that no plan within the limits can be below, [nats/token].
        price: dual price of a byte, [nats/token/byte].
        limit_prices: dual prices of one unit of each further limit.
        gap: relative duality gap, see `allocator.solver.osqp_solver`.
        iterations: of the solver.
    """

    share: Array
    bound: float
    price: float
    limit_prices: tuple[float, ...]
    gap: float
    iterations: int

    @property
    def accurate(self) -> bool:
        """Whether the solution is as near to its bound as is asked of all solutions."""
        return self.gap <= ACCURACY
