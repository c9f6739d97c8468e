"""Measure how much quantized embeddings and heads change the predictions of a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quantizer.kernels.precision import matmul_autocast
from quantizer.running.evaluate import next_token_logits, window_divergence


def embedding_losses(
    model: Any,
    replacements: Sequence[Mapping[str, Tensor]],
    windows: Tensor,
    precision: torch.dtype,
) -> list[float]:
    """Return KL(original || model) for each of several replacements of tables, [nats/token].

    It is the divergence by which `quantizer.running.evaluate` scores models.

    Args:
        model: the original; it is left as it was.
        replacements: the new weights by table name, for each replacement.
        windows: token ids, int64 [windows, tokens]; one window runs at a time.
        precision: dtype of the matrix products.
    """
    totals = [0.0] * len(replacements)
    with torch.inference_mode(), matmul_autocast(precision, windows.device):
        for window in torch.split(windows, 1):
            reference = next_token_logits(model, window)[0]
            for index, weights in enumerate(replacements):
                with _replaced(model, weights):
                    logits = next_token_logits(model, window)[0]
                totals[index] += window_divergence(reference, logits)
    return [total / len(windows) for total in totals]


@contextmanager
def _replaced(model: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: model.get_submodule(name).weight.data for name in weights}
    try:
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        yield
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight.data = weight
