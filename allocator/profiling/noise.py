"""The `noise` signal: how much relative random error each layer bears, whatever the quantizer.

One layer at a time of the original model gets Gaussian noise of relative size t, and the KL of the
output, second-order in the change, is fitted through the origin over a few levels: alpha_l = sum
KL(t) t^2 / sum t^4. Then

    damage[l, k] = alpha_l * weight_error[l, k]

with weight_error = |E|^2 / |W|^2. Source: HIGGS and its linearity theorem, arXiv 2411.17525,
sections 3 and 5, with KL for perplexity. The context is the original model.

Cost: L forward passes over the probes for each level, from the changed block on.
"""

import numpy as np
import torch
from torch import Tensor

from allocator.profile import Array
from allocator.profiling.signal import LossModel, Scene, additive, kept
from allocator.profiling.sketch import OutputMetric, output_metric
from allocator.signals import NOISE_LEVELS, SKETCH_WIDTH
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import by_block


def noise(scene: Scene) -> LossModel:
    """Return the additive loss model of the module's formula."""
    linear = layer_alphas(scene)[:, None] * scene.weight_error
    return additive(0.0, linear, scene.spec.probes.numel())


def layer_alphas(scene: Scene) -> Array:
    """Return alpha of each layer, [L], [nats/token]."""
    runner, probes = scene.runner, scene.spec.probes
    scene.put_all(None)
    generator = torch.Generator().manual_seed(scene.spec.seed)
    metric = output_metric(
        runner, probes, scene.original_states, scene.original_states, SKETCH_WIDTH, generator
    )
    levels = np.array(NOISE_LEVELS)
    row_of = {layer.name: row for row, layer in enumerate(scene.layers)}
    members = by_block(scene.layers)
    states, alphas = runner.initial_states(probes), []
    for index in range(len(runner.blocks)):

        def measure(index: int = index, hidden: Tensor = states) -> dict[str, Tensor]:
            rows = [row_of[layer.name] for layer in members.get(index, ())]
            losses = [_losses(scene, row, hidden, metric) for row in rows]
            return {"loss": torch.tensor(losses, dtype=torch.float64)}

        losses = kept(scene.parts, f"noise-{index:04d}", measure)[
            "loss"
        ].numpy()  # [layers, levels]
        alphas.append(losses @ levels**2 / (levels**4).sum())
        states = runner.run_blocks(probes, states, index, index + 1)
        scene.on_progress(index + 1, len(runner.blocks))
    scene.put_all(scene.menu.fidelities[scene.menu.context])
    return np.concatenate(alphas)


def _losses(scene: Scene, row: int, hidden: Tensor, metric: OutputMetric) -> list[float]:
    """Return the KL of the model with noise in one layer, at each level."""
    layer, losses = scene.layers[row], []
    original = scene.originals[layer.name]
    for at, level in enumerate(NOISE_LEVELS):
        generator = torch.Generator().manual_seed(scene.spec.seed + row * len(NOISE_LEVELS) + at)
        draw = torch.randn(original.shape, generator=generator).to(original)
        size = level * float(original.float().norm()) / original.numel() ** 0.5
        get_linear(scene.runner.model, layer.name).weight.data = original + size * draw
        change = (
            scene.runner.head_input(scene.spec.probes, hidden, layer.block) - scene.original_states
        )
        _, sketch = metric.measure(change.float().flatten(0, 1))
        losses.append(float(sketch.square().sum() / len(sketch) / 2))
    scene.put(layer, None)
    return losses
