"""Plans drawn at random around a budget, to check a profile's predictions on what it never saw."""

import numpy as np

from allocator.profile import Array, Profile
from allocator.solver.program import Choice

SPREAD = (0.92, 1.0, 1.2)
"""Sizes of the drawn plans, as shares of the budget, by turns."""

_LARGEST_PRICE, _BISECTIONS = 1e4, 80
"""Prices in units of the score's range for the bytes of the smallest layer."""


def random_plans(profile: Profile, budget_bytes: int, count: int, seed: int) -> list[Choice]:
    """Return menu indices [L] of `count` plans, each as large as its share of the budget allows.

    By turns, plans are drawn layer by layer, which mixes good and bad choices evenly, and with
    preferences for kinds of layers and for ranges of blocks, as real plans have them.

    Args:
        profile: layers and menu; what it measured is not used.
        budget_bytes: around which plans are drawn.
        count: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    return [
        _fitted(
            profile,
            _scores(profile, rng, structured=bool(turn % 2)),
            int(SPREAD[turn // 2 % len(SPREAD)] * budget_bytes),
        )
        for turn in range(count)
    ]


def _scores(profile: Profile, rng: np.random.Generator, *, structured: bool) -> Array:
    """Return made-up damages [L, K]."""
    if not structured:
        return rng.standard_normal(profile.linear.shape)
    kinds = sorted({layer.kind for layer in profile.layers})
    taste = dict(zip(kinds, rng.standard_normal(len(kinds)), strict=True))
    blocks = max(layer.block for layer in profile.layers) + 1
    phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 2)
    weights = np.array([layer.weights for layer in profile.layers])[:, None]
    liking = np.array(
        [
            taste[layer.kind]
            + np.sin(phase + 2 * np.pi * waves * layer.block / blocks)
            + rng.standard_normal() / 2
            for layer in profile.layers
        ]
    )[:, None]
    return np.asarray(weights * np.exp(liking / 2) * 4.0 ** (-8 * profile.weight_bytes / weights))


def _fitted(profile: Profile, score: Array, budget_bytes: int) -> Choice:
    """Return the choice of least score + price x bytes, at the lowest price at which it fits the budget; prices may be negative."""
    sizes = profile.weight_bytes
    rows = np.arange(len(sizes))
    unit = float(np.ptp(score)) / float(sizes.min())

    def choose(price: float) -> Choice:
        return np.asarray((score + price * unit * sizes).argmin(1), dtype=np.int64)

    low, high = -_LARGEST_PRICE, _LARGEST_PRICE
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sizes[rows, choose(middle)].sum() > budget_bytes:
            low = middle
        else:
            high = middle
    return choose(high)
