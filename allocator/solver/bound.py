"""The proof that comes with a plan: a loss that no plan within the budget can be below.

The relaxed loss f is convex, so for any mix x0 and any prices p >= 0 of a unit of each limit, every
x within the limits has

    f(x) >= f(x0) + grad . (x - x0) + sum_i p_i (cost_i . x - most_i)
         >= f(x0) - grad . x0 + sum_g min_k (grad + sum_i p_i cost_i)[g, k] - sum_i p_i most_i.

The last line is the bound, the Lagrangian dual of the program linearised at x0. It holds wherever a
solver stopped; the nearer x0 is to the relaxed optimum and p to its prices, the higher it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.profile import Array
from allocator.solver.program import Program

_BISECTIONS = 60
_NARROW = 1e-5
"""Relative width at which the search for the price ends."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A lower bound of the loss of every plan within the limits.

    Attributes:
        loss: the bound, constant included, [nats/token].
        price: loss that one more byte would save, [nats/token/byte], not negative.
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
    """Return the best bound at a mix, over all prices of a byte.

    Args:
        program: what is chosen.
        share: the mix x0, [G, K], rows sum to 1.
        budget_bytes: the budget.
        guess: a price that is likely to be near the best one.
        prices: of one unit of each further limit of the program; none are taken for zeros.
    """
    gradient, constant = linearised(program, share, prices)
    price = best_price(gradient, program, budget_bytes, guess)
    loss = (gradient + price * program.sizes).min(axis=1).sum() - price * budget_bytes
    return Bound(constant + float(loss), price)


def linearised(program: Program, share: Array, prices: Sequence[float] = ()) -> tuple[Array, float]:
    """Return (cost [G, K], constant): the loss and the priced further limits, linear around a mix.

    Infinite where not allowed.
    """
    effect = program.effect(share)
    cost, constant = program.gradient(effect), program.constant - float(effect @ effect) / 2
    for limit, price in zip(program.limits, prices, strict=False):
        cost, constant = cost + price * limit.cost, constant - price * limit.most
    return np.where(program.allowed, cost, np.inf), constant


def best_price(cost: Array, program: Program, budget_bytes: int, guess: float = 0.0) -> float:
    """Return the price of a byte at which sum_g min_k (cost + price * sizes)[g, k] - price * budget is largest.

    It is found by bisection: the slope is the bytes of the cheapest choice less the budget.

    Args:
        cost: loss of each fidelity of each group, [G, K], infinite where not allowed.
        program: its sizes are used.
        budget_bytes: the budget.
        guess: where to look first.
    """
    sizes, rows = program.sizes, np.arange(program.groups)

    def used(price: float) -> int:
        return int(sizes[rows, (cost + price * sizes).argmin(axis=1)].sum())

    if used(0.0) <= budget_bytes:
        return 0.0
    finite = cost[np.isfinite(cost)]
    steepest = (
        float(np.ptp(finite)) or 1.0
    )  # a byte is never worth more than the whole range of losses
    high = min(guess * 1.1, steepest) if guess > 0 else steepest / max(1.0, float(sizes.max()))
    low = 0.0
    while used(high) > budget_bytes and high < steepest:
        low, high = high, min(high * 4, steepest)
    if guess > 0 and low == 0.0 and used(guess / 1.1) > budget_bytes:
        low = guess / 1.1
    for _ in range(_BISECTIONS):
        if high - low <= _NARROW * high:
            break
        middle = (low + high) / 2
        if used(middle) > budget_bytes:
            low = middle
        else:
            high = middle
    return high
