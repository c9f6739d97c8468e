"""Plans of few distinct fidelities.

Never more than asked for, and a bound that holds for every part of the menu.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.demands.rules import Rule
from allocator.errors import BudgetInfeasible, RuleError
from allocator.profile import Profile
from allocator.solver.distinct import SOLVED_SUBSETS
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from tests.support.synthetic_profiles import (
    GROUP,
    PROPERTY,
    budget_at,
    byte_ends,
    every_plan,
    make_decoder_profile,
    make_profile,
)

KINDS: list[dict[str, Any]] = [
    {},
    {"rank": 0},
    {"coupling": 0.3},
    {"spread": 4.0},
    {"duplicated": True},
    {"silent": 2},
    {"in_original": True},
]
"""Profiles in which larger fidelities do less damage."""

RISING: list[dict[str, Any]] = [{"rising": True}, {"rising": True, "rank": 0}]
MENU = 5
ANY_SEED = st.integers(0, 10**6)


def few(profile: Profile, most: int, **options: Any) -> WhatIf:
    return WhatIf(profile, Constraints(most_distinct=most, **options))


def best_of_few(profile: Profile, most: int, budget: int) -> float:
    """Return the least loss of all plans that fit and use at most so many fidelities."""
    choices, sizes, losses = every_plan(profile)
    distinct = (np.diff(np.sort(choices, axis=1), axis=1) > 0).sum(axis=1) + 1
    return float(losses[(sizes <= budget) & (distinct <= most)].min())


@PROPERTY
@given(
    seed=ANY_SEED,
    kind=st.sampled_from([*KINDS, *RISING]),
    most=st.integers(1, 4),
    share=st.floats(0, 1.1),
)
def test_a_plan_has_no_more_fidelities_than_asked_for_and_its_bound_is_below_the_best_of_all_parts(
    seed: int, kind: dict[str, Any], most: int, share: float
) -> None:
    profile = make_profile(seed, menu=MENU, **kind)
    budget = budget_at(profile, share)
    allocation = few(profile, most).plan(budget)
    assert len(set(allocation.plan.fidelities)) <= most
    assert allocation.plan.weight_bytes == allocation.weight_bytes <= budget
    best = best_of_few(profile, most, budget)
    assert allocation.bound <= best + 1e-9
    assert best <= allocation.predicted_loss + 1e-9


@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_loss_is_close_to_the_best_of_all_parts(kind: dict[str, Any], most: int) -> None:
    found = []
    for seed in range(5):
        profile = make_profile(seed, menu=MENU, **kind)
        for share in (0.3, 0.7):
            budget = budget_at(profile, share)
            best = best_of_few(profile, most, budget)
            span = profile.loss([0] * 5) - best
            found.append((few(profile, most).plan(budget).predicted_loss - best) / max(span, 1e-9))
    assert max(found) < 0.1
    assert np.mean(found) < 0.01
    assert np.mean(np.array(found) < 1e-6) > 0.8


@pytest.mark.parametrize("kind", [*KINDS, *RISING], ids=str)
def test_one_fidelity_is_the_best_uniform_plan_that_fits(kind: dict[str, Any]) -> None:
    for seed in range(4):
        profile = make_profile(seed, menu=MENU, **kind)
        uniform = [Plan.uniform(profile.layers, fidelity) for fidelity in profile.fidelities]
        for share in (0.0, 0.4, 0.8, 1.0):
            budget = budget_at(profile, share)
            best = min(
                profile.loss([at] * 5)
                for at, plan in enumerate(uniform)
                if plan.weight_bytes <= budget
            )
            allocation = few(profile, 1).plan(budget)
            assert allocation.plan in uniform
            assert allocation.predicted_loss == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("kind", [{}, {"rank": 0}, {"rising": True}], ids=str)
@pytest.mark.parametrize("most", [MENU, MENU + 1, 100])
def test_as_many_as_the_menu_has_is_no_limit(most: int, kind: dict[str, Any]) -> None:
    for seed in range(3):
        profile = make_profile(seed, layers=8, menu=MENU, **kind)
        for share in (0.0, 0.3, 0.6, 1.0):
            free, limited = (
                whatif.plan(budget_at(profile, share))
                for whatif in (WhatIf(profile), few(profile, most))
            )
            assert limited.plan == free.plan
            assert limited.predicted_loss == free.predicted_loss
            assert limited.bound == pytest.approx(free.bound, rel=1e-2)


def test_few_fidelities_are_never_proven_better_than_many() -> None:
    for seed in range(3):
        profile = make_profile(seed, layers=12, menu=8)
        budget = budget_at(profile, 0.45)
        free = WhatIf(profile).plan(budget)
        found = [few(profile, most).plan(budget) for most in (1, 2, 3)]
        assert all(allocation.bound >= free.bound for allocation in found)
        assert (
            found[0].predicted_loss > found[1].predicted_loss > free.bound
        )  # a single one leaves much of the budget
        assert found[0].bound > free.predicted_loss  # so much that the bound itself knows


def test_a_bound_holds_where_not_all_parts_are_solved() -> None:
    profile = make_profile(5, layers=5, menu=8)
    choices, sizes, losses = every_plan(profile)
    distinct = (np.diff(np.sort(choices, axis=1), axis=1) > 0).sum(axis=1) + 1
    assert SOLVED_SUBSETS < 56  # parts of three
    for share in (0.2, 0.5, 0.9):
        budget = budget_at(profile, share)
        best = losses[(sizes <= budget) & (distinct <= 3)].min()
        allocation = few(profile, 3).plan(budget)
        assert allocation.bound <= best + 1e-9
        assert allocation.predicted_loss <= best + 0.05 * (losses[0] - best)


@pytest.mark.parametrize("kind", RISING, ids=str)
def test_a_bound_holds_for_all_parts_and_the_best_part_is_nearly_always_found(
    kind: dict[str, Any],
) -> None:
    worse = 0
    for seed in range(12):
        profile = make_profile(seed, menu=MENU, **kind)
        for share in (0.3, 0.6, 0.9):
            budget = budget_at(profile, share)
            best = best_of_few(profile, 2, budget)
            allocation = few(profile, 2).plan(budget)
            assert allocation.bound <= best + 1e-9
            worse += allocation.predicted_loss > best + 1e-9
    assert worse <= 2  # of 36


def test_ties_and_rules_hold_for_few_fidelities_too() -> None:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    profile = make_decoder_profile(0, kinds, 3, menu=6)
    rule = Rule.parse("model.layers.1.*>=3")
    for share in (0.4, 0.7):
        allocation = few(profile, 2, target="vllm", rules=(rule,)).plan(budget_at(profile, share))
        chosen = allocation.plan.by_name
        assert len(set(chosen.values())) <= 2
        assert all(rule.admits(chosen[f"model.layers.1.{kind}"]) for kind in kinds)
        for block in range(3):
            assert len({chosen[f"model.layers.{block}.{kind}"] for kind in kinds[:3]}) == 1


def test_rules_that_need_more_fidelities_than_allowed_are_told_to_allow_more() -> None:
    profile = make_profile(0)
    pinned = tuple(
        Rule.parse(text) for text in ("blocks.0.linear0=int2g64", "blocks.0.linear1=int4g64")
    )
    high = byte_ends(profile)[1]
    with pytest.raises(
        RuleError, match="at most 1 distinct fidelities keeps the rules; allow more"
    ):
        few(profile, 1, rules=pinned)
    allocation = few(profile, 2, rules=pinned).plan(high)
    assert {fidelity.name for fidelity in allocation.plan.fidelities} == {"int2g64", "int4g64"}


def test_a_budget_below_every_plan_is_refused_for_the_reason_that_it_is_without_the_limit() -> None:
    profile = make_profile(0)
    low = byte_ends(profile)[0]
    with pytest.raises(BudgetInfeasible) as caught:
        few(profile, 2).plan(low - 1)
    assert (caught.value.nearest_bytes, caught.value.binding) == (low, ("menu",))
    assert few(profile, 2).plan(low).weight_bytes == low


def test_a_menu_with_too_many_parts_is_refused() -> None:
    fidelities = tuple(Fidelity(2, 4, 0.04 * step, GROUP) for step in range(1, 21))
    base = make_profile(0, rank=0)
    profile = replace(
        base,
        fidelities=fidelities,
        linear=-np.tile(np.arange(20.0), (5, 1)),
        factor=np.zeros((0, 100)),
    )
    budget = budget_at(profile, 0.5)
    with pytest.raises(RuleError, match="a menu of 20 fidelities has 184756 subsets of 10"):
        few(profile, 10).plan(budget)
    assert len(set(few(profile, 3).plan(budget).plan.fidelities)) <= 3


def test_the_nearest_budget_of_few_fidelities_is_feasible_and_one_byte_less_is_not() -> None:
    profile, rule = make_profile(0), Rule.parse("blocks.0.linear0>=2.6")
    whatif = few(profile, 1, rules=(rule,))
    smallest = whatif.byte_range[0]
    assert smallest > byte_ends(profile)[0]
    assert whatif.plan(smallest).weight_bytes == smallest
    with pytest.raises(BudgetInfeasible) as caught:
        whatif.plan(smallest - 1)
    assert caught.value.nearest_bytes == smallest
    assert "distinct fidelities" in caught.value.binding
