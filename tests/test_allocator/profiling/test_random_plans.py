"""Random plans fit and use their share of the budget; the seed decides them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from allocator.profiling.random_plans import BUDGET_SHARES, random_plans
from tests.support.synthetic_profiles import PROPERTY, budget_at, make_profile


@PROPERTY
@given(seed=st.integers(0, 10**6), share=st.floats(0.25, 0.6))
def test_plans_fit_and_use_their_share_of_the_budget(seed: int, share: float) -> None:
    profile = make_profile(1, layers=40, menu=6)
    budget = budget_at(profile, share)
    plans = random_plans(profile, budget, 12, seed)

    sizes = [profile.plan(choice).weight_bytes / budget for choice in plans]
    wanted = [BUDGET_SHARES[turn // 2 % len(BUDGET_SHARES)] for turn in range(12)]
    assert all(0.9 * limit < size <= limit for size, limit in zip(sizes, wanted, strict=True))


def test_plans_differ_and_only_by_the_seed() -> None:
    profile = make_profile(1, layers=20, menu=6)
    first, again, other = (
        random_plans(profile, budget_at(profile, 0.5), 8, seed) for seed in (3, 3, 4)
    )

    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert len({tuple(choice) for choice in (*first, *other)}) == 16


def test_plans_do_not_depend_on_the_measurements() -> None:
    one, two = (make_profile(1, layers=20, menu=6, coupling=coupling) for coupling in (0.1, 0.9))
    budget = budget_at(one, 0.5)
    assert all(
        np.array_equal(left, right)
        for left, right in zip(
            random_plans(one, budget, 6, 0), random_plans(two, budget, 6, 0), strict=True
        )
    )
