"""The answer to "what is the best plan within this budget": the plan, and how good it is."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from allocator.profile import Profile, shares_of
from quantizer.plans.plan import Plan


@dataclass(frozen=True, slots=True)
class LimitUse:
    """How a plan uses a limit other than the budget.

    Attributes:
        name: of the limit.
        unit: of the amounts, `bytes` or `us`.
        used: by the plan.
        most: the limit.
        price: dual price: the loss that one more unit would save, [nats/token].
    """

    name: str
    unit: str
    used: float
    most: float
    price: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """A plan, and what the solver knows of it.

    Attributes:
        plan: one fidelity for each layer.
        weight_bytes: its exact size.
        budget_bytes: what was asked for.
        predicted_loss: modelled KL divergence from the original on calibration text, [nats/token].
        bound: modelled loss that no plan within the same limits can be below, proven by
            `allocator.solver.bound`.
        price: dual price of a byte: the modelled loss that one more byte would save,
            [nats/token/byte].
        limits: use of further limits.
        decided_by: the rule that decided each layer, empty where none did; empty altogether where
            there are no rules.
        status: `solved`, or `inaccurate` where the solver stopped early, so that plan or bound may
            be worse than they could be.
        solver: name and version.
        notes: what the caller should know, in sentences.
    """

    plan: Plan
    weight_bytes: int
    budget_bytes: int
    predicted_loss: float
    bound: float
    price: float
    limits: tuple[LimitUse, ...]
    decided_by: tuple[str, ...]
    status: str
    solver: str
    notes: tuple[str, ...]

    @property
    def gap(self) -> float:
        """Loss of the plan above the bound, as a share of the plan's loss."""
        return (self.predicted_loss - self.bound) / max(abs(self.predicted_loss), 1e-12)

    @property
    def slack_bytes(self) -> int:
        """Bytes of the budget that the plan does not use."""
        return self.budget_bytes - self.weight_bytes

    def replaced_by(self, plan: Plan, profile: Profile) -> "Allocation":
        """Return the allocation with another plan for the same budget.

        The use of further limits and the deciding rules are left out: they are those of the old
        plan.
        """
        loss = profile.loss_of_shares(shares_of(profile, plan))
        return replace(
            self,
            plan=plan,
            weight_bytes=plan.weight_bytes,
            predicted_loss=loss,
            limits=(),
            decided_by=(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan's JSON with the results of the solver beside it.

        `Plan.from_json` reads the plan back.
        """
        return self.plan.to_json() | {
            "budget_bytes": self.budget_bytes,
            "slack_bytes": self.slack_bytes,
            "predicted_loss_nats_per_token": self.predicted_loss,
            "bound_nats_per_token": self.bound,
            "gap": self.gap,
            "price_nats_per_token_per_byte": self.price,
            "limits": [
                {
                    "name": use.name,
                    "unit": use.unit,
                    "used": use.used,
                    "most": use.most,
                    "price_nats_per_token": use.price,
                }
                for use in self.limits
            ],
            "decided_by": {
                layer.name: rule
                for layer, rule in zip(self.plan.layers, self.decided_by, strict=False)
                if rule
            },
            "status": self.status,
            "solver": self.solver,
            "bitwright": version("bitwright"),
            "notes": list(self.notes),
        }

    def dumps(self) -> str:
        """Return `to_json` as text."""
        return json.dumps(self.to_json(), indent=1) + "\n"
