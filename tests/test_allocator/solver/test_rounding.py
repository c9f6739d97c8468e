"""Rounding ends at a plan that fits and that no small change improves, wherever it starts."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import LimitInfeasible
from allocator.profile import Array, Profile
from allocator.solver.exhaustive import best_choice
from allocator.solver.program import Choice, Limit, Program
from allocator.solver.rounding import FILL_RISE, UNUSED_SHARE, Rounder
from tests.support.synthetic_profiles import PROPERTY, budget_at, byte_ends, make_profile

OPTIONS: list[dict[str, Any]] = [
    {},
    {"coupling": 0.5, "rank": 1},
    {"spread": 12.0},
    {"duplicated": True},
    {"silent": 3},
    {"rising": True},
    {"rank": 0},
    {"rank": 0, "rising": True, "spread": 12.0},
    {"in_original": True},
    {"menu": 1},
    {"layers": 1, "menu": 8},
]
HARMED_BY_BYTES: list[dict[str, Any]] = [
    {"rising": True},
    {"rising": True, "spread": 4.0},
    {"rising": True, "spread": 12.0},
]
"""Profiles whose best plan leaves some of most budgets unused."""

SEEDS = st.integers(0, 10**6)


def rounded(profile: Profile, share: Array, price: float, budget_bytes: int) -> Choice:
    return Rounder(Program.of(profile)).round(share, price, budget_bytes)


def random_shares(seed: int, profile: Profile) -> Array:
    """Return shares as a solver may give them: some mixed, some at the ends."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(profile.linear.shape[1], 0.3), len(profile.layers))
    return np.asarray(share, dtype=np.float64)


def one_hot(choice: list[int], menu: int) -> Array:
    return np.asarray(np.eye(menu)[choice], dtype=np.float64)


def used(profile: Profile, choice: Choice) -> int:
    return profile.plan(choice).weight_bytes


def improvements(
    profile: Profile, choice: Choice, fits: Callable[[Choice], bool], changes: int
) -> list[float]:
    """Return how much loss each change of `changes` layers saves that fits and saves some."""
    here, menu = profile.loss(choice), profile.linear.shape[1]
    found = []
    for layers in combinations(range(len(choice)), changes):
        for options in np.ndindex(*[menu] * changes):
            changed = choice.copy()
            changed[list(layers)] = options
            if fits(changed) and profile.loss(changed) < here:
                found.append(here - profile.loss(changed))
    return found


def larger_ones(profile: Profile, choice: Choice, budget: int) -> list[float]:
    """Return the loss of each plan with one layer enlarged that fits, if much budget is left."""
    if budget - used(profile, choice) <= UNUSED_SHARE * budget:
        return []
    changed = [choice.copy() for _ in range(profile.linear.size)]
    for at, (layer, option) in enumerate(np.ndindex(profile.linear.shape)):
        changed[at][layer] = option
    return [
        profile.loss(other)
        for other in changed
        if used(profile, choice) < used(profile, other) <= budget
    ]


def constrained(seed: int, *, conflicting: bool, **options: Any) -> tuple[Profile, Program, int]:
    """Return a profile, its program under rules and two limits, and a budget that one plan uses up.

    Unless limits are `conflicting`, smaller fidelities use less of all of them.
    """
    profile, rng = make_profile(seed, **options), np.random.default_rng(seed)
    whole, rows = Program.of(profile), np.arange(len(profile.layers))
    choice = rng.integers(profile.linear.shape[1], size=len(profile.layers))
    allowed = rng.random(whole.sizes.shape) < 2 / 3
    allowed[rows, choice] = True
    costs = rng.uniform(0, 1, (2, *whole.sizes.shape))
    costs = costs if conflicting else costs.cumsum(axis=2)
    limits = tuple(
        Limit(name, "us", cost, float(cost[rows, choice].sum()))
        for name, cost in zip("ab", costs, strict=True)
    )
    return profile, replace(whole.restricted_to(allowed), limits=limits), whole.used_bytes(choice)


def within(program: Program, budget: int, choice: Choice) -> bool:
    rows = np.arange(program.groups)
    spent = all(
        limit.cost[rows, choice].sum() <= limit.most * (1 + 1e-9) for limit in program.limits
    )
    return (
        spent
        and bool(program.allowed[rows, choice].all())
        and int(program.sizes[rows, choice].sum()) <= budget
    )


@PROPERTY
@given(
    seed=SEEDS, options=st.sampled_from(OPTIONS), place=st.floats(0, 1.1), price=st.floats(0, 1e-3)
)
def test_budget_is_never_exceeded(
    seed: int, options: dict[str, Any], place: float, price: float
) -> None:
    profile = make_profile(seed, **options)
    budget = budget_at(profile, place)
    choice = rounded(profile, random_shares(seed, profile), price, budget)
    assert choice.dtype == np.int64
    assert choice.shape == (len(profile.layers),)
    assert used(profile, choice) <= budget


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from(OPTIONS), place=st.floats(0, 1.1))
def test_what_is_left_of_the_budget_is_next_to_nothing_or_every_change_harms(
    seed: int, options: dict[str, Any], place: float
) -> None:
    profile = make_profile(seed, **options)
    budget = budget_at(profile, place)
    choice = rounded(profile, random_shares(seed, profile), 0.0, budget)
    assert min(larger_ones(profile, choice, budget), default=np.inf) > profile.loss(choice)


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from(HARMED_BY_BYTES), place=st.floats(0, 0.99))
def test_where_damages_just_add_up_no_change_that_still_fits_is_within_the_allowance(
    seed: int, options: dict[str, Any], place: float
) -> None:
    profile = make_profile(seed, rank=0, **options)
    budget = budget_at(profile, place)
    _, best = best_choice(Program.of(profile), budget)
    choice = rounded(profile, random_shares(seed, profile), 0.0, budget)
    assert min(larger_ones(profile, choice, budget), default=np.inf) > best + FILL_RISE * abs(best)


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from([*OPTIONS, *HARMED_BY_BYTES]), place=st.floats(0, 1.1))
def test_filling_up_does_no_more_harm_than_is_allowed(
    seed: int, options: dict[str, Any], place: float
) -> None:
    profile = make_profile(seed, **options)
    budget = budget_at(profile, place)
    best, loss = best_choice(Program.of(profile), budget)
    choice = rounded(profile, one_hot(best.tolist(), profile.linear.shape[1]), 0.0, budget)
    assert profile.loss(choice) <= loss + FILL_RISE * abs(loss) + 1e-12


@pytest.mark.parametrize(
    ("context_loss", "filled"),
    [(0.4, [0, 0, 0, 0]), (2.0, [1, 0, 1, 0]), (3.0, [1, 1, 1, 0]), (20.0, [1] * 4)],
)
def test_the_budget_is_filled_up_by_what_harms_least_until_the_allowance_is_used_up(
    context_loss: float, filled: list[int]
) -> None:
    profile = make_profile(0, layers=4, menu=2, duplicated=True, rank=0)
    linear = np.zeros((4, 2))
    linear[:, 1] = [0.001, 0.0012, 0.0005, 0.01]
    profile = replace(profile, linear=linear, context=0, context_loss=context_loss)
    assert rounded(profile, one_hot([0] * 4, 2), 0.0, byte_ends(profile)[1]).tolist() == filled


def test_the_budget_is_filled_up_by_what_harms_least_for_its_bytes() -> None:
    profile = make_profile(0, layers=2, menu=2, duplicated=True, rank=0)
    layers = (profile.layers[0], replace(profile.layers[1], out_features=1024))  # twice as large
    profile = replace(
        profile, layers=layers, linear=np.array([[0.0, 0.0012], [0.0, 0.0018]]), context=0
    )
    assert rounded(profile, one_hot([0, 0], 2), 0.0, byte_ends(profile)[1]).tolist() == [0, 1]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_one_or_two_changes_improve_the_plan(seed: int, rank: int) -> None:
    profile = make_profile(seed, layers=6, menu=6, coupling=0.05, rank=rank)
    budget = budget_at(profile, 0.5)
    choice = rounded(profile, random_shares(seed, profile), 1e-6, budget)
    assert used(profile, choice) <= budget
    for changes in (1, 2):
        assert (
            improvements(profile, choice, lambda changed: used(profile, changed) <= budget, changes)
            == []
        )


@pytest.mark.parametrize("rank", [0, 3])
def test_most_bad_starts_end_at_the_best_plan(rank: int) -> None:
    found = []
    for seed in range(40):
        profile = make_profile(seed, rank=rank)
        best, loss = best_choice(Program.of(profile), budget_at(profile, 0.5))
        budget = used(profile, best)  # nothing is left to fill up
        choice = rounded(profile, random_shares(seed, profile), 0.0, budget)
        span = profile.loss([0] * 5) - loss
        found.append((profile.loss(choice) - loss) / span)
    assert min(found) >= -1e-12
    assert np.mean(found) < 0.01
    assert np.mean(np.array(found) < 1e-9) > 0.7


def test_a_good_start_is_kept() -> None:
    profile = make_profile(0)
    best, _ = best_choice(Program.of(profile), budget_at(profile, 0.5))
    budget = used(profile, best)
    assert rounded(profile, one_hot(best.tolist(), 4), 0.0, budget).tolist() == best.tolist()


def test_a_start_that_is_too_large_is_lowered_where_it_harms_least() -> None:
    profile = make_profile(0, layers=4, menu=2, duplicated=True, coupling=0.0)
    linear = profile.linear.copy()
    linear[:, 0] = [3.0, 1.0, 2.0, 4.0]  # of taking the low width
    profile = replace(profile, linear=linear)
    low, high = byte_ends(profile)
    step = (high - low) // 4
    choices = [
        rounded(profile, one_hot([1] * 4, 2), 0.0, high - count * step).tolist()
        for count in range(5)
    ]
    assert choices == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_coupled_layers_are_changed_together() -> None:
    profile = make_profile(0, layers=4, menu=2, duplicated=True)
    linear, factor = np.zeros((4, 2)), np.zeros((1, 4, 2))
    linear[:, 1] = [-0.5, -0.5, 1.0, 1.0]
    factor[0, :, 1] = [
        2.0,
        -2.0,
        0.0,
        0.0,
    ]  # raising one of the first two is worst of all, raising both is best
    profile = replace(profile, context=0, linear=linear, factor=factor.reshape(1, -1))
    budget = sum(byte_ends(profile)) // 2  # two of four layers at the high width
    assert profile.damage()[:, 1].tolist() == [1.5, 1.5, 1.0, 1.0]
    assert rounded(profile, one_hot([0] * 4, 2), 0.0, budget).tolist() == [1, 1, 0, 0]


def test_a_negligible_gain_does_not_end_the_search() -> None:
    profile = make_profile(0, layers=3, menu=2, duplicated=True, coupling=0.0)
    linear = np.array([[1.0, 0.0], [2.0, 0.0], [-1e-12, 0.0]])
    profile = replace(profile, linear=linear)
    low, high = byte_ends(profile)
    budget = high - (high - low) // 3  # two of three layers at the high width
    choice = rounded(profile, one_hot([1, 0, 1], 2), 0.0, budget)
    assert profile.loss(choice) <= profile.context_loss + 1.0  # 2.0 is where it starts


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from(OPTIONS), price=st.floats(0, 1e-3))
def test_rules_and_further_limits_are_respected(
    seed: int, options: dict[str, Any], price: float
) -> None:
    profile, program, budget = constrained(seed, conflicting=False, **options)
    assert within(
        program, budget, Rounder(program).round(random_shares(seed, profile), price, budget)
    )


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from(OPTIONS))
def test_where_limits_conflict_a_plan_within_all_of_them_is_found_or_none_is_returned(
    seed: int, options: dict[str, Any]
) -> None:
    profile, program, budget = constrained(seed, conflicting=True, **options)
    try:
        choice = Rounder(program).round(random_shares(seed, profile), 0.0, budget)
    except LimitInfeasible:
        return
    assert within(program, budget, choice)


def test_limits_that_no_plan_is_within_together_are_refused() -> None:
    profile = make_profile(0, layers=4, menu=2, duplicated=True, coupling=0.0)
    costs = np.tile([1.0, 2.0], (4, 1)), np.tile([2.0, 1.0], (4, 1))

    def at_most(most: float) -> Choice:
        limits = tuple(
            Limit(name, "us", cost, most) for name, cost in zip("ab", costs, strict=True)
        )
        program = replace(Program.of(profile), limits=limits)
        return Rounder(program).round(one_hot([0] * 4, 2), 0.0, byte_ends(profile)[1])

    assert at_most(6.0).sum() == 2
    with pytest.raises(
        LimitInfeasible, match="no plan was found within the budget and all limits together"
    ):
        at_most(5.0)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_one_or_two_changes_within_rules_and_limits_improve_the_plan(
    seed: int, rank: int
) -> None:
    profile, program, budget = constrained(
        seed, conflicting=False, layers=6, menu=6, coupling=0.05, rank=rank
    )
    choice = Rounder(program).round(random_shares(seed, profile), 1e-6, budget)
    for changes in (1, 2):
        assert (
            improvements(profile, choice, lambda changed: within(program, budget, changed), changes)
            == []
        )
