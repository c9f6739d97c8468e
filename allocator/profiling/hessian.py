"""The `hessian` signal: layer-wise reconstruction error.

    damage[l, k] = unit * (output_error[l, k] - output_error[l, context])

Here output_error = tr(E M E') with E the weight error and M the mean of x x' over the layer's
inputs. This is the objective of GPTQ (arXiv 2210.17323, equation 1), used as a sensitivity. It does
not depend on what follows the layer. The unit is chosen so that the context's errors add up to the
context's KL divergence.

Cost: one forward pass over the probes, for the unit.
"""

import numpy as np

from allocator.profiling.context import ProfilingContext
from allocator.profiling.loss_model import LossModel, additive


def measure_hessian(context: ProfilingContext) -> LossModel:
    """Return the additive loss model of the module's formula."""
    losses = [context.batch_loss(index) for index in range(len(context.batches))]
    loss = float(np.concatenate(losses).mean())
    context.on_progress(1, 1)
    here = context.output_error[:, [context.menu.context]]
    unit = loss / float(here.sum()) if here.any() else 0.0
    return additive(loss, unit * (context.output_error - here), context.spec.probes.numel())
