"""Quality of a quantized model on held-out text.

Perplexity, and Kullback-Leibler divergence from the original.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.durable import PartStore, Progress
from quantizer.running.logits import token_divergence, token_loss
from quantizer.running.memory import MicroBatches

METHOD = "evaluate-2"
"""Names what this module and the products of packed layers compute.

A change of their results gets a new name.
"""


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one model on one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        perplexity_stderr: its standard error.
        nll_nats_per_token: mean negative log-likelihood of the next token, every window scored on
            its own.
        nll_stderr: its standard error, taken over windows.
        kl_nats_per_token: mean KL(original || model) of the next-token distributions, 0 for the
            original itself.
        kl_stderr: its standard error, taken over windows.
        windows: windows scored.
        tokens: next-token predictions scored: windows * (tokens in a window - 1).
    """

    perplexity: float
    perplexity_stderr: float
    nll_nats_per_token: float
    nll_stderr: float
    kl_nats_per_token: float
    kl_stderr: float
    windows: int
    tokens: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return the quality as JSON values.

        A standard error that one window cannot give is null.
        """
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Quality":
        """Return the quality that `to_json` wrote."""
        known: dict[str, Any] = {
            key: math.nan if value is None else value for key, value in values.items()
        }
        return cls(**known)


def evaluate_models(
    models: dict[str, nn.Module],
    original: str,
    windows: Tensor,
    batch: int,
    parts: PartStore,
    on_progress: Progress,
) -> dict[str, Quality]:
    """Score several models on the same windows, side by side.

    Args:
        models: causal language models by name, the original among them.
        original: name of the model that the others are compared with.
        windows: int64 [windows, tokens].
        batch: windows that are run at once where they fit, see `quantizer.running.memory`; packed layers are
            expanded once for each batch.
        parts: where the scores of finished batches are kept.
        on_progress: told of each finished batch.

    Returns:
        The quality of each model.
    """
    scores: dict[str, list[list[float]]] = {name: [] for name in models}
    batches, micro_batches = torch.split(windows, batch), MicroBatches()
    for index, members in enumerate(batches):
        data = parts.read(f"batch-{index:06d}")
        if data is None:
            pieces = micro_batches.run(partial(_score, models, original, members), len(members))
            data = json.dumps(
                {name: [row for piece in pieces for row in piece[name]] for name in models}
            ).encode()
            parts.write(f"batch-{index:06d}", data)
        for name, rows in json.loads(data).items():
            scores[name] += rows
        on_progress(index + 1, len(batches))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {name: _summarise(rows, tokens) for name, rows in scores.items()}


@torch.inference_mode()
def _score(
    models: dict[str, nn.Module], original: str, batch: Tensor, some: slice
) -> dict[str, list[list[float]]]:
    """Return (mean negative log-likelihood, mean KL from the original) of each model on each of some windows of a batch."""
    windows = batch[some]
    reference = next_token_logits(models[original], windows)
    targets = windows[:, 1:].to(reference.device)
    scores = {}
    for name, model in models.items():
        logits = reference if name == original else next_token_logits(model, windows)
        nll = [_mean(token_loss(*each)) for each in zip(logits, targets, strict=True)]
        kl = (
            [0.0] * len(windows)
            if name == original
            else [*map(window_divergence, reference, logits)]
        )
        scores[name] = [list(pair) for pair in zip(nll, kl, strict=True)]
    return scores


def window_divergence(original: Tensor, logits: Tensor) -> float:
    """Return the mean over the tokens of a window of KL(original || model).

    Logits are [tokens, vocabulary].
    """
    return _mean(token_divergence(original, logits))


def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())


def next_token_logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the logits of all next tokens that windows have, [windows, tokens - 1, vocabulary]."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=windows.to(device), use_cache=False).logits
    return logits[:, :-1]


def _summarise(scores: list[list[float]], tokens: int) -> Quality:
    values = torch.tensor(scores, dtype=torch.float64)  # [windows, (nll, kl)]
    mean = values.mean(0)
    stderr = (
        values.std(0) / math.sqrt(len(scores))
        if len(scores) > 1
        else torch.full((2,), math.nan, dtype=torch.float64)
    )
    perplexity = math.exp(mean[0])
    return Quality(
        perplexity=perplexity,
        perplexity_stderr=perplexity * float(stderr[0]),
        nll_nats_per_token=float(mean[0]),
        nll_stderr=float(stderr[0]),
        kl_nats_per_token=float(mean[1]),
        kl_stderr=float(stderr[1]),
        windows=len(scores),
        tokens=tokens,
    )
