"""Which candidate plan is delivered.

Candidate plans are compared on held-out windows that no plan was fitted to. The one nearest to the
original is delivered.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from allocator.answers.pricing import price_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.errors import RuleError
from allocator.profile import Profile
from quantizer.plans.plan import Plan
from quantizer.running.quality import Quality
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.evaluation import ORIGINAL, evaluate
from service.stages.plan import UNIFORM, CandidatePlans
from service.stages.windows import Windows


@dataclass(frozen=True, slots=True)
class Selection:
    """The comparison of candidate plans.

    Attributes:
        delivered: name of the candidate with the least KL divergence of those that may be
            delivered; the first of equal ones.
        uniform: name of the uniform plan with the least KL divergence.
        quality: of every candidate and of the original, on the selection windows.
    """

    delivered: str
    uniform: str
    quality: Mapping[str, Quality]

    @classmethod
    def of(cls, quality: Mapping[str, Quality], forbidden: Collection[str] = ()) -> "Selection":
        """Return the selection from the qualities of the original and of all candidates.

        Args:
            quality: by name; names of uniform plans begin with `uniform`.
            forbidden: candidates that violate a constraint of the user, and are compared only.
        """
        losses = {name: _loss(found) for name, found in quality.items() if name != ORIGINAL}
        uniforms = [name for name in losses if name.startswith(UNIFORM)]
        allowed = [name for name in losses if name not in forbidden]
        return cls(
            min(allowed, key=losses.__getitem__), min(uniforms, key=losses.__getitem__), quality
        )

    @property
    def candidates(self) -> dict[str, Quality]:
        """Quality of every candidate by name."""
        return {name: quality for name, quality in self.quality.items() if name != ORIGINAL}

    @property
    def delivered_quality(self) -> Quality:
        """Quality of the delivered candidate, before training."""
        return self.quality[self.delivered]

    @property
    def uniform_quality(self) -> Quality:
        """Quality of the best uniform plan."""
        return self.quality[self.uniform]

    @property
    def lead(self) -> float:
        """Share of the best uniform plan's KL divergence that the delivered candidate saves."""
        uniform = self.uniform_quality.kl_nats_per_token
        return 1 - self.delivered_quality.kl_nats_per_token / uniform if uniform > 0 else 0.0


def select_plan(
    context: RunContext,
    request: RunRequest,
    profile: Profile,
    plans: CandidatePlans,
    checkpoints: Mapping[str, Path],
    windows: Windows,
) -> Selection:
    """Compare candidate plans on held-out windows, and select the one to deliver.

    Args:
        context: gives the original model and the machine.
        request: gives the constraints.
        profile: prices the uniform plans under the constraints.
        plans: the candidates.
        checkpoints: their folders by name.
        windows: held-out windows that no plan was fitted to.
    """
    quality = evaluate(context, checkpoints, windows, "compare", fast=True)
    return Selection.of(quality, forbidden_uniforms(profile, request.constraints, plans.uniforms))


def is_nearer(one: Quality, other: Quality) -> bool:
    """Return whether the first model is nearer to the original than the second."""
    return _loss(one) < _loss(other)


def _loss(quality: Quality) -> float:
    loss = quality.kl_nats_per_token
    return loss if isfinite(loss) else inf


def forbidden_uniforms(
    profile: Profile, constraints: Constraints, uniforms: Mapping[str, Plan]
) -> set[str]:
    """Return the names of the uniform plans that violate the constraints.

    Plans count as violating if the table of latencies does not contain one of their fidelities.
    """
    whatif = WhatIf(profile, constraints)
    forbidden: set[str] = set()
    for name, plan in uniforms.items():
        try:
            if not price_plan(whatif, plan).sound:
                forbidden.add(name)
        except RuleError:  # no latency is known for a fidelity of this plan
            forbidden.add(name)
    return forbidden
