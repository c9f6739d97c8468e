"""The `output` signal: how each layer alone changes the model's output, and how changes interact.

One layer at a time takes each end of the menu. The other layers stay in the context, or keep their
original weights if the original model is the context. The output metric
(`allocator.profiling.output_metric`) measures how the input of the output head changes. It gives
the first-order change of the KL divergence, and a sketch of the second-order change. Inner products
of sketches are the coupling of all pairs of layers.

Cost: 2 L forward passes over the probes, each from the changed block on.
"""

import numpy as np
import torch
from torch import Tensor

from allocator.profiling.context import ProfilingContext
from allocator.profiling.end_effects import EndEffects, interpolation, menu_effects, shrink_noise
from allocator.profiling.loss_model import LossModel
from allocator.profiling.output_metric import OutputMetric, output_metric
from allocator.signals import SKETCH_WIDTH
from quantizer.running.memoized import memoized


def measure_output(context: ProfilingContext) -> LossModel:
    """Return the coupled loss model of the module's measurement."""
    effects = shrink_noise(output_effects(context))
    reference = None if context.in_original else context.menu.context
    shares = interpolation(context.output_error, reference)
    linear, factor, truncation = menu_effects(effects, shares)
    tokens = context.spec.probes.numel()
    return LossModel(effects.context_loss, linear, factor, truncation, tokens)


def output_effects(context: ProfilingContext) -> EndEffects:
    """Return the effects of both ends of the menu for every layer, measured block by block."""
    runner, probes = context.runner, context.spec.probes
    if context.in_original:
        context.set_original()
    states = [runner.initial_states(probes)]
    for index in range(len(runner.blocks)):
        states.append(runner.run_blocks(probes, states[-1], index, index + 1))
    head_input = runner.head_input(probes, states[-1], len(runner.blocks))
    generator = torch.Generator().manual_seed(context.spec.seed)
    metric = output_metric(
        runner, probes, head_input, context.original_states, SKETCH_WIDTH, generator
    )
    firsts: list[Tensor] = []
    sketches: list[Tensor] = []
    for index in range(len(runner.blocks)):

        def compute(index: int = index) -> dict[str, Tensor]:
            return _block_effects(context, index, states[index], head_input, metric)

        stored = memoized(context.parts, f"effects-{index:04d}", compute)
        firsts.append(stored["first"])
        sketches.append(stored["sketch"])
        context.on_progress(index + 1, len(runner.blocks))
    context.set_uniform()
    loss = float(np.maximum(metric.kl.mean(), 0))
    return EndEffects(torch.cat(firsts).double().numpy(), torch.cat(sketches), loss)


def _block_effects(
    context: ProfilingContext,
    index: int,
    hidden: Tensor,
    head_input: Tensor,
    metric: OutputMetric,
) -> dict[str, Tensor]:
    """Return effects of the layers of block `index`: first [2 layers, N], sketch [2 layers, ...].

    Args:
        context: the model in the context.
        index: which block.
        hidden: what enters the block.
        head_input: what enters the output head in the context.
        metric: the output metric of the context.
    """
    weights = context.candidates.block(index).weights
    firsts: list[Tensor] = []
    sketches: list[Tensor] = []
    for layer in context.candidates.layers_of(index):
        candidates = weights[layer.name]
        for end in context.candidates.ends:
            context.set_layer(layer.name, candidates[end.name])
            changed = context.runner.head_input(context.spec.probes, hidden, index)
            first, sketch = metric.measure((changed - head_input).float().flatten(0, 1))
            firsts.append(first.cpu())
            sketches.append(sketch.flatten().cpu())
        here = None if context.in_original else candidates[context.uniform.name]
        context.set_layer(layer.name, here)
    return {"first": torch.stack(firsts), "sketch": torch.stack(sketches)}
