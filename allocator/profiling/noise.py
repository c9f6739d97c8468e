"""The `noise` signal: how sensitive the model is to relative random error in each layer.

One layer at a time of the original model gets Gaussian noise of relative size t. Its KL divergence,
which is second-order in the change, is fitted through the origin over a few levels:

    alpha_l = sum over t of KL_l(t) t^2 / sum over t of t^4

    damage[l, k] = alpha_l * weight_error[l, k],    weight_error = |E|^2 / |W|^2

Source: HIGGS and its linearity theorem, arXiv 2411.17525, sections 3 and 5, with the KL divergence
in place of perplexity. The context is always the original model.

Cost: L forward passes over the probes for each level, each from the changed block on.
"""

import numpy as np
import torch
from torch import Tensor

from allocator.profile import Array
from allocator.profiling.context import ProfilingContext
from allocator.profiling.loss_model import LossModel, additive
from allocator.profiling.output_metric import OutputMetric, output_metric
from allocator.signals import NOISE_LEVELS, SKETCH_WIDTH
from quantizer.modules.linear import get_linear
from quantizer.running.memoized import memoized


def measure_noise(context: ProfilingContext) -> LossModel:
    """Return the additive loss model of the module's formula."""
    linear = layer_alphas(context)[:, None] * context.weight_error
    return additive(0.0, linear, context.spec.probes.numel())


def layer_alphas(context: ProfilingContext) -> Array:
    """Return alpha of each layer, float64 [L], [nats/token]."""
    runner, probes = context.runner, context.spec.probes
    context.set_original()
    generator = torch.Generator().manual_seed(context.spec.seed)
    original = context.original_states
    metric = output_metric(runner, probes, original, original, SKETCH_WIDTH, generator)
    levels = np.array(NOISE_LEVELS)
    row_of = {layer.name: row for row, layer in enumerate(context.layers)}
    states = runner.initial_states(probes)
    alphas: list[Array] = []
    for index in range(len(runner.blocks)):

        def compute(index: int = index, hidden: Tensor = states) -> dict[str, Tensor]:
            rows = [row_of[layer.name] for layer in context.candidates.layers_of(index)]
            losses = [_losses(context, row, hidden, metric) for row in rows]
            return {"loss": torch.tensor(losses, dtype=torch.float64)}

        losses = memoized(context.parts, f"noise-{index:04d}", compute)["loss"].numpy()
        alphas.append(losses @ levels**2 / (levels**4).sum())  # losses [layers, levels]
        states = runner.run_blocks(probes, states, index, index + 1)
        context.on_progress(index + 1, len(runner.blocks))
    context.set_uniform()
    return np.concatenate(alphas)


def _losses(
    context: ProfilingContext, row: int, hidden: Tensor, metric: OutputMetric
) -> list[float]:
    """Return the KL divergence of the model with noise in layer `row`, at each level."""
    layer = context.layers[row]
    original = context.originals[layer.name]
    losses: list[float] = []
    for at, level in enumerate(NOISE_LEVELS):
        generator = torch.Generator().manual_seed(context.spec.seed + row * len(NOISE_LEVELS) + at)
        draw = torch.randn(original.shape, generator=generator).to(original)
        size = level * float(original.float().norm()) / original.numel() ** 0.5
        get_linear(context.runner.model, layer.name).weight.data = original + size * draw
        changed = context.runner.head_input(context.spec.probes, hidden, layer.block)
        change = changed - context.original_states
        _, sketch = metric.measure(change.float().flatten(0, 1))
        losses.append(float(sketch.square().sum() / len(sketch) / 2))
    context.set_layer(layer.name, None)
    return losses
