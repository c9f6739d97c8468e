"""Measured effects of the two ends of the menu, and the loss model of the whole menu that they give.

Each layer goes to the lowest and to the highest fidelity, the others staying where they are.
Fidelities between are interpolated by their output error: a fidelity whose squared error lies a
share f of the way from the context's to an end's has f times the effect of that end, plus an
uncorrelated rest of f (1 - f) times the squared effect, as for independent errors. On SmolLM2 this
is off by 0.0021 nats/token where damages are 0.0036 and the standard error of a measured one is
0.003: tests/benchmarks/LOG.md.
"""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from allocator.profile import Array
from allocator.profiling.coupling import between_layers

_FEWEST_LAYERS = 8
"""With fewer layers, there is too little to tell noise from signal by."""


@dataclass(frozen=True, slots=True)
class Effects:
    """Measured effects of the 2 L single changes.

    Layer l to the low end at 2 l, to the high end at 2 l + 1.

    Attributes:
        first: first-order loss change of each of N samples, float64 [2 L, N], [nats].
        sketch: float32 [2 L, N * width]; its inner products over N are the second-order terms.
        context_loss: mean KL of the context, [nats/token].
    """

    first: Array
    sketch: Tensor
    context_loss: float


def shrink_noise(effects: Effects) -> Effects:
    """Pull noisy first-order terms towards what the size of the effect alone would predict (empirical Bayes).

    Errors that do not know of each other give a first-order term proportional to the squared
    effect, f = b s, with b fitted through the origin for each end of the menu. What deviates from
    that line is kept as far as two halves of the tokens agree on it: with residuals r1, r2 of the
    halves over all layers, the share cov(r1, r2) / var((r1 + r2) / 2), between 0 and 1.
    """
    tokens = effects.first.shape[1]
    half = tokens // 2
    own = effects.sketch.square().sum(1).double().numpy() / tokens
    first = effects.first.copy()
    for end in (0, 1):
        mean, size = effects.first[end::2].mean(axis=1), own[end::2]
        if half == 0 or len(mean) < _FEWEST_LAYERS or not size.any():
            continue
        line = size * (mean @ size) / (size @ size)
        halves = [
            effects.first[end::2, :half].mean(axis=1) - line,
            effects.first[end::2, half:].mean(axis=1) - line,
        ]
        spread = float(np.var((halves[0] + halves[1]) / 2))
        agreed = float(np.cov(halves[0], halves[1], ddof=0)[0, 1])
        kept = min(max(agreed / spread, 0.0), 1.0) if spread > 0 else 1.0
        first[end::2] += ((1 - kept) * (line - mean))[:, None]
    return replace(effects, first=first)


def interpolation(error: Array, context: int | None) -> Array:
    """Return how far each fidelity is from the context towards the two ends of the menu, [L, K, 2], within 0 .. 1.

    Args:
        error: squared output errors, [L, K], the two ends first and last.
        context: index of the context, or None for the original weights, which have no error.
    """
    here = error[:, context] if context is not None else np.zeros(len(error))
    shares = np.zeros((*error.shape, 2))
    for side, end in enumerate((error[:, 0], error[:, -1])):
        span = (end - here)[:, None]
        shares[:, :, side] = np.divide(
            error - here[:, None], span, out=np.zeros_like(error), where=span != 0
        ).clip(0, 1)
    if context is None:
        shares[:, :, 1] = 0  # both ends lie on the same side of the original
    wrong_side = (
        shares.min(axis=2) > 0
    )  # by noise, both ends are worse than the context, or both better
    worse = error > here[:, None]
    shares[wrong_side & worse, 1] = 0
    shares[wrong_side & ~worse, 0] = 0
    shares[:, 0], shares[:, -1] = np.eye(2)
    if context is not None:
        shares[:, context] = 0
    return shares


def assemble(effects: Effects, shares: Array) -> tuple[Array, Array, float]:
    """Return (linear [L, K], factor [rank, L * K], truncation) of the loss model, see `allocator.profile`.

    Single changes to the ends keep their measured loss, whatever the rank of the factor.

    Args:
        effects: of the ends.
        shares: see `interpolation`, [L, K, 2].
    """
    samples = effects.first.shape[1]
    gram = (effects.sketch @ effects.sketch.t()).double().numpy() / samples  # [2 L, 2 L]
    base, left_out = between_layers(gram, 2)
    base = base.reshape(len(base), len(gram) // 2, 2)
    own, kept = np.diag(gram).reshape(-1, 1, 2), np.square(base).sum(axis=0)[:, None]
    first = effects.first.mean(axis=1).reshape(-1, 1, 2)
    factor = np.einsum("rle,lke->rlk", base, shares)
    linear = (shares * first + (shares * own - shares**2 * kept) / 2).sum(axis=2)
    return linear, factor.reshape(len(base), linear.size), left_out
