"""From shares to one fidelity for each layer, exactly within the budget, by local search under the coupled loss."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.profile import Array, Profile

Choice = NDArray[np.int64]

FILLED = 1e-3
"""A plan may leave this share of its budget unused; further changes are made while they fit, best loss per byte first."""
_PAIR_CANDIDATES = 256
_MOVES = 10_000
_GAIN = 1e-9
"""Smallest improvement worth a move, as a share of the largest single damage."""


@dataclass(frozen=True, slots=True)
class _Moves:
    """All single changes from a choice: loss change, byte change and change of the effect; [L, K], [L, K], [rank, L, K]."""

    loss: Array
    size: NDArray[np.int64]
    effect: Array


def round_shares(profile: Profile, share: Array, price: float, budget_bytes: int) -> Choice:
    """Return menu indices of a plan that fits the budget, near `share` and locally optimal.

    Starting from the largest share of each layer, layers are lowered until the plan fits; then single changes and pairs of
    changes are made while one lowers the modelled loss; then what is left of the budget is spent.

    Args:
        profile: effects and sizes.
        share: relaxed solution, [L, K].
        price: loss per byte at the relaxed optimum; ranks the changes that pairs are made of.
        budget_bytes: at least the smallest plan.

    Returns:
        int64 [L].
    """
    choice = share.argmax(axis=1).astype(np.int64)
    choice = _repair(profile, choice, budget_bytes)
    choice = _search(profile, choice, price, budget_bytes)
    return _fill(profile, choice, price, budget_bytes)


def _moves(profile: Profile, choice: Choice) -> _Moves:
    layers, menu = profile.linear.shape
    rows = np.arange(layers)
    columns = profile.factor.reshape(-1, layers, menu)
    effect = columns - columns[:, rows, choice][:, :, None]
    joint = columns[:, rows, choice].sum(axis=1)
    loss = profile.linear - profile.linear[rows, choice][:, None]
    loss = loss + np.tensordot(joint, effect, axes=1) + np.square(effect).sum(axis=0) / 2
    sizes = profile.weight_bytes
    return _Moves(loss, sizes - sizes[rows, choice][:, None], effect)


def _used(profile: Profile, choice: Choice) -> int:
    return int(profile.weight_bytes[np.arange(len(choice)), choice].sum())


def _repair(profile: Profile, choice: Choice, budget_bytes: int) -> Choice:
    """Lower layers, least loss for the bytes first, until the plan fits."""
    choice = choice.copy()
    while (excess := _used(profile, choice) - budget_bytes) > 0:
        moves = _moves(profile, choice)
        saved = np.minimum(-moves.size, excess)  # bytes saved beyond the excess are worth nothing
        worth = np.where(moves.size < 0, moves.loss / np.maximum(saved, 1), np.inf)
        layer, option = np.unravel_index(worth.argmin(), worth.shape)
        choice[layer] = option
    return choice


def _search(profile: Profile, choice: Choice, price: float, budget_bytes: int) -> Choice:
    choice = choice.copy()
    least = _GAIN * float(np.abs(profile.damage()).max())
    for _ in range(_MOVES):
        slack = budget_bytes - _used(profile, choice)
        moves = _moves(profile, choice)
        found = _best_single(moves, slack)
        if found is None or found[0] >= -least:
            found = _best_pair(moves, slack, price)
        if found is None or found[0] >= -least:
            break
        for layer, option in found[1]:
            choice[layer] = option
    return choice


def _best_single(moves: _Moves, slack: int) -> tuple[float, list[tuple[int, int]]] | None:
    loss = np.where(moves.size <= slack, moves.loss, np.inf)
    layer, option = np.unravel_index(loss.argmin(), loss.shape)
    best = float(loss[layer, option])
    return (best, [(int(layer), int(option))]) if best < 0 else None


def _best_pair(moves: _Moves, slack: int, price: float) -> tuple[float, list[tuple[int, int]]] | None:
    """Return the best two changes of different layers among those most promising at the price of a byte."""
    layers, menu = moves.loss.shape
    score = (moves.loss + price * moves.size).ravel()
    changes = np.abs(moves.effect).any(axis=0).ravel() | (moves.size.ravel() != 0)
    score = np.where(changes, score, np.inf)
    picked = np.argsort(score, kind="stable")[: min(_PAIR_CANDIDATES, int(changes.sum()))]
    if len(picked) == 0:
        return None
    effect = moves.effect.reshape(-1, layers * menu)[:, picked]
    loss, size, layer = moves.loss.ravel()[picked], moves.size.ravel()[picked], picked // menu
    pair = loss[:, None] + loss[None, :] + effect.T @ effect
    allowed = (size[:, None] + size[None, :] <= slack) & (layer[:, None] != layer[None, :])
    pair = np.where(allowed, pair, np.inf)
    first, second = np.unravel_index(pair.argmin(), pair.shape)
    best = float(pair[first, second])
    if not best < 0:
        return None
    return best, [(int(at // menu), int(at % menu)) for at in (picked[first], picked[second])]


def _fill(profile: Profile, choice: Choice, price: float, budget_bytes: int) -> Choice:
    """Spend what is left of the budget: bytes unspent buy nothing, and a modelled rise of the loss here is within the noise."""
    choice = choice.copy()
    while (slack := budget_bytes - _used(profile, choice)) > FILLED * budget_bytes:
        moves = _moves(profile, choice)
        fits = (moves.size > 0) & (moves.size <= slack)
        if not fits.any():
            break
        worth = np.where(fits, moves.loss / np.maximum(moves.size, 1) - price, np.inf)
        layer, option = np.unravel_index(worth.argmin(), worth.shape)
        choice[layer] = option
    return choice
