"""One point of a frontier, with the figures that are shown of it."""

from dataclasses import dataclass

from allocator.answers.frontier import Point
from allocator.demands.menu import bpw
from allocator.profile import Profile


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """One budget of a frontier.

    Attributes:
        budget_bytes: the budget.
        weight_bytes: size of its plan.
        bits_per_weight: average size of a weight.
        predicted_kl_nats_per_token: predicted KL divergence of the plan.
        bound_nats_per_token: predicted loss that no plan of this budget can be below.
        gap: share of the plan's loss above the bound.
        price_nats_per_token_per_byte: loss that one more byte would save.
        on_hull: whether the plan is on the lower convex hull of all of them.
        knee: whether the curve bends here.
        checkpoint_bytes: upper bound on the size of the whole checkpoint, embedding and head
            unquantized; None if the profile does not say.
    """

    budget_bytes: int
    weight_bytes: int
    bits_per_weight: float
    predicted_kl_nats_per_token: float
    bound_nats_per_token: float
    gap: float
    price_nats_per_token_per_byte: float
    on_hull: bool
    knee: bool
    checkpoint_bytes: int | None = None

    @classmethod
    def of(cls, profile: Profile, point: Point) -> "FrontierRow":
        """Return the row of a point."""
        allocation = point.allocation
        return cls(
            budget_bytes=allocation.budget_bytes,
            weight_bytes=allocation.weight_bytes,
            bits_per_weight=bpw(profile.layers, allocation.weight_bytes),
            predicted_kl_nats_per_token=allocation.predicted_loss,
            bound_nats_per_token=allocation.bound,
            gap=allocation.gap,
            price_nats_per_token_per_byte=allocation.price,
            on_hull=point.on_hull,
            knee=point.knee,
            checkpoint_bytes=(
                allocation.weight_bytes + profile.unquantized.total_bytes
                if profile.unquantized
                else None
            ),
        )
