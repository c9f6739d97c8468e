"""What follows from logits, a few tokens at a time.

Fresh memory for whole windows costs a processor more than the arithmetic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_PROCESSOR_BYTES, _OTHER_BYTES = 2**22, 2**28
"""What the logits of a piece take in float32, on a processor and elsewhere."""


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target.

    Args:
        logits: [tokens, vocabulary].
        targets: int64 [tokens].

    Returns:
        float32 [tokens], [nats].
    """
    losses = [
        -_log_softmax(logits[some]).gather(-1, targets[some, None])[:, 0]
        for some in _pieces(logits)
    ]
    return torch.cat(losses)


def token_divergence(original: Tensor, logits: Tensor) -> Tensor:
    """Return KL(original || model) of each token, float32 [tokens], [nats].

    From logits of both, [tokens, vocabulary].
    """
    losses = []
    for some in _pieces(logits):
        log_q, log_p = _log_softmax(original[some]), _log_softmax(logits[some])
        losses.append(log_q.exp().mul_(log_q.sub_(log_p)).sum(-1))
    return torch.cat(losses)


def mean_divergence(original: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of `token_divergence`, and its gradient in `logits`, (softmax(logits) - softmax(original)) / tokens.

    The gradient has the shape and dtype of `logits`.
    """
    losses, gradient = [], torch.empty_like(logits)
    for some in _pieces(logits):
        log_q, log_p = _log_softmax(original[some]), _log_softmax(logits[some])
        q = log_q.exp()
        losses.append(log_q.sub_(log_p).mul_(q).sum(-1))
        gradient[some] = log_p.exp_().sub_(q).div_(len(logits))
    return torch.cat(losses).mean(), gradient


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _pieces(logits: Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    limit = _PROCESSOR_BYTES if logits.device.type == "cpu" else _OTHER_BYTES
    size = max(1, limit // (vocabulary * torch.float32.itemsize))
    return (slice(at, min(at + size, tokens)) for at in range(0, tokens, size))
