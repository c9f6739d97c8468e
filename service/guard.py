"""The guard: finished plans are compared on text that none was fitted to, and the best one is delivered."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from quantizer.running.evaluate import Quality

UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class Guard:
    """What the guard found.

    Attributes:
        delivered: name of the plan with the least KL divergence of those that may be delivered; of
            equals, the first.
        uniform: name of the best uniform plan.
        quality: of every candidate, and of the original.
        tuned: of the delivered plan after training; None where there was none.
    """

    delivered: str
    uniform: str
    quality: Mapping[str, Quality]
    tuned: Quality | None = None

    @classmethod
    def judge(cls, quality: Mapping[str, Quality], forbidden: Collection[str] = ()) -> "Guard":
        """Return the finding for the qualities of `original` and of all candidates.

        Names of uniform plans begin with `uniform`.

        Args:
            quality: by name.
            forbidden: candidates that are compared but break a demand of the user, and so are not
                delivered.
        """
        candidates = [name for name in quality if name != "original"]

        def loss(name: str) -> float:
            return _loss(quality[name])

        uniforms = [name for name in candidates if name.startswith(UNIFORM)]
        allowed = [name for name in candidates if name not in forbidden]
        return cls(min(allowed, key=loss), min(uniforms, key=loss), quality)

    @property
    def keeps_tuned(self) -> bool:
        """Whether training brought the delivered plan nearer to the original, so that the trained one is delivered."""
        return self.tuned is not None and nearer(self.tuned, self.quality[self.delivered])

    @property
    def lead(self) -> float:
        """By how much the delivered plan's KL is below the best uniform plan's, as a share of the latter."""
        uniform = self.quality[self.uniform].kl_nats_per_token
        return 1 - self.quality[self.delivered].kl_nats_per_token / uniform if uniform > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "delivered": self.delivered,
            "uniform": self.uniform,
            "lead_over_uniform": self.lead,
            "candidates": {
                name: found.to_json() for name, found in self.quality.items() if name != "original"
            },
            "tuned": self.tuned.to_json() if self.tuned is not None else None,
        }


def nearer(one: Quality, other: Quality) -> bool:
    """Return whether the first model is nearer to the original than the second."""
    return _loss(one) < _loss(other)


def _loss(quality: Quality) -> float:
    found = quality.kl_nats_per_token
    return found if isfinite(found) else inf
