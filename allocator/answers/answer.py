"""The answer to a what-if: the best plan, in bytes of its layers and of the whole checkpoint."""

from dataclasses import dataclass
from typing import Any

from allocator.answers.allocation import Allocation
from allocator.answers.layer_budget import LayerBudget, resolve_budget
from allocator.answers.smallest_plan import smallest_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.budget import Budget


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan for a budget or for a loss.

    Attributes:
        allocation: the plan of the layers, and how good it is.
        budget: what the budget left to the layers, and what the rest of the checkpoint takes.
        bound_bytes: for a loss, a size that no plan within it can be below; else None.
    """

    allocation: Allocation
    budget: LayerBudget
    bound_bytes: int | None = None

    @property
    def checkpoint_bytes(self) -> int | None:
        """An upper bound on the size of the whole checkpoint; None if the profile does not say."""
        return self.budget.checkpoint_bytes(self.allocation.weight_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the plan's JSON with the figures beside it.

        Layers and their bytes are those of `Allocation.to_json`. Where embedding and head are
        quantized too, they stand after the layers, so that `Plan.from_json` reads a whole plan.
        """
        document = self.allocation.to_json() | {
            "checkpoint_bytes": self.checkpoint_bytes,
            "unquantized_bytes": self.budget.unquantized_bytes,
            "embedding_fidelities": {
                option.embedding.name: option.fidelity.name if option.fidelity else "unquantized"
                for option in self.budget.chosen
            },
        }
        document["notes"] += self.budget.notes
        if self.bound_bytes is not None:
            document["bound_bytes"] = self.bound_bytes
        quantized = {
            option.embedding: option.fidelity
            for option in self.budget.chosen
            if option.fidelity is not None
        }
        if quantized:
            whole = self.allocation.plan.with_embeddings(quantized)
            document["layers"] = whole.to_json()["layers"]
        return document


def answer_budget(whatif: WhatIf, budget: Budget, wanted: str | None = None) -> Answer:
    """Return the plan of least modelled loss within a budget.

    Args:
        whatif: a profile under constraints.
        budget: as the user wrote it.
        wanted: what the budget counts, see `allocator.answers.layer_budget.resolve_budget`.

    Raises:
        BudgetError: `wanted` does not fit the budget or the profile.
        BudgetInfeasible, LimitInfeasible: no plan fits.
        SolverFailed: the solver gave no usable answer.
    """
    resolved = resolve_budget(whatif, budget, wanted)
    return Answer(whatif.plan(resolved.layer_bytes), resolved)


def answer_loss(whatif: WhatIf, most_kl: float) -> Answer:
    """Return the smallest plan whose modelled loss is at most `most_kl` [nats/token].

    Raises:
        LossUnreachable: no plan is that good.
    """
    smallest = smallest_plan(whatif, most_kl)
    unquantized = whatif.profile.unquantized
    rest_bytes = unquantized.total_bytes if unquantized else None
    resolved = LayerBudget(smallest.allocation.weight_bytes, rest_bytes)
    return Answer(smallest.allocation, resolved, smallest.bound_bytes)
