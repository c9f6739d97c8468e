"""Quality of a quantized model on held-out text: perplexity, and Kullback-Leibler divergence from the original."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.durable import PartStore, Progress


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one model on one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        perplexity_stderr: its standard error.
        nll_nats_per_token: mean negative log-likelihood of the next token, every window scored on its own.
        nll_stderr: its standard error, taken over windows.
        kl_nats_per_token: mean KL(original || model) of the next-token distributions, 0 for the original itself.
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
        """Return the quality as JSON values; a standard error that one window cannot give is null."""
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Quality":
        """Return the quality that `to_json` wrote."""
        return cls(**{key: math.nan if value is None else value for key, value in values.items()})


def evaluate_models(
    models: dict[str, nn.Module], original: str, windows: Tensor, parts: PartStore, on_progress: Progress
) -> dict[str, Quality]:
    """Score several models on the same windows, side by side.

    Args:
        models: causal language models by name, the original among them.
        original: name of the model that the others are compared with.
        windows: int64 [windows, tokens].
        parts: where the scores of finished windows are kept.
        on_progress: told of each finished window.

    Returns:
        The quality of each model.
    """
    scores: list[dict[str, list[float]]] = []
    for index, window in enumerate(windows):
        data = parts.read(f"window-{index:06d}")
        if data is None:
            data = json.dumps(_score_window(models, original, window)).encode()
            parts.write(f"window-{index:06d}", data)
        scores.append(json.loads(data))
        on_progress(index + 1, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {name: _summarise([score[name] for score in scores], tokens) for name in models}


@torch.inference_mode()
def _score_window(models: dict[str, nn.Module], original: str, window: Tensor) -> dict[str, list[float]]:
    """Return (mean negative log-likelihood, mean KL from the original) of each model on one window [tokens]."""
    reference = _log_probabilities(models[original], window)
    scores = {}
    for name, model in models.items():
        log_p = reference if name == original else _log_probabilities(model, window)
        nll = nn.functional.nll_loss(log_p, window[1:].to(log_p.device))
        kl = 0.0 if name == original else nn.functional.kl_div(log_p, reference, reduction="batchmean", log_target=True)
        scores[name] = [float(nll), float(kl)]
    return scores


def _log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """Return next-token log-probabilities of one window, float32 [tokens - 1, vocabulary]."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def _summarise(scores: list[list[float]], tokens: int) -> Quality:
    values = torch.tensor(scores, dtype=torch.float64)  # [windows, (nll, kl)]
    mean = values.mean(0)
    stderr = values.std(0) / math.sqrt(len(scores)) if len(scores) > 1 else torch.full((2,), math.nan, dtype=torch.float64)
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
