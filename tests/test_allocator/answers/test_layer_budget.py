"""A budget in bytes is one of the whole checkpoint.

What its other parts take is not the layers'.
"""

from dataclasses import replace
from itertools import product

import pytest

from allocator.answers.answer import answer_budget, answer_loss
from allocator.answers.layer_budget import UNKNOWN, layer_bytes, resolve_budget
from allocator.answers.whatif import WhatIf
from allocator.demands.budget import Budget, budget_of
from allocator.errors import BudgetError, BudgetInfeasible, ProfileError
from allocator.profile import Profile
from allocator.unquantized import EmbeddingOption, Unquantized
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import OUTSIDE_BLOCKS, LayerSpec, Plan
from tests.support.synthetic_profiles import make_profile

PARTS = {"embedding and head": 4_000, "norms": 600, "biases": 40}
HEADERS = 300
REST = 4_940
TABLE = LayerSpec("model.embed_tokens", OUTSIDE_BLOCKS, "embedding and head", 20, 100)
EIGHT, FOUR = Fidelity.uniform(8, 64), Fidelity.uniform(4, 64)
OPTIONS = (
    EmbeddingOption(TABLE, None, 4_000, 0.0),
    EmbeddingOption(TABLE, EIGHT, EIGHT.weight_bytes(20, 100), 0.001),
    EmbeddingOption(TABLE, FOUR, FOUR.weight_bytes(20, 100), 0.02),
)
LAYERS_ONLY = make_profile(1, layers=4, menu=5, rank=3)
SIZED = replace(LAYERS_ONLY, unquantized=Unquantized(PARTS, HEADERS))
MEASURED = replace(LAYERS_ONLY, unquantized=Unquantized(PARTS, HEADERS, (OPTIONS,)))


def middle_bytes(profile: Profile) -> int:
    """Return a budget for the layers in the middle of what is feasible."""
    return sum(WhatIf(profile).byte_range) // 2


def in_bytes(size: int) -> Budget:
    return Budget.parse(f"{size}B")


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        ("900MB", None, "checkpoint"),
        ("900MB", "layers", "layers"),
        ("900MB", "checkpoint", "checkpoint"),
        ("2.5bpw", None, "layers"),
        ("2.5bpw", "layers", "layers"),
    ],
)
def test_bytes_count_the_checkpoint_and_bits_the_layers(
    text: str, wanted: str | None, expected: str
) -> None:
    assert budget_of(Budget.parse(text), wanted) == expected


def test_bits_per_weight_of_a_checkpoint_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"bits of quantized weights.*900MB"):
        budget_of(Budget.parse("2.5bpw"), "checkpoint")
    with pytest.raises(BudgetError, match="checkpoint or layers"):
        budget_of(Budget.parse("2.5bpw"), "file")


def test_the_rest_of_the_checkpoint_is_subtracted() -> None:
    wanted = middle_bytes(SIZED)
    found = resolve_budget(WhatIf(SIZED), in_bytes(wanted + REST))
    assert found.layer_bytes == wanted
    assert found.unquantized_bytes == REST
    assert found.checkpoint_bytes(wanted) == wanted + REST
    assert not found.chosen


@pytest.mark.parametrize(("text", "wanted"), [("2.6bpw", None), (None, "layers")])
def test_a_budget_of_the_layers_is_theirs_alone(text: str | None, wanted: str | None) -> None:
    budget = Budget.parse(text) if text else in_bytes(middle_bytes(SIZED))
    found = resolve_budget(WhatIf(SIZED), budget, wanted)
    assert found.layer_bytes == budget.weight_bytes(SIZED.layers)
    assert found.unquantized_bytes == REST


def test_a_profile_of_an_earlier_version_counts_layers_and_says_so() -> None:
    wanted = middle_bytes(LAYERS_ONLY)
    found = resolve_budget(WhatIf(LAYERS_ONLY), in_bytes(wanted))
    assert found.layer_bytes == wanted
    assert found.checkpoint_bytes(wanted) is None
    assert found.notes == (UNKNOWN,)
    with pytest.raises(BudgetError, match="profile the model again"):
        resolve_budget(WhatIf(LAYERS_ONLY), in_bytes(wanted), "checkpoint")


@pytest.mark.parametrize("given", [1, REST, REST + 1])
def test_too_small_a_checkpoint_names_the_smallest_one(given: int) -> None:
    smallest = WhatIf(SIZED).byte_range[0]
    with pytest.raises(BudgetInfeasible, match="whole checkpoint") as caught:
        resolve_budget(WhatIf(SIZED), in_bytes(given))
    assert caught.value.nearest_bytes == smallest + REST
    assert resolve_budget(WhatIf(SIZED), in_bytes(smallest + REST)).layer_bytes == smallest


def test_embeddings_are_stored_in_the_way_that_loses_least() -> None:
    whatif = WhatIf(MEASURED)
    others = REST - OPTIONS[0].weight_bytes
    for extra in (0, 200, 1_200, 2_500, 4_000):
        total = whatif.byte_range[0] + others + OPTIONS[2].weight_bytes + extra
        losses = {}
        for (option,) in product(OPTIONS):
            left = total - others - option.weight_bytes
            if left >= whatif.byte_range[0]:
                losses[option.weight_bytes] = whatif.plan(left).predicted_loss + option.loss
        found = resolve_budget(whatif, in_bytes(total))
        (chosen,) = found.chosen
        assert losses[chosen.weight_bytes] == min(losses.values())
        assert found.layer_bytes + (found.unquantized_bytes or 0) == total


def test_the_rest_survives_the_profile_document() -> None:
    for profile in (LAYERS_ONLY, SIZED, MEASURED):
        assert Profile.loads(*profile.dumps()).unquantized == profile.unquantized
    assert len({profile.digest for profile in (LAYERS_ONLY, SIZED, MEASURED)}) == 3


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ProfileError, match="-1 bytes of norms"):
        Unquantized({"norms": -1}, 0)


def test_an_answer_states_both_sizes_and_a_whole_plan() -> None:
    whatif = WhatIf(MEASURED)
    total = whatif.byte_range[0] + REST - OPTIONS[0].weight_bytes + OPTIONS[2].weight_bytes + 100
    answer = answer_budget(whatif, in_bytes(total))
    document = answer.to_json()
    assert document["checkpoint_bytes"] <= total
    assert document["checkpoint_bytes"] == document["weight_bytes"] + document["unquantized_bytes"]
    assert document["embedding_fidelities"] == {TABLE.name: "int4g64"}
    whole = Plan.from_json(document)
    assert whole.embeddings == {TABLE: FOUR}
    assert whole.without_embeddings == answer.allocation.plan
    assert MEASURED.unquantized is not None
    beside = MEASURED.unquantized.bytes_beside(whole)
    assert beside == document["unquantized_bytes"]
    assert layer_bytes(MEASURED, in_bytes(total), plan=whole) == total - beside


def test_an_answer_for_a_loss_states_the_size_of_the_checkpoint() -> None:
    whatif = WhatIf(SIZED)
    loss = whatif.plan(middle_bytes(SIZED)).predicted_loss
    answer = answer_loss(whatif, loss)
    assert answer.checkpoint_bytes == answer.allocation.weight_bytes + REST
    assert answer.bound_bytes is not None
    assert answer_loss(WhatIf(LAYERS_ONLY), loss).checkpoint_bytes is None
