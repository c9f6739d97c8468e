"""The bound holds for every plan, from any shares and prices, and uses the best price of a byte."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.profile import Array
from allocator.solver.bound import best_price, lower_bound
from allocator.solver.cvxpy_reference import AllocationProblem
from allocator.solver.exhaustive import best_choice
from allocator.solver.program import Limit, Program
from tests.support.synthetic_profiles import PROPERTY, budget_at, make_profile

SEEDS = st.integers(0, 10**6)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"coupling": 0.5, "rank": 1},
    {"spread": 12.0},
    {"rising": True},
    {"rank": 0},
    {"silent": 3},
]


def random_mix(seed: int, program: Program) -> Array:
    share = (
        np.random.default_rng(seed).dirichlet(np.full(program.sizes.shape[1], 0.5), program.groups)
        * program.allowed
    )
    return np.asarray(share / share.sum(axis=1, keepdims=True), dtype=np.float64)


@PROPERTY
@given(
    seed=SEEDS,
    options=st.sampled_from(OPTIONS),
    place=st.floats(0, 1.1),
    guess=st.sampled_from([0.0, 1e-9, 1e-5, 1.0]),
)
def test_no_plan_within_the_budget_is_below_the_bound(
    seed: int, options: dict[str, Any], place: float, guess: float
) -> None:
    profile = make_profile(seed, layers=4, **options)
    program, budget = Program.of(profile), budget_at(profile, place)
    _, best = best_choice(program, budget)
    found = lower_bound(program, random_mix(seed, program), budget, guess=guess)
    assert found.loss <= best + 1e-9 * program.scale()
    assert found.price >= 0


@PROPERTY
@given(seed=SEEDS, place=st.floats(0.2, 1), price=st.floats(0, 10))
def test_no_plan_within_further_limits_and_rules_is_below_it_either(
    seed: int, place: float, price: float
) -> None:
    profile, rng = make_profile(seed, layers=4), np.random.default_rng(seed)
    whole = Program.of(profile)
    allowed = rng.random(whole.sizes.shape) < 0.7
    allowed[:, 0] = True
    cost = rng.uniform(0, 1, whole.sizes.shape)
    cost[:, 0] = 0.2
    program = replace(whole.restricted_to(allowed), limits=(Limit("time", "us", cost, 2.0),))
    budget = budget_at(profile, place)
    _, best = best_choice(program, budget)
    assert (
        lower_bound(program, random_mix(seed, program), budget, prices=(price,)).loss
        <= best + 1e-9 * program.scale()
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_at_the_relaxed_optimum_the_bound_is_the_optimum(options: dict[str, Any]) -> None:
    for seed in range(5):
        profile = make_profile(seed, layers=12, menu=6, **options)
        program = Program.of(profile)
        for place in (0.2, 0.5, 0.8):
            optimum = AllocationProblem(program).solve(budget_at(profile, place))
            found = lower_bound(
                program, optimum.share, budget_at(profile, place), guess=optimum.price
            )
            assert found.loss == pytest.approx(optimum.loss, abs=1e-4 * program.scale())
            assert found.loss <= optimum.loss + 1e-6 * program.scale()


@PROPERTY
@given(seed=SEEDS, place=st.floats(0, 1.1), guess=st.sampled_from([0.0, 1e-12, 1e-7, 1e-4, 1e3]))
def test_no_other_price_gives_a_higher_bound(seed: int, place: float, guess: float) -> None:
    profile = make_profile(seed, layers=6, menu=6)
    program, budget = Program.of(profile), budget_at(profile, place)
    cost = np.random.default_rng(seed).normal(size=program.sizes.shape)
    price = best_price(cost, program, budget, guess)

    def dual(at: float) -> float:
        return float((cost + at * program.sizes).min(axis=1).sum() - at * budget)

    tried = max(
        dual(at) for at in (0.0, *np.geomspace(1e-9, 1, 200), *(price * np.linspace(0.9, 1.1, 41)))
    )
    assert dual(price) >= tried - 1e-5 * np.abs(cost).max()


def test_bytes_that_nobody_wants_have_no_price() -> None:
    profile = make_profile(0)
    program = Program.of(profile)
    assert best_price(program.linear * 0 + np.arange(4.0), program, budget_at(profile, 0)) == 0.0
