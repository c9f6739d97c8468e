"""The one verb of the allocator: from a profile and a budget to a plan."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from allocator.menu import infeasible
from allocator.problem import AllocationProblem
from allocator.profile import Profile
from allocator.rounding import round_shares
from allocator.uniform import shares_of
from quantizer.plan import Plan

METHOD = "osqp-local-1"
"""Names what this module and those below it compute; a change of their results gets a new name."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """A plan, and what the solver says of it.

    Attributes:
        plan: one fidelity for each layer.
        budget_bytes: what was asked for.
        predicted_loss: modelled KL divergence from the original on calibration text, [nats/token].
        relaxed_loss: the same of the relaxed optimum, which no plan of this menu can beat in the model.
        price: modelled loss that one more byte would save, [nats/token/byte].
        status: the solver's word on the relaxed program.
        solver: name and version.
        notes: what the caller should know, in sentences.
    """

    plan: Plan
    budget_bytes: int
    predicted_loss: float
    relaxed_loss: float
    price: float
    status: str
    solver: str
    notes: tuple[str, ...]

    @property
    def gap(self) -> float:
        """Loss of the plan above the relaxed optimum, as a share of the plan's loss."""
        return (self.predicted_loss - self.relaxed_loss) / max(abs(self.predicted_loss), 1e-12)

    @property
    def slack_bytes(self) -> int:
        """Bytes of the budget that the plan does not use."""
        return self.budget_bytes - self.plan.weight_bytes

    def replaced_by(self, plan: Plan, profile: Profile) -> "Allocation":
        """Return an allocation that delivers another plan for the same budget."""
        loss = profile.loss_of_shares(shares_of(profile, plan))
        return replace(self, plan=plan, predicted_loss=loss)

    def to_json(self) -> dict[str, Any]:
        """Return the plan's JSON with the solver's findings beside it; `Plan.from_json` reads the plan back."""
        return self.plan.to_json() | {
            "budget_bytes": self.budget_bytes,
            "slack_bytes": self.slack_bytes,
            "predicted_loss_nats_per_token": self.predicted_loss,
            "relaxed_loss_nats_per_token": self.relaxed_loss,
            "gap": self.gap,
            "price_nats_per_token_per_byte": self.price,
            "status": self.status,
            "solver": self.solver,
            "notes": list(self.notes),
        }

    def dumps(self) -> str:
        """Return `to_json` as text."""
        return json.dumps(self.to_json(), indent=1) + "\n"


def allocate(profile: Profile, budget_bytes: int) -> Allocation:
    """Return the plan of least modelled loss that fits `budget_bytes`.

    The byte count is exact and never above the budget. A budget above the largest plan of the menu gets that plan, with a note.

    Raises:
        BudgetInfeasible: the budget is below the smallest plan of the menu.
        SolverFailed: the solver gave no usable answer.
    """
    sizes = profile.weight_bytes
    smallest, largest = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    if budget_bytes < smallest:
        raise infeasible(profile.layers, budget_bytes, smallest, largest)
    notes = _range_notes(profile, budget_bytes, largest)
    relaxed = AllocationProblem(profile).solve(budget_bytes)
    choice = sizes.argmax(axis=1) if budget_bytes >= largest else round_shares(profile, relaxed.share, relaxed.price, budget_bytes)
    return Allocation(
        plan=profile.plan(choice),
        budget_bytes=budget_bytes,
        predicted_loss=profile.loss(np.asarray(choice)),
        relaxed_loss=relaxed.loss,
        price=relaxed.price,
        status=relaxed.status,
        solver=relaxed.solver,
        notes=notes,
    )


def _range_notes(profile: Profile, budget_bytes: int, largest: int) -> tuple[str, ...]:
    notes = []
    if budget_bytes >= largest:
        notes.append(f"the budget holds the largest plan of the menu ({largest} bytes); the rest of it is not used")
    low, high = profile.budget_range
    if profile.context is None:
        notes.append("the profile was measured in the original model, where layers look more harmless than among quantized ones")
    elif not low <= budget_bytes <= high:
        notes.append(
            f"the profile was measured around a plan of {int(profile.weight_bytes[:, profile.context].sum())} bytes and is trusted "
            f"from {low} to {high}; for this budget, profile the model anew"
        )
    return tuple(notes)
