"""The further linear constraints of a program: byte pools and a latency limit."""

from collections.abc import Sequence

import numpy as np

from allocator.demands.constraints import Constraints, Pool
from allocator.demands.ties import matching_layers
from allocator.profile import Array, layer_sizes
from allocator.solver.program import Limit
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec


def limits_of(
    constraints: Constraints,
    layers: Sequence[LayerSpec],
    fidelities: Sequence[Fidelity],
    groups: Sequence[Sequence[int]],
) -> tuple[Limit, ...]:
    """Return the further limits of a program.

    Args:
        constraints: as the user states them.
        layers: all layers.
        fidelities: the menu.
        groups: indices of layers that share a fidelity.

    Raises:
        RuleError: a pool holds no layer, or the latency table has a gap.
    """
    limits = []
    for pool in constraints.pools:
        cost = _summed(_pool_bytes(pool, layers, fidelities), groups)
        limits.append(Limit(pool.name, "bytes", cost, pool.most_bytes))
    table = constraints.latency
    if table is not None and constraints.most_latency_us is not None:
        times = [[table.latency_us(layer, fidelity) for fidelity in fidelities] for layer in layers]
        cost = _summed(np.array(times), groups)
        limits.append(Limit("latency", "us", cost, constraints.most_latency_us))
    return tuple(limits)


def _pool_bytes(pool: Pool, layers: Sequence[LayerSpec], fidelities: Sequence[Fidelity]) -> Array:
    """Return the bytes in a pool of each layer at each fidelity, [L, K]."""
    inside = np.zeros((len(layers), 1))
    inside[matching_layers(layers, pool.pattern)] = 1
    return inside * layer_sizes(layers, fidelities)


def _summed(cost: Array, groups: Sequence[Sequence[int]]) -> Array:
    """Return costs of layers [L, K], summed over groups [G, K]."""
    return np.array([cost[list(group)].sum(axis=0) for group in groups])
