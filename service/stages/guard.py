"""The guard: finished plans are compared on text that none was fitted to, and the best one is delivered."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from allocator.answers.difference import price_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.errors import RuleError
from allocator.profile import Profile
from quantizer.plans.fidelity import SCALE_BITS
from quantizer.plans.plan import Plan
from quantizer.running.quality import Quality

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


def label_of(uniform: Plan) -> str:
    """Return a name for a uniform plan.

    Its code widths, group size and, where they are not the usual ones, bits of its scales.
    """
    widest = max(uniform.fidelities, key=lambda fidelity: (fidelity.bits_hi, fidelity.ratio))
    scales = f"s{widest.scale_bits}" if widest.scale_bits < SCALE_BITS[0] else ""
    lowest = min(fidelity.bits_lo for fidelity in uniform.fidelities)
    return f"{UNIFORM} {lowest}+{widest.bits_hi} g{widest.group_size}{scales}"


def forbidden(profile: Profile, constraints: Constraints, uniforms: Mapping[str, Plan]) -> set[str]:
    """Return the names of the uniform plans that break the constraints, or cannot be shown to keep them."""
    whatif, found = WhatIf(profile, constraints), set()
    for name, plan in uniforms.items():
        try:
            if not price_plan(whatif, plan).sound:
                found.add(name)
        except (
            RuleError
        ):  # the table of times does not know a fidelity that only the uniform plan has
            found.add(name)
    return found
