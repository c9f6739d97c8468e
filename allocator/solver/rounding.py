"""From relaxed shares to one fidelity for each group, by local search under the coupled loss.

All limits hold exactly.
"""

import numpy as np

from allocator.errors import LimitInfeasible
from allocator.profile import Array
from allocator.solver.integer import choice_within
from allocator.solver.program import Bytes, Choice, Program
from allocator.solver.search_state import Products, SearchState

UNUSED_SHARE = 1e-3
"""A plan may leave this share of its budget unused.

If more is left, changes that fit are made, best loss per byte first, see `FILL_RISE`.
"""

FILL_RISE = 1e-3
"""Using up the budget may raise the modelled loss by this share of it.

That is within the noise of any profile. Bytes that the model has less use for stay unused.
"""

_PAIR_CANDIDATES = 256
"""Single changes of which all pairs are tried."""

_MOVES = 10_000
"""Changes made at most."""

_Move = tuple[int, int]
"""A group, and the fidelity that it gets."""


class Rounder:
    """Rounds relaxed shares of one program. Holds no state that changes."""

    def __init__(self, program: Program) -> None:
        """Compute what all roundings need."""
        self.program = program
        self._products = Products.of(program)

    def round(self, share: Array, price: float, budget_bytes: int) -> Choice:
        """Return a choice within all limits, near `share` and locally optimal.

        1. Each group gets the fidelity of its largest share.
        2. Groups are changed until all limits hold, least loss for what that saves first. Where
           that fails, an integer program finds a choice within the limits.
        3. The single change, or the pair of changes, that lowers the loss most is made, while there
           is one.
        4. The rest of the budget is used up, see `UNUSED_SHARE`.

        Args:
            share: relaxed solution, [G, K].
            price: dual price of a byte at the relaxed optimum; ranks the changes that pairs are
                made of.
            budget_bytes: at least the bytes of the smallest choice.

        Returns:
            int64 [G].

        Raises:
            LimitInfeasible: no choice within all limits was found.
        """
        first = np.where(self.program.allowed, share, -1).argmax(axis=1).astype(np.int64)
        state = SearchState(self.program, first, self._products)
        if not _repair(state, budget_bytes):
            state = SearchState(self.program, self._within(share, budget_bytes), self._products)
        _improve(state, price, budget_bytes)
        _fill(state, price, budget_bytes)
        return state.choice

    def _within(self, share: Array, budget_bytes: int) -> Choice:
        """Return a choice within all limits, of little loss by its gradient at the shares."""
        program = self.program
        choice = choice_within(program, program.gradient(program.effect(share)), budget_bytes)
        if choice is None:
            raise LimitInfeasible(
                "no plan was found within the budget and all limits together; loosen one of them"
            )
        return choice


def _repair(state: SearchState, budget_bytes: int) -> bool:
    """Change groups, least loss for what is saved first, until all limits hold.

    Return whether they do. The search ends where a choice comes back.
    """
    tried: set[bytes] = set()
    while True:
        if state.used <= budget_bytes and all(
            spent <= limit.ceiling
            for limit, spent in zip(state.program.limits, state.spent, strict=True)
        ):
            return True
        key = state.choice.tobytes()
        if key in tried or len(tried) > _MOVES:
            return False
        tried.add(key)
        saved = _saved(state, budget_bytes)
        losses = state.losses()
        useful = (saved > 0) & np.isfinite(losses)
        worth = np.where(useful, losses / np.where(saved > 0, saved, 1), np.inf)
        if not np.isfinite(worth).any():
            return False
        group, option = np.unravel_index(worth.argmin(), worth.shape)
        state.move(int(group), int(option))


def _saved(state: SearchState, budget_bytes: int) -> Array:
    """Return by how much every single change reduces the excess over all limits, [G, K].

    The excess over a limit counts as a share of itself. What a change saves beyond it counts
    nothing; what a change newly uses beyond another limit counts against it, as a share of that
    limit.
    """
    excesses: list[tuple[Array, float, float]] = [
        (state.size_changes().astype(np.float64), state.used - budget_bytes, budget_bytes)
    ]
    for limit, spent in zip(state.program.limits, state.spent, strict=True):
        excesses.append((state.cost_changes(limit), float(spent - limit.ceiling), limit.most))
    saved = np.zeros(state.program.sizes.shape)
    for change, excess, most in excesses:
        if excess > 0:
            saved += np.minimum(-change, excess) / excess
        else:
            saved += np.minimum(-(change + excess), 0) / max(most, 1.0)
    return saved


def _improve(state: SearchState, price: float, budget_bytes: int) -> None:
    """Make the best single change or pair of changes while it lowers the loss."""
    least = state.products.least
    for _ in range(_MOVES):
        losses = state.losses()
        sizes = state.size_changes()
        found = _best_single(state, losses, sizes, budget_bytes)
        if found is None or found[0] >= -least:
            found = _best_pair(state, losses, sizes, price, budget_bytes)
        if found is None or found[0] >= -least:
            break
        for group, option in found[1]:
            state.move(group, option)


def _best_single(
    state: SearchState, losses: Array, sizes: Bytes, budget_bytes: int
) -> tuple[float, list[_Move]] | None:
    """Return the single change of least loss with its loss change, if that is negative."""
    loss = np.where(state.within(sizes, budget_bytes), losses, np.inf)
    group, option = np.unravel_index(loss.argmin(), loss.shape)
    best = float(loss[group, option])
    return (best, [(int(group), int(option))]) if best < 0 else None


def _best_pair(
    state: SearchState, losses: Array, sizes: Bytes, price: float, budget_bytes: int
) -> tuple[float, list[_Move]] | None:
    """Return the best changes of two groups with their loss change, if that is negative.

    Pairs are made of the `_PAIR_CANDIDATES` changes of least loss and price of bytes together.
    """
    program = state.program
    score = np.where(losses == 0, np.inf, losses + price * sizes).ravel()
    same = np.flatnonzero((losses.ravel() == 0) & (sizes.ravel() != 0))
    score[same] = price * sizes.ravel()[same]
    useful = int(np.isfinite(score).sum())
    if useful == 0:
        return None
    count = min(_PAIR_CANDIDATES, useful)
    picked = np.sort(np.argpartition(score, count - 1)[:count])
    group, option = np.divmod(picked, losses.shape[1])
    effect = state.effects(group, option)
    loss = losses.ravel()[picked]
    size = sizes.ravel()[picked]
    pair = loss[:, None] + loss[None, :] + effect.T @ effect
    fits = size[:, None] + size[None, :] <= budget_bytes - state.used
    allowed = fits & (group[:, None] != group[None, :])
    for limit, spent in zip(program.limits, state.spent, strict=True):
        change = limit.cost[group, option] - limit.cost[group, state.choice[group]]
        allowed &= change[:, None] + change[None, :] <= limit.ceiling - spent
    pair = np.where(allowed, pair, np.inf)
    first, second = np.unravel_index(pair.argmin(), pair.shape)
    best = float(pair[first, second])
    if not best < 0:
        return None
    return best, [(int(group[at]), int(option[at])) for at in (first, second)]


def _fill(state: SearchState, price: float, budget_bytes: int) -> None:
    """Use up the rest of the budget as far as that hardly raises the loss, see `FILL_RISE`."""
    allowance = FILL_RISE * abs(state.program.loss(state.choice))
    while budget_bytes - state.used > UNUSED_SHARE * budget_bytes:
        losses = state.losses()
        sizes = state.size_changes()
        fits = (sizes > 0) & state.within(sizes, budget_bytes) & (losses <= allowance)
        if not fits.any():
            break
        worth = np.where(fits, losses / np.maximum(sizes, 1) - price, np.inf)
        group, option = np.unravel_index(worth.argmin(), worth.shape)
        allowance -= max(0.0, float(losses[group, option]))
        state.move(int(group), int(option))
