"""A lower bound of the loss of every plan within a budget: the proof that comes with a plan.

The relaxed loss f is convex, so for any shares x0 and any prices p >= 0 of one unit of each limit,
every x within the limits has

    f(x) >= f(x0) + grad . (x - x0) + sum_i p_i (cost_i . x - most_i)
         >= f(x0) - grad . x0 + sum_g min_k (grad + sum_i p_i cost_i)[g, k] - sum_i p_i most_i

with grad the gradient of f at x0. The last line is the bound: the Lagrangian dual of the program
linearised at x0. It holds wherever a solver stopped; the nearer x0 is to the relaxed optimum and p
to its dual prices, the higher it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.profile import Array
from allocator.solver.bisection import bisect_real
from allocator.solver.program import Program

_BISECTIONS = 60
_PRICE_WIDTH = 1e-5
"""Relative width at which the search for the price ends."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A lower bound of the loss of every plan within the limits.

    Attributes:
        loss: the bound, constant included, [nats/token].
        price: dual price of a byte: the loss that one more byte would save, [nats/token/byte], not
            negative.
    """

    loss: float
    price: float


def lower_bound(
    program: Program,
    share: Array,
    budget_bytes: int,
    *,
    guess: float = 0.0,
    prices: Sequence[float] = (),
) -> Bound:
    """Return the best bound at given shares, over all prices of a byte.

    Args:
        program: the program.
        share: x0, [G, K], rows sum to 1.
        budget_bytes: the budget.
        guess: a price that is likely to be near the best one.
        prices: of one unit of each further limit of the program; zeros if empty.
    """
    gradient, constant = linearised(program, share, prices)
    price = best_price(gradient, program, budget_bytes, guess)
    loss = (gradient + price * program.sizes).min(axis=1).sum() - price * budget_bytes
    return Bound(constant + float(loss), price)


def linearised(program: Program, share: Array, prices: Sequence[float] = ()) -> tuple[Array, float]:
    """Return (cost [G, K], constant) with cost . x + constant the Lagrangian linearised at `share`.

    The further limits are priced in, the budget is not. The cost is infinite where an option is not
    allowed.
    """
    effect = program.effect(share)
    cost = program.gradient(effect)
    constant = program.constant - float(effect @ effect) / 2
    for limit, price in zip(program.limits, prices, strict=False):
        cost = cost + price * limit.cost
        constant -= price * limit.most
    return np.where(program.allowed, cost, np.inf), constant


def best_price(cost: Array, program: Program, budget_bytes: int, guess: float = 0.0) -> float:
    """Return the price of a byte that gives the highest bound.

    This is the p >= 0 that maximises sum_g min_k (cost + p * sizes)[g, k] - p * budget. The
    function is concave in p with the slope (bytes of the cheapest choice - budget), so bisection
    finds it.

    Args:
        cost: of each fidelity of each group, [G, K], infinite where not allowed.
        program: gives the sizes.
        budget_bytes: the budget.
        guess: where to look first.
    """
    sizes = program.sizes

    def fits(price: float) -> bool:
        return program.used_bytes((cost + price * sizes).argmin(axis=1)) <= budget_bytes

    if fits(0.0):
        return 0.0
    finite = cost[np.isfinite(cost)]
    steepest = float(np.ptp(finite)) or 1.0  # a byte is never worth more than all losses together
    usual = steepest / max(1.0, float(sizes.max()))
    high = min(guess * 1.1, steepest) if guess > 0 else usual
    low = 0.0
    while not fits(high) and high < steepest:
        low = high
        high = min(high * 4, steepest)
    if guess > 0 and low == 0.0 and not fits(guess / 1.1):
        low = guess / 1.1
    _, high = bisect_real(fits, low, high, steps=_BISECTIONS, relative_width=_PRICE_WIDTH)
    return high
