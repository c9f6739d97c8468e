"""The `integral` signal: each layer's share of the damage, by integrating the gradient.

The path leads from the original to the quantized weights. With W the original weights, E = context
- W the errors of the context, and KL the divergence from the original model,

    share_l = integral over t in [0, 1] of <dKL/dW_l (W + t E), E_l> dt

is layer l's part of the damage that all layers cause together. The shares add up to the KL
divergence of the context, so interactions between layers are included. This is the attribution of
Aumann and Shapley; for single weights, it is the post-quantization integral of arXiv 2503.01901,
section 3. The integral is computed by Gauss-Legendre quadrature with a few nodes.

The errors of different fidelities have unrelated directions, so a share is proportional to the
squared size of the layer's error. At fidelity k,

    damage[l, k] = share_l * (output_error[l, k] / output_error[l, context] - 1).

Cost: one forward and one backward pass over the probes for each node, whatever the number of layers
and fidelities.
"""

import numpy as np
from torch import Tensor

from allocator.profile import Array
from allocator.profiling.context import ProfilingContext
from allocator.profiling.gradient_products import inner_products
from allocator.profiling.loss_model import LossModel, additive
from allocator.signals import INTEGRAL_NODES
from quantizer.importance.path import move_along_path, path_nodes
from quantizer.modules.linear import get_linear
from quantizer.running.divergence import divergence
from quantizer.running.memoized import memoized
from quantizer.running.memory import MicroBatches

STABLE_CORRELATION = 0.98
"""Measuring ends early once the shares of odd and of even batches correlate this much."""
_FEWEST_BATCHES = 4


def measure_integral(context: ProfilingContext, nodes: int = INTEGRAL_NODES) -> LossModel:
    """Return the additive loss model of the module's formula."""
    shares, losses = layer_shares(context, nodes)
    linear = damages(shares.mean(0), context)
    return additive(losses.mean(), linear, shares.shape[0] * context.spec.probes.shape[1])


def damages(share: Array, context: ProfilingContext) -> Array:
    """Return the damage [L, K] that follows from the shares [L].

    A layer without an error in the context is assumed to cause no damage at any fidelity.
    """
    error = context.output_error
    here = error[:, [context.menu.context]]
    ratio = np.divide(error, here, out=np.ones_like(error), where=here > 0)
    return np.asarray(share[:, None] * (ratio - 1), dtype=np.float64)


def layer_shares(context: ProfilingContext, nodes: int = INTEGRAL_NODES) -> tuple[Array, Array]:
    """Return (shares [windows, L], KL of the context [windows]) in [nats/token].

    Both are of the probe windows that were used. Batches are taken in order, first at the node that
    is nearest to the context. There, measuring ends when all batches are used, or when the mean
    shares of the odd and of the even batches agree (`STABLE_CORRELATION`), tested after every
    second batch. The other nodes use the same batches.

    Args:
        context: the model in the context.
        nodes: number of Gauss-Legendre nodes.
    """
    total = np.zeros(())
    used = len(context.batches)
    steps = used * nodes
    micro_batches = MicroBatches()
    from_context_to_original = reversed(list(enumerate(path_nodes(nodes))))
    for turn, (number, node) in enumerate(from_context_to_original):
        _interpolate_weights(context, node.point)
        shares: list[Array] = []
        for index in range(used):
            part = f"shares-{number}-{index:04d}"
            shares.append(_batch_shares(context, part, index, node.point, micro_batches))
            context.on_progress(turn * len(context.batches) + index + 1, steps)
            if turn == 0 and _halves_agree(shares):
                used = index + 1
                break
        total = total + node.weight * np.concatenate(shares)
    context.set_uniform()
    losses = [context.batch_loss(index) for index in range(used)]
    context.on_progress(steps, steps)
    return np.asarray(total, dtype=np.float64), np.concatenate(losses)


def _halves_agree(shares: list[Array]) -> bool:
    """Return whether the odd and the even batches give nearly the same mean shares."""
    if len(shares) < _FEWEST_BATCHES or len(shares) % 2:
        return False
    halves = [np.concatenate(shares[start::2]).mean(0) for start in (0, 1)]
    if any(half.std() == 0 for half in halves):
        return False
    return bool(np.corrcoef(halves)[0, 1] >= STABLE_CORRELATION)


def _interpolate_weights(context: ProfilingContext, point: float) -> None:
    """Set the weights to W + point * E: on the path from the original (0) to the context (1)."""
    context.set_uniform()
    model = context.runner.model
    quantized = {name: get_linear(model, name).weight.data for name in context.originals}
    move_along_path(model, context.originals, quantized, point)


def _batch_shares(
    context: ProfilingContext, part: str, index: int, point: float, micro_batches: MicroBatches
) -> Array:
    """Return <dKL/dW, E> of each window of a batch and each layer, [windows, L].

    Args:
        context: the model, with its weights at `point` of the path.
        part: the name under which the result is stored.
        index: which batch of the probes.
        point: 0 < point <= 1.
        micro_batches: how many windows fit into memory at once.
    """
    runner = context.runner
    windows, original = context.batches[index]

    def error(name: str) -> tuple[Tensor]:
        weight = get_linear(runner.model, name).weight.data
        return ((weight - context.originals[name]) / point,)

    def products(some: slice) -> Tensor:
        def head_gradient(states: Tensor) -> Tensor:
            return divergence(runner, windows[some], states, original[some])[1]

        return inner_products(runner, windows[some], head_gradient, context.layers, 1, error)

    def compute() -> dict[str, Tensor]:
        return {"products": micro_batches.cat(products, len(windows))}

    stored = memoized(context.parts, part, compute)["products"]
    return np.asarray(stored[:, :, 0].numpy(), dtype=np.float64)
