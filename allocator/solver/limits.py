"""Further linear limits of a program: a byte pool or a latency bound."""

from collections.abc import Callable, Sequence

import numpy as np

from allocator.demands.constraints import Constraints
from allocator.demands.ties import matching
from allocator.profile import Array
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

    Raises:
        RuleError: a pool holds no layer, or the latency table has a gap.
    """
    limits = []
    for pool in constraints.pools:
        inside = set(matching(layers, pool.pattern))

        def size(at: int, fidelity: Fidelity, inside: set[int] = inside) -> float:
            return (
                fidelity.weight_bytes(layers[at].out_features, layers[at].in_features)
                if at in inside
                else 0
            )

        limits.append(Limit(pool.name, "bytes", _sums(groups, fidelities, size), pool.most_bytes))
    table = constraints.latency
    if table is not None and constraints.most_latency_us is not None:
        cost = _sums(
            groups, fidelities, lambda at, fidelity: table.latency_us(layers[at], fidelity)
        )
        limits.append(Limit("latency", "us", cost, constraints.most_latency_us))
    return tuple(limits)


def _sums(
    groups: Sequence[Sequence[int]],
    fidelities: Sequence[Fidelity],
    cost: Callable[[int, Fidelity], float],
) -> Array:
    """Return the cost of each group at each fidelity, [G, K]."""
    return np.array(
        [
            [float(sum(cost(at, fidelity) for at in group)) for fidelity in fidelities]
            for group in groups
        ]
    )
