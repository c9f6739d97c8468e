"""Diagonal of the empirical Fisher information: how much the loss depends on each weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizer.importance.gradients import gradients_only_of
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.divergence import cross_entropy_gradient
from quantizer.running.runner import BlockRunner


def squared_gradients(
    runner: BlockRunner, layers: Sequence[LayerSpec], windows: Tensor
) -> dict[str, Tensor]:
    """Return the mean over windows of the squared gradient of a window's loss in each weight.

    The loss of a window is the mean negative log-likelihood of its next tokens. This is the
    importance of SqueezeLLM (arXiv 2306.07629, section 4.1), which SigniQ adopts. Memory: two
    float32 numbers for each weight.

    Args:
        runner: the model.
        layers: the layers whose weights are scored.
        windows: token ids, int64 [windows, tokens].

    Returns:
        float32 [out, in] by layer name; zeros for a layer that the model does not call.
    """
    weights = {layer.name: get_linear(runner.model, layer.name).weight for layer in layers}
    squared = {
        name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()
    }
    with gradients_only_of(runner.model, weights.values()):
        for ids in torch.split(windows, 1):
            with matmul_autocast(runner.precision, ids.device):
                states = runner.final_states_with_gradient(ids)
                head_gradient = cross_entropy_gradient(runner, ids, states.detach())
            gradients = torch.autograd.grad(
                states, list(weights.values()), head_gradient.to(states.dtype), allow_unused=True
            )
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    squared[name] += gradient.float().square() / len(windows)
    return squared


def column_information(squared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the Fisher information of each input column, the sum over the column's weights.

    Args:
        squared: what `squared_gradients` returns.

    Returns:
        float32 [in] by layer name; scores by which high-impact columns can be selected.
    """
    return {name: each.sum(0) for name, each in squared.items()}
