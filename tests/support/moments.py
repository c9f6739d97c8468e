"""Second moments by a slow reference: a hook sees the inputs while the whole model runs."""

from typing import Any

import torch
from torch import Tensor

from quantizer.plans.plan import LayerSpec
from quantizer.running.moments import Calibration


def moments_by_hook(model: Any, layer: LayerSpec, calibration: Calibration) -> Tensor:
    """Return X'X/n from the inputs that a hook sees while the whole model runs."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer.name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        for batch in calibration.batches():
            model(input_ids=batch, use_cache=False)
    handle.remove()
    inputs = torch.cat([states.reshape(-1, layer.in_features) for states in seen]).double()
    return inputs.t() @ inputs / len(inputs)
