"""From a budget as a user states it to the bytes that the quantized layers may take.

A budget in bits per weight, and a pool, is always one of the layers. A budget in bytes is one of
the whole checkpoint unless the user says otherwise: what the layers may take is the rest,

    layer_bytes = budget_bytes - unquantized_bytes,

where embedding and head are stored as they were, or, if the profile has measured other ways, in the
way that leaves the least modelled loss (`allocator.answers.embeddings`).
"""

from dataclasses import dataclass

from allocator.answers.embeddings import choose_embedding_options
from allocator.answers.whatif import WhatIf
from allocator.demands.budget import LAYERS, Budget, budget_of
from allocator.errors import BudgetError, BudgetInfeasible
from allocator.profile import Profile
from allocator.unquantized import EmbeddingOption, Unquantized
from quantizer.plans.plan import Plan

UNKNOWN = (
    "the profile does not say what the checkpoint contains beside its layers, so the budget counts "
    "the layers only; profile the model again to budget the whole checkpoint"
)
"""The note on an answer from a profile of an earlier version."""


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """A budget, resolved.

    Attributes:
        layer_bytes: what the quantized layers may take.
        unquantized_bytes: what the rest of the checkpoint takes; None if the profile does not say.
        chosen: how each measured embedding and head is stored; empty if they stay as they are.
        notes: what the user should know.
    """

    layer_bytes: int
    unquantized_bytes: int | None
    chosen: tuple[EmbeddingOption, ...] = ()
    notes: tuple[str, ...] = ()

    def checkpoint_bytes(self, layer_bytes: int) -> int | None:
        """Return the size of a checkpoint whose layers take `layer_bytes`, an upper bound."""
        return None if self.unquantized_bytes is None else layer_bytes + self.unquantized_bytes


def resolve_budget(whatif: WhatIf, budget: Budget, wanted: str | None = None) -> LayerBudget:
    """Return what a budget leaves to the layers of a profile.

    Args:
        whatif: the profile under its constraints.
        budget: as the user wrote it.
        wanted: one of `BUDGET_OF`; None goes by the unit, see `budget_of`, and falls back to the
            layers, with a note, if the profile does not know the rest of the checkpoint.

    Raises:
        BudgetError: `wanted` does not fit the budget or the profile.
        BudgetInfeasible: the rest of the checkpoint alone takes the budget, or no way to store
            embedding and head leaves enough for the layers.
    """
    unquantized = whatif.profile.unquantized
    size_bytes = budget.weight_bytes(whatif.profile.layers)
    if budget_of(budget, wanted) == LAYERS:
        return LayerBudget(size_bytes, unquantized.total_bytes if unquantized else None)
    if unquantized is None:
        if wanted is not None:
            raise BudgetError(f"budget {budget.text!r} of the whole checkpoint: {UNKNOWN}")
        return LayerBudget(size_bytes, None, notes=(UNKNOWN,))
    found = _of_checkpoint(whatif, budget, size_bytes, unquantized)
    _check(whatif, budget, size_bytes, found)
    return found


def _of_checkpoint(
    whatif: WhatIf, budget: Budget, size_bytes: int, unquantized: Unquantized
) -> LayerBudget:
    rest_bytes = unquantized.without_embeddings_bytes
    if size_bytes <= rest_bytes:
        raise BudgetInfeasible(
            f"budget {budget.text} is for the whole checkpoint, of which {rest_bytes} bytes are "
            "not quantized (norms, biases, headers, and embedding and head unless other ways to "
            "store them were measured), so nothing is left for the layers; give more, or state "
            "the budget of the layers",
            budget_bytes=size_bytes,
            nearest_bytes=rest_bytes + whatif.byte_range[0],
            largest_bytes=rest_bytes + whatif.byte_range[1],
        )
    chosen: tuple[EmbeddingOption, ...] = ()
    if unquantized.embedding_options:
        chosen = choose_embedding_options(
            whatif, unquantized.embedding_options, size_bytes - rest_bytes
        )
    rest_bytes += sum(option.weight_bytes for option in chosen)
    return LayerBudget(size_bytes - rest_bytes, rest_bytes, chosen)


def _check(whatif: WhatIf, budget: Budget, size_bytes: int, found: LayerBudget) -> None:
    """Refuse, in bytes of the checkpoint, what is infeasible in bytes of the layers."""
    try:
        whatif.check(found.layer_bytes)
    except BudgetInfeasible as error:
        rest_bytes = found.unquantized_bytes or 0
        raise BudgetInfeasible(
            f"budget {budget.text} is for the whole checkpoint, of which {rest_bytes} bytes are "
            f"not quantized; for the layers: {error}",
            budget_bytes=size_bytes,
            nearest_bytes=error.nearest_bytes + rest_bytes,
            largest_bytes=error.largest_bytes + rest_bytes,
            binding=error.binding,
        ) from error


def layer_bytes(
    profile: Profile, budget: Budget, wanted: str | None = None, plan: Plan | None = None
) -> int:
    """Return what a budget leaves to the layers, whether or not any plan fits it.

    Embedding and head take what they take in `plan`, or unquantized where none is given.

    Raises:
        BudgetError: `wanted` does not fit the budget or the profile.
    """
    size_bytes = budget.weight_bytes(profile.layers)
    unquantized = profile.unquantized
    if budget_of(budget, wanted) == LAYERS:
        return size_bytes
    if unquantized is None:
        if wanted is not None:
            raise BudgetError(f"budget {budget.text!r} of the whole checkpoint: {UNKNOWN}")
        return size_bytes
    rest_bytes = unquantized.total_bytes if plan is None else unquantized.bytes_beside(plan)
    return max(size_bytes - rest_bytes, 0)
