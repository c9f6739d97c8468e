"""Score quantized models on held-out text, side by side with the original."""

import json
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from quantizer.durable import PartStore, Progress
from quantizer.running.logits import token_divergence, token_loss
from quantizer.running.memory import MicroBatches
from quantizer.running.quality import Quality

METHOD = "evaluate-2"
"""Identifies what this module and the products of packed layers compute.

It is part of the keys of stored results: a change of the results needs a new name.
"""

Scores = dict[str, list[list[float]]]
"""Mean negative log-likelihood and mean KL divergence of each window, by model name."""


def evaluate_models(
    models: Mapping[str, nn.Module],
    original: str,
    windows: Tensor,
    batch: int,
    parts: PartStore,
    on_progress: Progress,
) -> dict[str, Quality]:
    """Score several models on the same windows.

    Args:
        models: causal language models by name, the original among them.
        original: name of the model that the others are compared with.
        windows: token ids, int64 [windows, tokens].
        batch: windows that run at once if they fit, see `quantizer.running.memory`; packed layers
            are expanded once for each batch.
        parts: where the scores of finished batches are stored.
        on_progress: called after each batch.

    Returns:
        The quality of each model.
    """
    scores: Scores = {name: [] for name in models}
    batches = torch.split(windows, batch)
    micro_batches = MicroBatches()
    for index, members in enumerate(batches):
        part = f"batch-{index:06d}"
        data = parts.read(part)
        if data is None:
            pieces = micro_batches.run(partial(_score, models, original, members), len(members))
            data = json.dumps(_joined(pieces)).encode()
            parts.write(part, data)
        for name, rows in json.loads(data).items():
            scores[name] += rows
        on_progress(index + 1, len(batches))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {name: Quality.of_windows(rows, tokens) for name, rows in scores.items()}


def _joined(pieces: list[Scores]) -> Scores:
    return {name: [row for piece in pieces for row in piece[name]] for name in pieces[0]}


@torch.inference_mode()
def _score(models: Mapping[str, nn.Module], original: str, batch: Tensor, rows: slice) -> Scores:
    """Return the scores of each model on some windows of a batch."""
    windows = batch[rows]
    reference = next_token_logits(models[original], windows)
    targets = windows[:, 1:].to(reference.device)
    scores = {}
    for name, model in models.items():
        is_original = name == original
        logits = reference if is_original else next_token_logits(model, windows)
        nll = [_mean(token_loss(*pair)) for pair in zip(logits, targets, strict=True)]
        kl = [0.0] * len(windows)
        if not is_original:
            kl = [*map(window_divergence, reference, logits)]
        scores[name] = [list(pair) for pair in zip(nll, kl, strict=True)]
    return scores


def window_divergence(original: Tensor, logits: Tensor) -> float:
    """Return KL(original || model) of a window, mean over its tokens, [nats/token].

    Args:
        original: logits of the original model, [tokens, vocabulary].
        logits: logits of the model, of the same shape.
    """
    return _mean(token_divergence(original, logits))


def next_token_logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the logits at all tokens of the windows that have a next one.

    Args:
        model: a causal language model.
        windows: token ids, int64 [windows, tokens].

    Returns:
        [windows, tokens - 1, vocabulary].
    """
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=windows.to(device), use_cache=False).logits
    return logits[:, :-1]


def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())
