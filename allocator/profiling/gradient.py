"""The `gradient` signal: inner products of the loss gradient with weight changes, sample by sample.

With g_n the gradient of the mean negative log-likelihood of probe window n in the context, and D
the change of layer l from the context to an end of the menu,

    s_n[l, end] = <g_n, D>,    first-order term = mean over n,    second-order terms = T * mean over n of s_n s_n'

T being the tokens of a window: for tokens that know nothing of each other, the empirical Fisher
matrix of a token. Diagonal terms are those of MPQCO (ICCV 2021); the Gram matrix couples all pairs
of layers and is positive semidefinite by construction.

Cost: one forward and one backward pass over the probes, and two products for each layer.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from allocator.profiling.backward import inner_products
from allocator.profiling.effects import Effects, assemble, interpolation
from allocator.profiling.signal import LossModel, Scene, context_loss, kept
from quantizer.modules.linear import get_linear
from quantizer.running.divergence import cross_entropy_gradient
from quantizer.running.memory import MicroBatches


def gradient(scene: Scene) -> LossModel:
    """Return the coupled loss model of the module's formula."""
    effects = sample_effects(scene)
    linear, factor, truncation = assemble(
        effects, interpolation(scene.output_error, scene.menu.context)
    )
    return LossModel(effects.context_loss, linear, factor, truncation, scene.spec.probes.numel())


def sample_effects(scene: Scene) -> Effects:
    """Return the inner products of all probe windows as effects, one sample a window."""
    batches = torch.split(scene.spec.probes, scene.spec.batch)
    originals = torch.split(scene.original_states, scene.spec.batch)
    blocks = {index: scene.block(index).weights for index in range(len(scene.runner.blocks))}
    forms = {name: weights for block in blocks.values() for name, weights in block.items()}
    ends = scene.menu.fidelities[0], scene.menu.fidelities[-1]

    def changes(name: str) -> tuple[Tensor, ...]:
        weight = get_linear(scene.runner.model, name).weight.data
        return tuple(
            forms[name][end.name].to(weight.device).dequantize(weight.dtype) - weight
            for end in ends
        )

    products, losses, micro_batches = [], [], MicroBatches()
    for index, (batch, original) in enumerate(zip(batches, originals, strict=True)):

        def measure(batch: Tensor = batch) -> dict[str, Tensor]:
            return {
                "products": micro_batches.cat(
                    lambda some: _products(scene, batch[some], changes, len(ends)), len(batch)
                )
            }

        products.append(
            kept(scene.parts, f"products-{index:04d}", measure)["products"].flatten(1)
        )  # [windows, 2 L]
        losses.append(context_loss(scene, f"loss-{index:04d}", batch, original))
        scene.on_progress(index + 1, len(batches))
    samples = torch.cat(products).t()  # [2 L, N]
    sketch = (samples * scene.spec.probes.shape[1] ** 0.5).float()
    return Effects(samples.numpy(), sketch, float(np.concatenate(losses).mean()))


def _products(
    scene: Scene, ids: Tensor, changes: Callable[[str], tuple[Tensor, ...]], count: int
) -> Tensor:
    head = lambda states: cross_entropy_gradient(scene.runner, ids, states)  # noqa: E731
    return inner_products(scene.runner, ids, head, scene.layers, count, changes)
