"""The slow twin tries every plan."""

from typing import Any

import numpy as np
import pytest

from allocator.errors import BudgetInfeasible
from allocator.exhaustive import best_plan
from allocator.profile import Profile
from tests.test_allocator.synthetic import budget_at, byte_ends, make_profile


def knapsack_loss(profile: Profile, budget_bytes: int) -> float:
    """Return the least loss where damages just add up, layer by layer: of plans of the same size, only the best is kept."""
    kept = {0: profile.context_loss}
    for sizes, damages in zip(profile.weight_bytes.tolist(), profile.linear.tolist(), strict=True):
        longer: dict[int, float] = {}
        for used, loss in kept.items():
            for size, damage in zip(sizes, damages, strict=True):
                longer[used + size] = min(loss + damage, longer.get(used + size, np.inf))
        kept = longer
    return min(loss for used, loss in kept.items() if used <= budget_bytes)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_best_plan_is_better_than_any_other_that_fits(rank: int) -> None:
    profile, rng = make_profile(0, rank=rank), np.random.default_rng(0)
    budget = budget_at(profile, 0.5)
    choice, best = best_plan(profile, budget)
    assert profile.plan(choice).weight_bytes <= budget
    assert profile.loss(choice) == best
    tried = [row for row in rng.integers(4, size=(300, 5)) if profile.plan(row).weight_bytes <= budget]
    assert len(tried) > 100
    assert all(profile.loss(row) >= best for row in tried)


@pytest.mark.parametrize("options", [{}, {"rising": True}, {"spread": 6.0}, {"in_original": True}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_where_damages_just_add_up_the_best_plan_is_that_of_a_knapsack(seed: int, options: dict[str, Any]) -> None:
    profile = make_profile(seed, rank=0, **options)
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = budget_at(profile, share)
        choice, best = best_plan(profile, budget)
        assert best == profile.loss(choice) == pytest.approx(knapsack_loss(profile, budget), rel=1e-12)


def test_the_first_of_equal_plans_is_taken() -> None:
    profile = make_profile(0, layers=3, silent=3)
    assert best_plan(profile, byte_ends(profile)[1])[0].tolist() == [0, 0, 0]


def test_the_smallest_plan_is_all_that_the_smallest_budget_holds() -> None:
    profile = make_profile(0)
    low, _ = byte_ends(profile)
    assert best_plan(profile, low)[0].tolist() == [0] * 5
    with pytest.raises(BudgetInfeasible, match=f"{low - 1} bytes"):
        best_plan(profile, low - 1)


def test_too_many_plans_are_refused() -> None:
    profile = make_profile(0, layers=10)
    with pytest.raises(ValueError, match="too many"):
        best_plan(profile, byte_ends(profile)[1])
