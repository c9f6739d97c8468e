"""The guard: finished plans are compared on text that none was fitted to, and the best one is delivered."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from quantizer.evaluate import Quality


@dataclass(frozen=True, slots=True)
class Guard:
    """What the guard found.

    Attributes:
        delivered: name of the plan with the least KL divergence; of equals, the first.
        quality: of every candidate, and of the original.
    """

    delivered: str
    quality: Mapping[str, Quality]

    @classmethod
    def judge(cls, quality: Mapping[str, Quality]) -> "Guard":
        """Return the finding for the qualities of `original` and of all candidates, `uniform` among them."""
        candidates = [name for name in quality if name != "original"]

        def loss(name: str) -> float:
            found = quality[name].kl_nats_per_token
            return found if isfinite(found) else inf

        return cls(min(candidates, key=loss), quality)

    @property
    def lead(self) -> float:
        """By how much the delivered plan's KL is below the uniform plan's, as a share of the latter."""
        uniform = self.quality["uniform"].kl_nats_per_token
        return 1 - self.quality[self.delivered].kl_nats_per_token / uniform if uniform > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "delivered": self.delivered,
            "lead_over_uniform": self.lead,
            "candidates": {name: found.to_json() for name, found in self.quality.items() if name != "original"},
        }
