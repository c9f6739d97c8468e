"""Quality of a model on a text: perplexity, and divergence from the original model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

_LARGEST_EXPONENT = 709
_INFINITY = "infinity"


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one model on one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood; infinite where that is more than 709.
        perplexity_stderr: its standard error.
        nll_nats_per_token: mean negative log-likelihood of the next token; every window is scored
            by itself.
        nll_stderr: its standard error over windows.
        kl_nats_per_token: mean KL(original || model) of the next-token distributions; 0 for the
            original itself.
        kl_stderr: its standard error over windows.
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

    @classmethod
    def of_windows(cls, scores: Sequence[Sequence[float]], tokens: int) -> "Quality":
        """Return the quality of a model from the scores of single windows.

        Args:
            scores: mean negative log-likelihood and mean KL divergence of each window,
                [nats/token].
            tokens: next-token predictions in all windows.
        """
        values = torch.tensor(scores, dtype=torch.float64)  # [windows, 2]
        nll, kl = values.mean(0).tolist()
        nll_stderr, kl_stderr = _standard_errors(values).tolist()
        perplexity = math.inf if nll > _LARGEST_EXPONENT else math.exp(nll)
        return cls(
            perplexity=perplexity,
            perplexity_stderr=math.nan if math.isinf(perplexity) else perplexity * nll_stderr,
            nll_nats_per_token=nll,
            nll_stderr=nll_stderr,
            kl_nats_per_token=kl,
            kl_stderr=kl_stderr,
            windows=len(scores),
            tokens=tokens,
        )

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the quality as JSON values.

        An unknown standard error is null, an infinite number the string `infinity`.
        """
        return {key: _json_value(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Quality":
        """Return the quality that `to_json` wrote."""
        known: dict[str, Any] = {
            key: math.nan if value is None else float(value) if value == _INFINITY else value
            for key, value in values.items()
        }
        return cls(**known)


def _json_value(value: float) -> float | str | None:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else _INFINITY


def _standard_errors(values: torch.Tensor) -> torch.Tensor:
    """Return the standard error of each column's mean; NaN if there is only one row."""
    if len(values) == 1:
        return torch.full_like(values[0], math.nan)
    return values.std(0) / math.sqrt(len(values))
