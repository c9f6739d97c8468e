"""The `output` signal: how each layer alone moves the model's output, and how these moves couple.

One layer at a time takes each end of the menu, the others staying in the context, or as they were
with `in_original`. The change of what enters the head is measured by the output metric
(`allocator.profiling.sketch`): its first-order term, and a sketch whose Gram matrix is the coupling of all
pairs of layers. Only the blocks from the changed one on are run.

Cost: 2 L forward passes over the probes, from the changed block on.
"""

import numpy as np
import torch
from torch import Tensor

from allocator.profiling.effects import Effects, assemble, interpolation, shrink_noise
from allocator.profiling.signal import LossModel, Scene, kept
from allocator.profiling.sketch import OutputMetric, output_metric
from allocator.signals import SKETCH_WIDTH
from quantizer.plans.plan import by_block


def output(scene: Scene) -> LossModel:
    """Return the coupled loss model of the module's measurement."""
    effects = shrink_noise(end_effects(scene))
    context = None if scene.spec.in_original else scene.menu.context
    linear, factor, truncation = assemble(effects, interpolation(scene.output_error, context))
    return LossModel(effects.context_loss, linear, factor, truncation, scene.spec.probes.numel())


def end_effects(scene: Scene) -> Effects:
    """Return the effects of both ends for every layer, measured block by block."""
    runner, probes = scene.runner, scene.spec.probes
    if scene.spec.in_original:
        scene.put_all(None)
    states = [runner.initial_states(probes)]
    for index in range(len(runner.blocks)):
        states.append(runner.run_blocks(probes, states[-1], index, index + 1))
    context = runner.head_input(probes, states[-1], len(runner.blocks))
    generator = torch.Generator().manual_seed(scene.spec.seed)
    metric = output_metric(runner, probes, context, scene.original_states, SKETCH_WIDTH, generator)
    firsts, sketches = [], []
    for index in range(len(runner.blocks)):

        def measure(index: int = index) -> dict[str, Tensor]:
            return _block_effects(scene, index, states[index], context, metric)

        stored = kept(scene.parts, f"effects-{index:04d}", measure)
        firsts.append(stored["first"])
        sketches.append(stored["sketch"])
        scene.on_progress(index + 1, len(runner.blocks))
    scene.put_all(scene.menu.fidelities[scene.menu.context])
    return Effects(
        torch.cat(firsts).double().numpy(),
        torch.cat(sketches),
        float(np.maximum(metric.kl.mean(), 0)),
    )


def _block_effects(
    scene: Scene, index: int, hidden: Tensor, context: Tensor, metric: OutputMetric
) -> dict[str, Tensor]:
    stored = scene.block(index)
    ends = scene.menu.fidelities[0], scene.menu.fidelities[-1]
    here = scene.menu.fidelities[scene.menu.context]
    firsts, sketches = [], []
    for layer in by_block(scene.layers).get(index, ()):
        forms = stored.weights[layer.name]
        for end in ends:
            scene.put(layer, forms[end.name])
            change = (
                (scene.runner.head_input(scene.spec.probes, hidden, index) - context)
                .float()
                .flatten(0, 1)
            )
            first, sketch = metric.measure(change)
            firsts.append(first.cpu())
            sketches.append(sketch.flatten().cpu())
        scene.put(layer, None if scene.spec.in_original else forms[here.name])
    return {"first": torch.stack(firsts), "sketch": torch.stack(sketches)}
