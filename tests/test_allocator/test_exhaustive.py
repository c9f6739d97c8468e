"""The slow twin tries every plan."""

import numpy as np
import pytest

from allocator.errors import BudgetInfeasible
from allocator.exhaustive import best_plan
from tests.test_allocator.synthetic import budget_at, byte_ends, make_profile


def test_the_best_plan_is_better_than_any_other_that_fits() -> None:
    profile, rng = make_profile(0), np.random.default_rng(0)
    budget = budget_at(profile, 0.5)
    choice, best = best_plan(profile, budget)
    assert profile.plan(choice).weight_bytes <= budget
    assert profile.loss(choice) == best
    tried = [row for row in rng.integers(4, size=(300, 5)) if profile.plan(row).weight_bytes <= budget]
    assert len(tried) > 100
    assert all(profile.loss(row) >= best for row in tried)


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
