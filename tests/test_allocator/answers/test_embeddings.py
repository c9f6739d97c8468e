"""Promises of allocator.answers.embeddings.

Of all ways to store embedding and head the one that, with the layers' best plan, loses least.
"""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.allocate import allocate
from allocator.answers.embeddings import choose_embedding_options
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import UNCONSTRAINED, Constraints
from allocator.errors import BudgetInfeasible
from allocator.profile import Profile
from allocator.unquantized import EmbeddingOption
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import OUTSIDE_BLOCKS, LayerSpec
from tests.support.synthetic_profiles import PROPERTY, make_profile

TABLES = [LayerSpec(name, OUTSIDE_BLOCKS, name, 500, 64) for name in ("embedding", "head")]
NAMES = (None, "int8g64", "int4g64", "int3g64")


def _ways(losses: list[float]) -> list[list[EmbeddingOption]]:
    rows = iter(losses)
    return [
        [
            EmbeddingOption(
                table, Fidelity.parse(name), Fidelity.parse(name).weight_bytes(500, 64), next(rows)
            )
            if name
            else EmbeddingOption(table, None, 500 * 64 * 2, 0.0)
            for name in NAMES
        ]
        for table in TABLES
    ]


def _loss(
    profile: Profile, ways: tuple[EmbeddingOption, ...], budget_bytes: int, constraints: Constraints
) -> float:
    try:
        layers = allocate(
            profile, budget_bytes - sum(way.weight_bytes for way in ways), constraints
        ).predicted_loss
    except BudgetInfeasible:
        return float("inf")
    return layers + sum(way.loss for way in ways)


@PROPERTY
@given(
    seed=st.integers(0, 1000),
    losses=st.lists(st.floats(0, 2), min_size=6, max_size=6),
    share=st.floats(0, 1.2),
)
def test_the_way_of_least_modelled_loss_is_chosen(
    seed: int, losses: list[float], share: float
) -> None:
    profile, choices = make_profile(seed), _ways(losses)
    least, most = int(profile.weight_bytes.min(1).sum()), int(profile.weight_bytes.max(1).sum())
    smallest = sum(min(way.weight_bytes for way in ways) for ways in choices)
    largest = sum(max(way.weight_bytes for way in ways) for ways in choices)
    budget = round(least + smallest + share * (most + largest - least - smallest))
    found = choose_embedding_options(WhatIf(profile, UNCONSTRAINED), choices, budget)
    each = {ways: _loss(profile, ways, budget, UNCONSTRAINED) for ways in product(*choices)}
    assert each[found] == pytest.approx(min(each.values()), rel=1e-6, abs=1e-9)
    assert sum(way.weight_bytes for way in found) <= budget


def test_a_budget_that_no_way_leaves_enough_of_is_refused() -> None:
    profile, choices = make_profile(0), _ways([0.1] * 6)
    smallest = sum(min(way.weight_bytes for way in ways) for ways in choices)
    whatif = WhatIf(profile, UNCONSTRAINED)
    with pytest.raises(BudgetInfeasible):
        choose_embedding_options(whatif, choices, smallest + whatif.byte_range[0] - 1)
