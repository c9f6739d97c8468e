"""The `gradient` signal: inner products of the loss gradient with weight changes, by probe window.

With g_n the gradient of the mean negative log-likelihood of probe window n in the context, and D
the change of layer l's weights from the context to an end of the menu,

    s_n[l, end] = <g_n, D>
    first-order term   = mean over n of s_n
    second-order terms = T * mean over n of s_n s_n'

where T is the number of tokens of a window. If tokens are independent, T times the mean of s_n s_n'
is the empirical Fisher matrix of one token. Its diagonal terms are those of MPQCO (ICCV 2021). The
Gram matrix couples all pairs of layers and is positive semidefinite by construction.

Cost: one forward and one backward pass over the probes, and two products for each layer.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from allocator.profile import Array
from allocator.profiling.context import ProfilingContext
from allocator.profiling.end_effects import EndEffects, interpolation, menu_effects
from allocator.profiling.gradient_products import inner_products
from allocator.profiling.loss_model import LossModel
from quantizer.modules.linear import get_linear
from quantizer.running.divergence import cross_entropy_gradient
from quantizer.running.memoized import memoized
from quantizer.running.memory import MicroBatches

Changes = Callable[[str], tuple[Tensor, ...]]


def measure_gradient(context: ProfilingContext) -> LossModel:
    """Return the coupled loss model of the module's formula."""
    effects = window_effects(context)
    shares = interpolation(context.output_error, context.menu.context)
    linear, factor, truncation = menu_effects(effects, shares)
    tokens = context.spec.probes.numel()
    return LossModel(effects.context_loss, linear, factor, truncation, tokens)


def window_effects(context: ProfilingContext) -> EndEffects:
    """Return the inner products of all probe windows as effects, one sample for each window."""
    changes = _changes(context)
    micro_batches = MicroBatches()
    products: list[Tensor] = []
    losses: list[Array] = []
    batches = context.batches
    for index, (windows, _) in enumerate(batches):

        def compute(windows: Tensor = windows) -> dict[str, Tensor]:
            def products_of(some: slice) -> Tensor:
                return _products(context, windows[some], changes)

            return {"products": micro_batches.cat(products_of, len(windows))}

        stored = memoized(context.parts, f"products-{index:04d}", compute)["products"]
        products.append(stored.flatten(1))  # [windows, 2 L]
        losses.append(context.batch_loss(index))
        context.on_progress(index + 1, len(batches))
    samples = torch.cat(products).t()  # [2 L, N]
    sketch = (samples * context.spec.probes.shape[1] ** 0.5).float()
    return EndEffects(samples.numpy(), sketch, float(np.concatenate(losses).mean()))


def _changes(context: ProfilingContext) -> Changes:
    """Return a function from a layer's name to the changes of its weight to the menu's ends."""
    candidates = {
        name: weights
        for block in context.candidates.blocks(context.candidates.kept_choices)
        for name, weights in block.weights.items()
    }

    def changes(name: str) -> tuple[Tensor, ...]:
        weight = get_linear(context.runner.model, name).weight.data
        return tuple(
            candidates[name][end.name].to(weight.device).dequantize(weight.dtype) - weight
            for end in context.candidates.ends
        )

    return changes


def _products(context: ProfilingContext, windows: Tensor, changes: Changes) -> Tensor:
    """Return the inner products of each window, [windows, L, 2]."""
    runner = context.runner

    def head_gradient(states: Tensor) -> Tensor:
        return cross_entropy_gradient(runner, windows, states)

    count = len(context.candidates.ends)
    return inner_products(runner, windows, head_gradient, context.layers, count, changes)
