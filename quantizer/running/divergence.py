"""Losses of a model's output, with their gradients in the hidden states that enter the head.

One window is processed at a time, because logits take much memory.
"""

import torch
from torch import Tensor

from quantizer.running.logits import mean_divergence
from quantizer.running.runner import BlockRunner


def divergence(
    runner: BlockRunner, input_ids: Tensor, states: Tensor, original: Tensor
) -> tuple[Tensor, Tensor]:
    """Return KL(original || model) of each window, and its gradient.

    Args:
        runner: the model; only its head and what follows it run.
        input_ids: token ids, int64 [windows, tokens].
        states: hidden states that enter the head, [windows, tokens, hidden].
        original: those of the original model, of the same shape.

    Returns:
        The mean over the tokens of each window, float32 [windows], [nats/token]; and its gradient
        in `states`, float32.
    """
    losses = []
    gradients = []
    for index in range(len(input_ids)):
        row = slice(index, index + 1)
        leaf, logits = _differentiable_logits(runner, input_ids[row], states[row])
        with torch.no_grad():
            reference = runner.logits(input_ids[row], original[row])[0]
            loss, logits_gradient = mean_divergence(reference, logits[0])
        losses.append(loss)
        gradients.append(torch.autograd.grad(logits, leaf, logits_gradient[None])[0].float())
    return torch.stack(losses), torch.cat(gradients)


def cross_entropy_gradient(runner: BlockRunner, input_ids: Tensor, states: Tensor) -> Tensor:
    """Return the gradient in `states` of each window's mean negative log-likelihood.

    Args:
        runner: the model; only its head and what follows it run.
        input_ids: token ids, int64 [windows, tokens]; each token but the first is a target.
        states: hidden states that enter the head, [windows, tokens, hidden].

    Returns:
        float32, of the shape of `states`.
    """
    gradients = []
    for index in range(len(input_ids)):
        row = slice(index, index + 1)
        leaf, logits = _differentiable_logits(runner, input_ids[row], states[row])
        with torch.enable_grad():
            log_likelihoods = logits.float().log_softmax(-1)[:, :-1]
            loss = -log_likelihoods.gather(-1, input_ids[row, 1:, None]).mean()
        gradients.append(torch.autograd.grad(loss, leaf)[0].float())
    return torch.cat(gradients)


def _differentiable_logits(
    runner: BlockRunner, window: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the states as a leaf of the graph, and the logits that are computed from them."""
    leaf = states.detach().clone().requires_grad_()
    with torch.enable_grad():
        return leaf, runner.logits(window, leaf)
