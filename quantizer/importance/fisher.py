"""How much the end loss depends on each weight: the empirical Fisher information's diagonal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.divergence import cross_entropy_gradient
from quantizer.running.runner import BlockRunner


def squared_gradients(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    windows: Tensor,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return the mean over windows of the squared gradient of the window's loss in each weight.

    The loss of a window is the mean negative log-likelihood of its next tokens, so this is the
    importance of SqueezeLLM (arXiv 2306.07629, section 4.1), which SigniQ takes over. Memory: two
    float32 numbers for each weight.

    Args:
        runner: the model.
        layers: the layers.
        windows: int64 [windows, tokens].
        precision: dtype of the matrix products.

    Returns:
        float32 [out, in] by layer name; zeros for a layer that is not called.
    """
    weights = {layer.name: get_linear(runner.model, layer.name).weight for layer in layers}
    needed = {name: parameter.requires_grad for name, parameter in runner.model.named_parameters()}
    found = {
        name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()
    }
    try:
        for parameter in runner.model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for ids in torch.split(windows, 1):
            with matmul_autocast(precision, ids.device):
                states = runner.final_states_with_gradient(ids)
                gradient = cross_entropy_gradient(runner, ids, states.detach())
            each = torch.autograd.grad(
                states, list(weights.values()), gradient.to(states.dtype), allow_unused=True
            )
            for name, own in zip(weights, each, strict=True):
                if own is not None:
                    found[name] += own.float().square() / len(windows)
    finally:
        for name, parameter in runner.model.named_parameters():
            parameter.requires_grad_(needed[name])
    return found


def column_information(squared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the Fisher information of each input column, the sum over its weights, [in] by layer name: scores to select by."""
    return {name: each.sum(0) for name, each in squared.items()}
