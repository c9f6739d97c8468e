"""The coupling of layers, as a factor of small rank.

A plan gives each layer exactly one fidelity. The product of a layer's effect with itself is
therefore the same in every plan that gives the layer that fidelity: it belongs into the linear
term. Only products between different layers need a quadratic term. They are fitted by principal
factors (Thurstone's common factors, with each layer's own part left free). At the same rank, this
leaves out several times less of the products than the leading eigenvectors of the whole matrix do,
and it makes the relaxed program many times tighter: tests/benchmarks/LOG.md, "the solver, on the
profile of `output` with full coupling".
"""

import numpy as np
from scipy.linalg import eigh

from allocator.profile import Array

RANK = 48
"""Largest rank of the factor.

The rank never exceeds the number of layers, nor the rank of the Gram matrix.
"""

_ROUNDS = 1000
_LEAST_DECREASE = 1e-3
"""Fitting ends when a round lowers the share that is left out by less than this share of it."""


def between_layers(gram: Array, width: int) -> tuple[Array, float]:
    """Return (factor [rank, N], truncation), factor' factor near `gram` between different layers.

    The truncation is the root mean square of the products between layers that the factor leaves
    out, divided by that of all of them.

    Args:
        gram: inner products of N effects, [N, N]; the effects of a layer are adjacent.
        width: number of effects of each layer.
    """
    count = len(gram)
    own = np.kron(np.eye(count // width), np.ones((width, width))).astype(np.bool_)
    between = np.where(own, 0.0, gram)
    size = float(np.linalg.norm(between))
    if size == 0:
        return np.zeros((0, count)), 0.0
    rank = min(RANK, count // width, int(np.linalg.matrix_rank(gram, hermitian=True)))
    rest = np.where(own, gram / 2, 0.0)
    truncation = np.inf
    for _ in range(_ROUNDS):
        values, vectors = eigh(gram - rest, subset_by_index=[count - rank, count - 1])
        factor = vectors * np.sqrt(values.clip(min=0))
        off = gram - factor @ factor.T
        before = truncation
        truncation = float(np.linalg.norm(np.where(own, 0.0, off))) / size
        if truncation > (1 - _LEAST_DECREASE) * before:
            break
        rest = np.where(own, off, 0.0)
    used = factor[:, np.abs(factor).any(axis=0)][:, ::-1]
    return np.ascontiguousarray(used.T), truncation
