"""Measured effects of the two ends of the menu, and the loss model of the whole menu from them.

A signal measures each layer at the lowest and at the highest fidelity only; the other layers keep
the context's fidelity, or their original weights. The fidelities between are interpolated by output
error. If the squared output error of a fidelity lies a share f of the way from the context's to an
end's, the fidelity has f times the effect of that end, plus an uncorrelated remainder of f (1 - f)
times the squared effect, as for independent errors. For SmolLM2, interpolated damages are off by
0.0021 nats/token. The damages are 0.0036, and a measured one has a standard error of 0.003:
tests/benchmarks/LOG.md, "what interpolation costs".
"""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from allocator.profile import Array
from allocator.profiling.coupling import between_layers

_FEWEST_LAYERS = 8
"""With fewer layers, noise cannot be told from signal."""


@dataclass(frozen=True, slots=True)
class EndEffects:
    """Measured effects of the 2 L single changes.

    Change 2 l takes layer l to the lowest fidelity of the menu, change 2 l + 1 to the highest.

    Attributes:
        first: first-order loss change of each of N samples, float64 [2 L, N], [nats].
        sketch: float32 [2 L, N * width]; inner products of rows, divided by N, are the second-order
            terms.
        context_loss: mean KL divergence of the context, [nats/token].
    """

    first: Array
    sketch: Tensor
    context_loss: float


def shrink_noise(effects: EndEffects) -> EndEffects:
    """Pull noisy first-order terms towards what the size of the effect predicts.

    This is empirical Bayes. Independent errors give a first-order term that is proportional to the
    squared effect: f = b s, with b fitted through the origin for each end of the menu. The
    deviation from this line is kept as far as two halves of the tokens agree on it. With r1 and r2
    the deviations in the two halves over all layers, the share kept is
    cov(r1, r2) / var((r1 + r2) / 2), between 0 and 1.
    """
    tokens = effects.first.shape[1]
    half = tokens // 2
    squared = effects.sketch.square().sum(1).double().numpy() / tokens
    first = effects.first.copy()
    for end in (0, 1):
        samples = effects.first[end::2]
        mean = samples.mean(axis=1)
        size = squared[end::2]
        if half == 0 or len(mean) < _FEWEST_LAYERS or not size.any():
            continue
        line = size * (mean @ size) / (size @ size)
        halves = [part.mean(axis=1) - line for part in (samples[:, :half], samples[:, half:])]
        spread = float(np.var((halves[0] + halves[1]) / 2))
        agreed = float(np.cov(halves[0], halves[1], ddof=0)[0, 1])
        kept = min(max(agreed / spread, 0.0), 1.0) if spread > 0 else 1.0
        first[end::2] += ((1 - kept) * (line - mean))[:, None]
    return replace(effects, first=first)


def interpolation(error: Array, context: int | None) -> Array:
    """Return how far each fidelity is from the context towards the menu's ends, [L, K, 2], 0 .. 1.

    Args:
        error: squared output errors, [L, K], the two ends first and last.
        context: index of the context's fidelity, or None if the context is the original model,
            whose output error is 0.
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
    # Because of noise, both ends may be worse than the context, or both better.
    both_sides = shares.min(axis=2) > 0
    worse = error > here[:, None]
    shares[both_sides & worse, 1] = 0
    shares[both_sides & ~worse, 0] = 0
    shares[:, 0], shares[:, -1] = np.eye(2)
    if context is not None:
        shares[:, context] = 0
    return shares


def menu_effects(effects: EndEffects, shares: Array) -> tuple[Array, Array, float]:
    """Return (linear [L, K], factor [rank, L * K], truncation), see `allocator.profile`.

    Single changes to the ends keep their measured loss, whatever the rank of the factor.

    Args:
        effects: effects of the ends.
        shares: result of `interpolation`, [L, K, 2].
    """
    samples = effects.first.shape[1]
    gram = (effects.sketch @ effects.sketch.t()).double().numpy() / samples  # [2 L, 2 L]
    base, truncation = between_layers(gram, 2)
    base = base.reshape(len(base), len(gram) // 2, 2)
    own = np.diag(gram).reshape(-1, 1, 2)
    kept = np.square(base).sum(axis=0)[:, None]
    first = effects.first.mean(axis=1).reshape(-1, 1, 2)
    factor = np.einsum("rle,lke->rlk", base, shares)
    linear = (shares * first + (shares * own - shares**2 * kept) / 2).sum(axis=2)
    return linear, factor.reshape(len(base), linear.size), truncation
