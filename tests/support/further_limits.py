"""Limits besides the budget, for profiles of five layers."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from allocator.answers.allocation import Allocation
from allocator.demands.constraints import LatencyTable, Pool
from allocator.demands.rules import Rule
from allocator.profile import Array, Profile

FIRST_BLOCK = [0, 1]
SECOND_OF_EACH_BLOCK = [1, 3]
"""Layers of a profile of five that `blocks.0.*` and `*.linear1` name."""

KINDS: list[dict[str, Any]] = [
    {},
    {"rank": 0},
    {"rising": True},
    {"coupling": 0.3},
    {"spread": 4.0},
    {"duplicated": True},
]
ANY_SEED = st.integers(0, 10**6)
SHARE = st.floats(0, 1)


def rules(*texts: str) -> tuple[Rule, ...]:
    return tuple(Rule.parse(text) for text in texts)


def pool_at(profile: Profile, name: str, pattern: str, inside: list[int], share: float) -> Pool:
    """Return a pool that holds the smallest plan of its layers at share 0, the largest at 1."""
    sizes = profile.weight_bytes[inside]
    low, high = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    return Pool(name, pattern, low + round(share * (high - low)))


def table_of(profile: Profile, times: Array) -> LatencyTable:
    """Return a latency table with these times of each layer at each fidelity, [L, K]."""
    return LatencyTable(
        tuple(
            (layer.name, fidelity.name, float(time))
            for layer, row in zip(profile.layers, times, strict=True)
            for fidelity, time in zip(profile.fidelities, row, strict=True)
        )
    )


def times_by_bytes(profile: Profile) -> Array:
    """Return times of layers that are read from memory: a fixed part and one for each byte."""
    return 3 + profile.weight_bytes / 1000


def latency_at(profile: Profile, times: Array, share: float) -> dict[str, Any]:
    """Return constraints that only the fastest plan meets at share 0, and any plan at 1."""
    low, high = times.min(axis=1).sum(), times.max(axis=1).sum()
    return {
        "latency": table_of(profile, times),
        "most_latency_us": float(low + share * (high - low)),
    }


def time_of(profile: Profile, times: Array, allocation: Allocation) -> float:
    rows = [profile.fidelities.index(fidelity) for fidelity in allocation.plan.fidelities]
    return float(times[np.arange(len(rows)), rows].sum())


def bytes_in(allocation: Allocation, inside: list[int]) -> int:
    return sum(allocation.plan.layer_bytes[at] for at in inside)
