"""Losses computed from logits, a few tokens at a time.

On a processor, allocating memory for the log-probabilities of whole windows costs more time than
the arithmetic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CPU_BYTES = 2**22
_GPU_BYTES = 2**28
"""Bytes of the float32 logits of one chunk of tokens."""


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target.

    Args:
        logits: [tokens, vocabulary].
        targets: token ids, int64 [tokens].

    Returns:
        float32 [tokens], [nats].
    """
    losses = [
        -_log_softmax(logits[rows]).gather(-1, targets[rows, None])[:, 0]
        for rows in _chunks(logits)
    ]
    return torch.cat(losses)


def token_divergence(original: Tensor, logits: Tensor) -> Tensor:
    """Return KL(original || model) of each token's next-token distribution.

    Args:
        original: logits of the original model, [tokens, vocabulary].
        logits: logits of the model, of the same shape.

    Returns:
        float32 [tokens], [nats].
    """
    losses = []
    for rows in _chunks(logits):
        log_p = _log_softmax(original[rows])
        log_q = _log_softmax(logits[rows])
        losses.append(log_p.exp().mul_(log_p.sub_(log_q)).sum(-1))
    return torch.cat(losses)


def mean_divergence(original: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of `token_divergence`, and its gradient in `logits`.

    The gradient is (softmax(logits) - softmax(original)) / tokens.

    Args:
        original: logits of the original model, [tokens, vocabulary].
        logits: logits of the model, of the same shape.

    Returns:
        The mean, float32 [], [nats/token]; and the gradient, of the shape and dtype of `logits`.
    """
    losses = []
    gradient = torch.empty_like(logits)
    for rows in _chunks(logits):
        log_p = _log_softmax(original[rows])
        log_q = _log_softmax(logits[rows])
        p = log_p.exp()
        losses.append(log_p.sub_(log_q).mul_(p).sum(-1))
        gradient[rows] = log_q.exp_().sub_(p).div_(len(logits))
    return torch.cat(losses).mean(), gradient


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Return slices of tokens whose float32 logits fit into the chunk size of the device."""
    tokens, vocabulary = logits.shape
    limit = _CPU_BYTES if logits.device.type == "cpu" else _GPU_BYTES
    size = max(1, limit // (vocabulary * torch.float32.itemsize))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
