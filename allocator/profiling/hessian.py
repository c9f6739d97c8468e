"""The `hessian` signal: layer-wise reconstruction error.

    damage[l, k] = unit * (output_error[l, k] - output_error[l, context])

with output_error = tr(E M E'), M the mean of x x' over the layer's inputs: the objective of GPTQ,
arXiv 2210.17323, equation 1, read as a sensitivity. It knows nothing of what follows the layer. The
unit makes the context's errors add up to the context's KL.

Cost: one forward pass over the probes, for the unit.
"""

import numpy as np
import torch

from allocator.profiling.signal import LossModel, Scene, additive, context_loss


def hessian(scene: Scene) -> LossModel:
    """Return the additive loss model of the module's formula."""
    batches = zip(
        torch.split(scene.spec.probes, scene.spec.batch),
        torch.split(scene.original_states, scene.spec.batch),
        strict=True,
    )
    losses = [
        context_loss(scene, f"loss-{index:04d}", *batch) for index, batch in enumerate(batches)
    ]
    loss = float(np.concatenate(losses).mean())
    scene.on_progress(1, 1)
    here = scene.output_error[:, [scene.menu.context]]
    unit = loss / float(here.sum()) if here.any() else 0.0
    return additive(loss, unit * (scene.output_error - here), scene.spec.probes.numel())
