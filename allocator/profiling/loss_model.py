"""The result of measuring a signal: a model of the loss around a context."""

from dataclasses import dataclass

import numpy as np

from allocator.profile import Array


@dataclass(frozen=True, slots=True)
class LossModel:
    """A quadratic model of the loss around a context; `allocator.profile` has the formula.

    Attributes:
        context_loss: KL divergence of the context from the original model, [nats/token]; 0 if the
            original model is the context.
        linear: linear term of each layer and fidelity, float64 [L, K], [nats/token].
        factor: float64 [rank, L * K], [sqrt(nats/token)]; rank 0 if the damages of layers add up.
        truncation: share of the products between layers that the rank leaves out, see
            `allocator.profiling.coupling`.
        tokens: number of probe tokens that were used.
    """

    context_loss: float
    linear: Array
    factor: Array
    truncation: float
    tokens: int


def additive(context_loss: float, linear: Array, tokens: int) -> LossModel:
    """Return the model in which the damages of layers add up."""
    return LossModel(context_loss, linear, np.zeros((0, linear.size)), 0.0, tokens)
