"""Losses at the model's head, with their gradients at what enters it.

One window at a time, as logits take much memory.
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
        runner: the model; only what follows its blocks is used.
        input_ids: int64 [windows, tokens].
        states: what enters the head, [windows, tokens, hidden].
        original: what enters the head of the original model, of the same shape.

    Returns:
        Mean over the tokens of each window, float32 [windows], [nats/token]; its gradient in
        `states`, float32.
    """
    losses, gradients = [], []
    for at in range(len(input_ids)):
        window = input_ids[at : at + 1]
        leaf, logits = _logits(runner, window, states[at : at + 1])
        with torch.no_grad():
            loss, pull = mean_divergence(runner.logits(window, original[at : at + 1])[0], logits[0])
        losses.append(loss)
        gradients.append(torch.autograd.grad(logits, leaf, pull[None])[0].float())
    return torch.stack(losses), torch.cat(gradients)


def cross_entropy_gradient(runner: BlockRunner, input_ids: Tensor, states: Tensor) -> Tensor:
    """Return the gradient in `states` of each window's mean negative log-likelihood of its next tokens; float32, like `states`."""
    gradients = []
    for at in range(len(input_ids)):
        window = input_ids[at : at + 1]
        leaf, logits = _logits(runner, window, states[at : at + 1])
        with torch.enable_grad():
            loss = -logits.float().log_softmax(-1)[:, :-1].gather(-1, window[:, 1:, None]).mean()
        gradients.append(torch.autograd.grad(loss, leaf)[0].float())
    return torch.cat(gradients)


def _logits(runner: BlockRunner, window: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states as the leaf of a graph, and the logits that follow from them."""
    leaf = states.detach().clone().requires_grad_()
    with torch.enable_grad():
        return leaf, runner.logits(window, leaf)
