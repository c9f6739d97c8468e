"""The post-quantization integral of single weights.

With W the original and Q the quantized weights, the integral of a weight is the mean of dF/dw on
the path from W to Q, times Q - W. Source: PQI, arXiv 2503.01901, section 3. Departures: F is
KL(original || model), which has no label noise, and the path has few Gauss-Legendre nodes instead
of 32 equal steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from quantizer.importance.gradients import gradients_only_of
from quantizer.importance.path import move_along_path, path_mean, path_nodes
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear
from quantizer.running.divergence import divergence
from quantizer.running.runner import BlockRunner

Weights = Mapping[str, Tensor]
"""Weights by layer name, [out, in] each."""

NODES = 2


def weight_integrals(
    runner: BlockRunner,
    originals: Weights,
    quantized: Weights,
    windows: Tensor,
    nodes: int = NODES,
) -> dict[str, Tensor]:
    """Return the signed integral of each weight, mean dF/dw * (Q - W).

    The integrals of all weights add up to the KL divergence that quantization causes.

    Args:
        runner: the model; its weights are restored at the end.
        originals: the original weights W.
        quantized: the quantized weights Q.
        windows: token ids on which F is measured, int64 [windows, tokens].
        nodes: points of the path at which gradients are taken.

    Returns:
        float32 [out, in] by layer name, [nats/token].
    """
    weights = {name: get_linear(runner.model, name).weight for name in originals}
    with (
        _restored(weights),
        gradients_only_of(runner.model, weights.values()),
        matmul_autocast(runner.precision, windows.device),
    ):
        original_states = [runner.final_states(ids) for ids in torch.split(windows, 1)]

        def gradient(point: float) -> dict[str, Tensor]:
            move_along_path(runner.model, originals, quantized, point)
            return _mean_gradient(runner, weights, windows, original_states)

        means = path_mean(gradient, path_nodes(nodes))
    return {name: mean * (quantized[name] - originals[name]) for name, mean in means.items()}


def _mean_gradient(
    runner: BlockRunner, weights: Weights, windows: Tensor, original_states: list[Tensor]
) -> dict[str, Tensor]:
    """Return the gradient in each weight of the KL divergence, mean over the windows."""
    total = {name: torch.zeros_like(weight.data) for name, weight in weights.items()}
    for ids, original in zip(torch.split(windows, 1), original_states, strict=True):
        states = runner.final_states_with_gradient(ids)
        _, head_gradient = divergence(runner, ids, states.detach(), original)
        gradients = torch.autograd.grad(
            states, list(weights.values()), head_gradient.to(states.dtype), allow_unused=True
        )
        for name, each in zip(weights, gradients, strict=True):
            if each is not None:
                total[name].add_(each, alpha=1 / len(windows))
    return total


@contextmanager
def _restored(weights: Weights) -> Iterator[None]:
    """Restore the values of some weights at the end."""
    values = {name: weight.data for name, weight in weights.items()}
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data = values[name]
