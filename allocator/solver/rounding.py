"""From shares to one fidelity for each group, exactly within all limits, by local search under the coupled loss."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.errors import LimitInfeasible
from allocator.profile import Array
from allocator.solver.integer import choice_within
from allocator.solver.program import Bytes, Choice, Program

FILLED = 1e-3
"""A plan may leave this share of its budget unused.

Else changes that fit are made, best loss per byte first, see `FILL_RISE`.
"""

FILL_RISE = 1e-3
"""Filling up may raise the modelled loss by this share of it, which is within the noise of any profile; more bytes that the model
sees no use for stay unused."""

_PAIR_CANDIDATES = 256
_MOVES = 10_000
_GAIN = 1e-9
"""Smallest improvement worth a move, as a share of the largest single damage."""


@dataclass(frozen=True, slots=True)
class _Tables:
    """What the search needs of a program, worked out once.

    Attributes:
        base: [rank, G * D].
        gram: inner products of a group's own directions, [G, D, D].
        own: linear and half the squared effect of each fidelity, [G, K].
        least: improvements below it are not worth a move.
    """

    base: Array
    gram: Array
    own: Array
    least: float

    @classmethod
    def of(cls, program: Program) -> "_Tables":
        base = program.base.transpose(1, 0, 2)
        gram = base.transpose(0, 2, 1) @ base
        half_norm = np.einsum("gkd,gde,gke->gk", program.spans, gram, program.spans) / 2
        return cls(
            np.ascontiguousarray(program.flat_base),
            gram,
            program.linear + half_norm,
            _GAIN * program.scale(),
        )


class Rounder:
    """Rounds mixes of one program."""

    def __init__(self, program: Program) -> None:
        """Work out what all roundings need."""
        self.program = program
        self._tables = _Tables.of(program)

    def round(self, share: Array, price: float, budget_bytes: int) -> Choice:
        """Return a choice within all limits, near `share` and locally optimal.

        Starting from the largest share of each group, groups are lowered until all limits hold;
        then single changes and pairs of changes are made while one lowers the modelled loss; then
        what is left of the budget is spent, see `FILLED`.

        Args:
            share: relaxed solution, [G, K].
            price: loss per byte at the relaxed optimum; ranks the changes that pairs are made of.
            budget_bytes: at least the smallest choice.

        Returns:
            int64 [G].

        Raises:
            LimitInfeasible: no choice within all limits was found.
        """
        first = np.where(self.program.allowed, share, -1).argmax(axis=1).astype(np.int64)
        position = Position(self.program, first, self._tables)
        if not _repair(position, budget_bytes):
            position = Position(self.program, self._within(share, budget_bytes), self._tables)
        _search(position, price, budget_bytes)
        _fill(position, price, budget_bytes)
        return position.choice

    def _within(self, share: Array, budget_bytes: int) -> Choice:
        """Return a choice within all limits, of little loss where the loss is taken to be linear around the mix."""
        program = self.program
        found = choice_within(program, program.gradient(program.effect(share)), budget_bytes)
        if found is None:
            raise LimitInfeasible(
                "no plan was found within the budget and all limits together; loosen one of them"
            )
        return found


class Position:
    """A choice, and what every single change from it would do; kept up to date move by move.

    Attributes:
        program: what is chosen.
        tables: what was worked out of it.
        choice: int64 [G].
        used: exact bytes.
        spent: what is used of each further limit.
    """

    def __init__(self, program: Program, choice: Choice, tables: _Tables) -> None:
        """Stand at a choice."""
        self.program, self.tables, self.choice = program, tables, choice.copy()
        self._rows = np.arange(program.groups)
        here = program.spans[self._rows, self.choice]
        self._pull = (
            (tables.base @ here.ravel() @ tables.base).reshape(here.shape) if program.rank else here
        )
        self.used = program.used_bytes(self.choice)
        self.spent = np.array(
            [limit.cost[self._rows, self.choice].sum() for limit in program.limits]
        )

    def losses(self) -> Array:
        """Return the loss change of every single change, [G, K]; infinite where not allowed."""
        program, rows, choice = self.program, self._rows, self.choice
        loss = self.tables.own
        if program.rank:
            here = program.spans[rows, choice][:, :, None]
            loss = (
                loss + (program.spans @ (self._pull[:, :, None] - self.tables.gram @ here))[:, :, 0]
            )
        return np.where(program.allowed, loss - loss[rows, choice][:, None], np.inf)

    def sizes(self) -> Bytes:
        """Return the byte change of every single change, [G, K]."""
        sizes = self.program.sizes
        return np.asarray(sizes - sizes[self._rows, self.choice][:, None], dtype=np.int64)

    def within(self, sizes: Bytes, budget_bytes: int) -> NDArray[np.bool_]:
        """Return which single changes lead to a choice within all limits, [G, K]."""
        fits = np.asarray(sizes <= budget_bytes - self.used, dtype=np.bool_)
        for limit, spent in zip(self.program.limits, self.spent, strict=True):
            fits &= (
                limit.cost - limit.cost[self._rows, self.choice][:, None]
                <= limit.most * (1 + 1e-12) - spent
            )
        return fits

    def move(self, group: int, option: int) -> None:
        """Change one group."""
        program, before = self.program, int(self.choice[group])
        step = program.spans[group, option] - program.spans[group, before]
        if program.rank:
            self._pull += (program.base[:, group] @ step @ self.tables.base).reshape(
                self._pull.shape
            )
        self.used += int(program.sizes[group, option] - program.sizes[group, before])
        self.spent += np.array(
            [limit.cost[group, option] - limit.cost[group, before] for limit in program.limits]
        )
        self.choice[group] = option

    def effects(self, groups: NDArray[np.int64], options: NDArray[np.int64]) -> Array:
        """Return the change of the joint effect by each of N changes, [rank, N]."""
        spans = self.program.spans
        steps = spans[groups, options] - spans[groups, self.choice[groups]]
        return np.asarray(
            np.einsum("rnd,nd->rn", self.program.base[:, groups], steps), dtype=np.float64
        )


def _repair(position: Position, budget_bytes: int) -> bool:
    """Lower groups, least loss for what is saved first, until all limits hold.

    Return whether they do.
    """
    program, rows = position.program, np.arange(position.program.groups)
    tried: set[bytes] = set()
    while True:
        needs: list[tuple[Array, float, float]] = [
            (position.sizes().astype(np.float64), position.used - budget_bytes, budget_bytes)
        ]
        for limit, spent in zip(program.limits, position.spent, strict=True):
            change = limit.cost - limit.cost[rows, position.choice][:, None]
            needs.append((change, float(spent - limit.most * (1 + 1e-12)), limit.most))
        if all(over <= 0 for _, over, _ in needs):
            return True
        key = position.choice.tobytes()
        if key in tried or len(tried) > _MOVES:
            return False
        tried.add(key)
        saved = np.zeros(program.sizes.shape)
        for change, over, most in needs:
            # of what is saved beyond the excess nothing is gained, what goes beyond a limit anew is
            # lost
            gain = np.minimum(-change, over) if over > 0 else np.minimum(-(change + over), 0)
            saved += gain / (max(most, 1.0) if over <= 0 else over)
        losses = position.losses()
        worth = np.where(
            (saved > 0) & np.isfinite(losses), losses / np.where(saved > 0, saved, 1), np.inf
        )
        if not np.isfinite(worth).any():
            return False
        group, option = np.unravel_index(worth.argmin(), worth.shape)
        position.move(int(group), int(option))


def _search(position: Position, price: float, budget_bytes: int) -> None:
    least = position.tables.least
    for _ in range(_MOVES):
        losses, sizes = position.losses(), position.sizes()
        found = _best_single(position, losses, sizes, budget_bytes)
        if found is None or found[0] >= -least:
            found = _best_pair(position, losses, sizes, price, budget_bytes)
        if found is None or found[0] >= -least:
            break
        for group, option in found[1]:
            position.move(group, option)


def _best_single(
    position: Position, losses: Array, sizes: Bytes, budget_bytes: int
) -> tuple[float, list[tuple[int, int]]] | None:
    loss = np.where(position.within(sizes, budget_bytes), losses, np.inf)
    group, option = np.unravel_index(loss.argmin(), loss.shape)
    best = float(loss[group, option])
    return (best, [(int(group), int(option))]) if best < 0 else None


def _best_pair(
    position: Position, losses: Array, sizes: Bytes, price: float, budget_bytes: int
) -> tuple[float, list[tuple[int, int]]] | None:
    """Return the best two changes of different groups among those most promising at the price of a byte."""
    program, menu = position.program, losses.shape[1]
    score = np.where(losses == 0, np.inf, losses + price * sizes).ravel()
    same = np.flatnonzero((losses.ravel() == 0) & (sizes.ravel() != 0))
    score[same] = price * sizes.ravel()[same]
    useful = int(np.isfinite(score).sum())
    if useful == 0:
        return None
    count = min(_PAIR_CANDIDATES, useful)
    picked = np.sort(np.argpartition(score, count - 1)[:count])
    group, option = picked // menu, picked % menu
    effect = position.effects(group, option)
    loss, size = losses.ravel()[picked], sizes.ravel()[picked]
    pair = loss[:, None] + loss[None, :] + effect.T @ effect
    allowed = (size[:, None] + size[None, :] <= budget_bytes - position.used) & (
        group[:, None] != group[None, :]
    )
    for limit, spent in zip(program.limits, position.spent, strict=True):
        change = limit.cost[group, option] - limit.cost[group, position.choice[group]]
        allowed &= change[:, None] + change[None, :] <= limit.most * (1 + 1e-12) - spent
    pair = np.where(allowed, pair, np.inf)
    first, second = np.unravel_index(pair.argmin(), pair.shape)
    best = float(pair[first, second])
    if not best < 0:
        return None
    return best, [(int(group[at]), int(option[at])) for at in (first, second)]


def _fill(position: Position, price: float, budget_bytes: int) -> None:
    """Spend what is left of the budget, as far as that does no harm worth the name."""
    allowance = FILL_RISE * abs(position.program.loss(position.choice))
    while budget_bytes - position.used > FILLED * budget_bytes:
        losses, sizes = position.losses(), position.sizes()
        fits = (sizes > 0) & position.within(sizes, budget_bytes) & (losses <= allowance)
        if not fits.any():
            break
        worth = np.where(fits, losses / np.maximum(sizes, 1) - price, np.inf)
        group, option = np.unravel_index(worth.argmin(), worth.shape)
        allowance -= max(0.0, float(losses[group, option]))
        position.move(int(group), int(option))
