"""Rounding ends at a plan that fits and that no small change improves, wherever it starts."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.exhaustive import best_plan
from allocator.profile import Array, Profile
from allocator.rounding import FILLED, Choice, round_shares
from tests.test_allocator.synthetic import PROPERTY, budget_at, byte_ends, make_profile

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
SEEDS = st.integers(0, 10**6)


def random_shares(seed: int, profile: Profile) -> Array:
    """Return shares as a solver may give them: some mixed, some at the ends."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(profile.linear.shape[1], 0.3), len(profile.layers))
    return np.asarray(share, dtype=np.float64)


def one_hot(choice: list[int], menu: int) -> Array:
    return np.asarray(np.eye(menu)[choice], dtype=np.float64)


def used(profile: Profile, choice: Choice) -> int:
    return profile.plan(choice).weight_bytes


def improvements(profile: Profile, choice: Choice, budget: int, changes: int) -> list[float]:
    """Return by how much the loss falls with each `changes` layers changed that fits the budget and lowers it."""
    here, menu = profile.loss(choice), profile.linear.shape[1]
    found = []
    for layers in combinations(range(len(choice)), changes):
        for options in np.ndindex(*[menu] * changes):
            changed = choice.copy()
            changed[list(layers)] = options
            if used(profile, changed) <= budget and profile.loss(changed) < here:
                found.append(here - profile.loss(changed))
    return found


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from(OPTIONS), place=st.floats(0, 1.1), price=st.floats(0, 1e-3))
def test_budget_is_never_exceeded(seed: int, options: dict[str, Any], place: float, price: float) -> None:
    profile = make_profile(seed, **options)
    budget = budget_at(profile, place)
    choice = round_shares(profile, random_shares(seed, profile), price, budget)
    assert choice.dtype == np.int64
    assert choice.shape == (len(profile.layers),)
    assert used(profile, choice) <= budget


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from(OPTIONS), place=st.floats(0, 1.1))
def test_what_is_left_of_the_budget_is_next_to_nothing_or_holds_no_change(seed: int, options: dict[str, Any], place: float) -> None:
    profile = make_profile(seed, **options)
    budget = budget_at(profile, place)
    choice = round_shares(profile, random_shares(seed, profile), 0.0, budget)
    slack = budget - used(profile, choice)
    more = profile.weight_bytes - profile.weight_bytes[np.arange(len(choice)), choice][:, None]
    assert slack <= FILLED * budget or not ((more > 0) & (more <= slack)).any()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_one_or_two_changes_improve_the_plan(seed: int, rank: int) -> None:
    profile = make_profile(seed, layers=6, menu=6, coupling=0.05, rank=rank)
    budget = budget_at(profile, 0.5)
    choice = round_shares(profile, random_shares(seed, profile), 1e-6, budget)
    assert improvements(profile, choice, budget, 1) == []
    assert improvements(profile, choice, budget, 2) == []


@pytest.mark.parametrize("rank", [0, 3])
def test_most_bad_starts_end_at_the_best_plan(rank: int) -> None:
    found = []
    for seed in range(40):
        profile = make_profile(seed, rank=rank)
        best, loss = best_plan(profile, budget_at(profile, 0.5))
        budget = used(profile, best)  # nothing is left to fill up
        choice = round_shares(profile, random_shares(seed, profile), 0.0, budget)
        span = profile.loss([0] * 5) - loss
        found.append((profile.loss(choice) - loss) / span)
    assert min(found) >= -1e-12
    assert np.mean(found) < 0.01
    assert np.mean(np.array(found) < 1e-9) > 0.7


def test_a_good_start_is_kept() -> None:
    profile = make_profile(0)
    best, _ = best_plan(profile, budget_at(profile, 0.5))
    budget = used(profile, best)
    assert round_shares(profile, one_hot(best.tolist(), 4), 0.0, budget).tolist() == best.tolist()


def test_a_start_that_is_too_large_is_lowered_where_it_harms_least() -> None:
    profile = make_profile(0, layers=4, menu=2, duplicated=True, coupling=0.0)
    linear = profile.linear.copy()
    linear[:, 0] = [3.0, 1.0, 2.0, 4.0]  # of taking the low width
    profile = replace(profile, linear=linear)
    low, high = byte_ends(profile)
    step = (high - low) // 4
    choices = [round_shares(profile, one_hot([1] * 4, 2), 0.0, high - count * step).tolist() for count in range(5)]
    assert choices == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_coupled_layers_are_changed_together() -> None:
    profile = make_profile(0, layers=4, menu=2, duplicated=True)
    linear, factor = np.zeros((4, 2)), np.zeros((1, 4, 2))
    linear[:, 1] = [-0.5, -0.5, 1.0, 1.0]
    factor[0, :, 1] = [2.0, -2.0, 0.0, 0.0]  # raising one of the first two is worst of all, raising both is best
    profile = replace(profile, context=0, linear=linear, factor=factor.reshape(1, -1))
    budget = sum(byte_ends(profile)) // 2  # two of four layers at the high width
    assert profile.damage()[:, 1].tolist() == [1.5, 1.5, 1.0, 1.0]
    assert round_shares(profile, one_hot([0] * 4, 2), 0.0, budget).tolist() == [1, 1, 0, 0]


def test_a_negligible_gain_does_not_end_the_search() -> None:
    profile = make_profile(0, layers=3, menu=2, duplicated=True, coupling=0.0)
    linear = np.array([[1.0, 0.0], [2.0, 0.0], [-1e-12, 0.0]])
    profile = replace(profile, linear=linear)
    low, high = byte_ends(profile)
    budget = high - (high - low) // 3  # two of three layers at the high width
    choice = round_shares(profile, one_hot([1, 0, 1], 2), 0.0, budget)
    assert profile.loss(choice) <= profile.context_loss + 1.0  # 2.0 is where it starts
