"""What layers do to each other, as a factor of small rank.

A plan gives each layer exactly one fidelity, so the product of a layer's effect with itself is the
same in every plan that gives it that fidelity: it belongs in the linear term. Only products between
different layers need a quadratic one. They are fitted by principal factors (Thurstone's common
factors, with each layer's own part left free), which leaves out several times less of them than the
leading eigenvectors of the whole matrix do at the same rank, and makes the relaxed program many
times tighter: tests/benchmarks/LOG.md.
"""

import numpy as np
from scipy.linalg import eigh

from allocator.profile import Array

RANK = 48
"""Directions in which layers couple, at most.

Never more than there are layers, or directions in all effects together.
"""

_ROUNDS = 1000
_SETTLED = 1e-3
"""Fitting ends with the round that lowers what is left out by less than this share of it."""


def between_layers(gram: Array, width: int) -> tuple[Array, float]:
    """Return (factor [rank, N], share left out) with factor' factor near `gram` wherever two different layers meet.

    The share is the root mean square of the products between layers that the factor leaves out,
    over that of all of them.

    Args:
        gram: inner products of N effects, [N, N]; those of a layer stand together.
        width: effects of each layer.
    """
    count = len(gram)
    own = np.kron(np.eye(count // width), np.ones((width, width))).astype(np.bool_)
    between = np.where(own, 0.0, gram)
    size = float(np.linalg.norm(between))
    if size == 0:
        return np.zeros((0, count)), 0.0
    rank = min(RANK, count // width, int(np.linalg.matrix_rank(gram, hermitian=True)))
    rest, left_out = np.where(own, gram / 2, 0.0), np.inf
    for _ in range(_ROUNDS):
        values, vectors = eigh(gram - rest, subset_by_index=[count - rank, count - 1])
        factor = vectors * np.sqrt(values.clip(min=0))
        off = gram - factor @ factor.T
        before, left_out = left_out, float(np.linalg.norm(np.where(own, 0.0, off))) / size
        if left_out > (1 - _SETTLED) * before:
            break
        rest = np.where(own, off, 0.0)
    used = factor[:, np.abs(factor).any(axis=0)][:, ::-1]
    return np.ascontiguousarray(used.T), left_out
