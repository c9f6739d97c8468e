"""Random plans around a budget, to check the predictions of a profile."""

import numpy as np

from allocator.profile import Array, Profile
from allocator.solver.program import Choice

BUDGET_SHARES = (0.92, 1.0, 1.2)
"""Sizes of the plans as shares of the budget, in turns."""

_LARGEST_PRICE = 1e4
"""In units of the score's range per bytes of the smallest layer."""
_BISECTIONS = 80


def random_plans(profile: Profile, budget_bytes: int, count: int, seed: int) -> list[Choice]:
    """Return menu indices [L] of `count` plans, each as large as its share of the budget allows.

    Every second plan draws each layer independently, which mixes good and bad choices evenly. The
    others prefer some kinds of layers and some ranges of blocks, as real plans do.

    Args:
        profile: gives layers and menu; its measurements are not used.
        budget_bytes: the plans have about this size.
        count: number of plans.
        seed: seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    plans: list[Choice] = []
    for turn in range(count):
        score = _scores(profile, rng, structured=bool(turn % 2))
        share = BUDGET_SHARES[turn // 2 % len(BUDGET_SHARES)]
        plans.append(_fitted(profile, score, int(share * budget_bytes)))
    return plans


def _scores(profile: Profile, rng: np.random.Generator, *, structured: bool) -> Array:
    """Return random damages [L, K]."""
    if not structured:
        return rng.standard_normal(profile.linear.shape)
    kinds = sorted({layer.kind for layer in profile.layers})
    preference = dict(zip(kinds, rng.standard_normal(len(kinds)), strict=True))
    blocks = max(layer.block for layer in profile.layers) + 1
    phase = rng.uniform(0, 2 * np.pi)
    waves = rng.uniform(0.5, 2)
    weights = np.array([layer.weights for layer in profile.layers])[:, None]
    exponent = np.array(
        [
            preference[layer.kind]
            + np.sin(phase + 2 * np.pi * waves * layer.block / blocks)
            + rng.standard_normal() / 2
            for layer in profile.layers
        ]
    )[:, None]
    bits = 8 * profile.weight_bytes / weights
    return np.asarray(weights * np.exp(exponent / 2) * 4.0 ** (-bits))


def _fitted(profile: Profile, score: Array, budget_bytes: int) -> Choice:
    """Return the choice of least score + price * bytes, at the lowest price that fits the budget.

    Prices may be negative.
    """
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
