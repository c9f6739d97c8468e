"""The slow twin tries every plan that rules and limits admit."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from allocator.errors import BudgetInfeasible
from allocator.profile import Profile
from allocator.solver.exhaustive import best_choice
from allocator.solver.program import Choice, Limit, Program
from tests.support.synthetic_profiles import budget_at, byte_ends, make_profile


def knapsack_loss(profile: Profile, budget_bytes: int) -> float:
    """Return the least loss where damages just add up, layer by layer.

    Of plans of the same size, only the best is kept.
    """
    kept = {0: profile.context_loss}
    for sizes, damages in zip(profile.weight_bytes.tolist(), profile.linear.tolist(), strict=True):
        longer: dict[int, float] = {}
        for used, loss in kept.items():
            for size, damage in zip(sizes, damages, strict=True):
                longer[used + size] = min(loss + damage, longer.get(used + size, np.inf))
        kept = longer
    return min(loss for used, loss in kept.items() if used <= budget_bytes)


def demanding(seed: int, rank: int) -> tuple[Profile, Program]:
    """Return a profile, and its program under rules and a limit that its best plan breaks."""
    profile, rng = make_profile(seed, rank=rank), np.random.default_rng(seed)
    whole, rows = Program.of(profile), np.arange(5)
    free, _ = best_choice(whole, budget_at(profile, 0.5))
    allowed, cost = rng.random((5, 4)) < 0.7, rng.uniform(0, 1, (5, 4))
    allowed[:, 0], allowed[0] = True, np.arange(4) != free[0]
    return profile, replace(
        whole.restricted_to(allowed),
        limits=(Limit("time", "us", cost, float(cost[rows, free].sum() * 0.9)),),
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_the_best_plan_is_better_than_any_other_that_fits(rank: int) -> None:
    profile, rng = make_profile(0, rank=rank), np.random.default_rng(0)
    budget = budget_at(profile, 0.5)
    choice, best = best_choice(Program.of(profile), budget)
    assert profile.plan(choice).weight_bytes <= budget
    assert profile.loss(choice) == pytest.approx(best, rel=1e-12)
    tried = [
        row for row in rng.integers(4, size=(300, 5)) if profile.plan(row).weight_bytes <= budget
    ]
    assert len(tried) > 100
    assert all(profile.loss(row) >= best * (1 - 1e-12) for row in tried)


@pytest.mark.parametrize(
    "options", [{}, {"rising": True}, {"spread": 6.0}, {"in_original": True}], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_where_damages_just_add_up_the_best_plan_is_that_of_a_knapsack(
    seed: int, options: dict[str, Any]
) -> None:
    profile = make_profile(seed, rank=0, **options)
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = budget_at(profile, share)
        choice, best = best_choice(Program.of(profile), budget)
        assert profile.loss(choice) == pytest.approx(best, rel=1e-12)
        assert best == pytest.approx(knapsack_loss(profile, budget), rel=1e-12)


def test_the_first_of_equal_plans_is_taken() -> None:
    profile = make_profile(0, layers=3, silent=3)
    assert best_choice(Program.of(profile), byte_ends(profile)[1])[0].tolist() == [0, 0, 0]


def test_the_smallest_plan_is_all_that_the_smallest_budget_holds() -> None:
    profile = make_profile(0)
    low, _ = byte_ends(profile)
    assert best_choice(Program.of(profile), low)[0].tolist() == [0] * 5
    with pytest.raises(BudgetInfeasible, match=f"{low - 1} bytes"):
        best_choice(Program.of(profile), low - 1)


def test_too_many_plans_are_refused() -> None:
    profile = make_profile(0, layers=10)
    with pytest.raises(ValueError, match="too many"):
        best_choice(Program.of(profile), byte_ends(profile)[1])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_rules_and_limits_leave_the_best_of_the_plans_that_respect_them(
    seed: int, rank: int
) -> None:
    profile, program = demanding(seed, rank)
    budget, (limit,) = budget_at(profile, 0.5), program.limits
    plans = [
        plan for plan in product(range(4), repeat=5) if profile.plan(plan).weight_bytes <= budget
    ]
    ruled = [plan for plan in plans if all(program.allowed[at] for at in enumerate(plan))]
    limited = [
        plan for plan in plans if sum(limit.cost[at] for at in enumerate(plan)) <= limit.most
    ]
    both = [plan for plan in ruled if plan in limited]
    for demands, left in (
        (replace(program, limits=()), ruled),
        (replace(program, allowed=np.ones((5, 4), dtype=np.bool_)), limited),
        (program, both),
    ):
        choice, best = best_choice(demands, budget)
        expected = min(left, key=profile.loss)
        assert choice.tolist() == list(expected)
        assert best == pytest.approx(profile.loss(expected), rel=1e-12)
        assert best > best_choice(Program.of(profile), budget)[1]


def test_a_limit_holds_a_plan_that_uses_all_of_it_and_no_more() -> None:
    profile = make_profile(0, rank=0)
    whole, budget = Program.of(profile), budget_at(profile, 0.5)
    best, _ = best_choice(whole, budget)
    cost = (
        np.eye(4)[best] * np.array([0.1, 0.2, 0.3, 0.4, 0.5])[:, None]
    )  # 1.5 for the best plan, less for all others

    def within(most: float) -> Choice:
        return best_choice(replace(whole, limits=(Limit("time", "us", cost, most),)), budget)[0]

    assert within(1.5).tolist() == best.tolist()
    assert within(1.499).tolist() != best.tolist()


def test_demands_that_no_plan_meets_are_refused() -> None:
    profile = make_profile(0)
    program = replace(Program.of(profile), limits=(Limit("time", "us", np.full((5, 4), 2.0), 9.9),))
    with pytest.raises(BudgetInfeasible, match="and all limits"):
        best_choice(program, byte_ends(profile)[1])
    allowed = np.tile([False, True, True, True], (5, 1))
    with pytest.raises(BudgetInfeasible):
        best_choice(
            Program.of(profile).restricted_to(allowed), profile.plan([1] * 5).weight_bytes - 1
        )


def test_plans_that_are_not_allowed_do_not_count_as_too_many() -> None:
    profile = make_profile(0, layers=12)
    program = Program.of(profile).restricted_to(np.tile([True, False, False, True], (12, 1)))
    assert best_choice(program, byte_ends(profile)[0])[0].tolist() == [0] * 12
