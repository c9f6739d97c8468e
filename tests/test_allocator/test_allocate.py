"""An allocation fits its budget exactly and is close to the best plan there is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.allocate import allocate
from allocator.answers.allocation import Allocation
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints, Pool
from allocator.demands.rules import Rule
from allocator.errors import BudgetInfeasible
from allocator.profile import Profile
from allocator.solver.exhaustive import best_choice
from allocator.solver.program import Program
from allocator.solver.rounding import FILL_RISE, UNUSED_SHARE
from quantizer.plans.plan import Plan
from tests.support.synthetic_profiles import (
    PROPERTY,
    budget_at,
    byte_ends,
    make_profile,
    permuted,
)

SHARES = (0.2, 0.5, 0.8)
KINDS: list[dict[str, Any]] = [
    {},
    {"layers": 6},
    {"coupling": 0.3},
    {"rank": 8},
    {"spread": 4.0},
    {"spread": 12.0},
    {"duplicated": True},
    {"silent": 2},
    {"menu": 2, "layers": 6},
    {"rank": 0},
    {"rank": 0, "layers": 6, "spread": 4.0},
    {"in_original": True},
]
"""Profiles in which larger fidelities do less damage."""

RISING: list[dict[str, Any]] = [
    {"rising": True},
    {"rising": True, "coupling": 0.3},
    {"rising": True, "rank": 0},
]
"""Profiles in which they may do more, so that the best plan leaves some of the budget unused."""

SEEDS = range(6)
ANY_SEED = st.integers(0, 10**6)


def shortfalls(kind: dict[str, Any], *, tight: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the loss of plans above the best ones, as shares of what the budget can buy.

    A tight budget is exactly the bytes of the best plan, so that nothing is left over to be filled
    up.
    """
    found = []
    for seed in SEEDS:
        profile = make_profile(seed, **kind)
        for share in SHARES:
            budget = budget_at(profile, share)
            choice, best = best_choice(Program.of(profile), budget)
            budget = profile.plan(choice).weight_bytes if tight else budget
            span = profile.loss([0] * len(profile.layers)) - best
            found.append((allocate(profile, budget).predicted_loss - best) / max(span, 1e-9))
    return np.array(found)


def choice_of(profile: Profile, allocation: Allocation) -> list[int]:
    return [profile.fidelities.index(fidelity) for fidelity in allocation.plan.fidelities]


def larger_ones(profile: Profile, allocation: Allocation) -> list[float]:
    """Return the loss of each plan with one layer enlarged that fits, if much budget is left."""
    if allocation.slack_bytes <= UNUSED_SHARE * allocation.budget_bytes:
        return []
    changed = [choice_of(profile, allocation) for _ in range(profile.linear.size)]
    for at, (layer, option) in enumerate(np.ndindex(profile.linear.shape)):
        changed[at][layer] = option
    sizes = [profile.plan(choice).weight_bytes for choice in changed]
    fits = [allocation.weight_bytes < size <= allocation.budget_bytes for size in sizes]
    return [profile.loss(choice) for choice, fit in zip(changed, fits, strict=True) if fit]


@pytest.mark.parametrize("kind", [*KINDS, *RISING], ids=str)
def test_loss_is_within_a_percent_of_the_best_plan(kind: dict[str, Any]) -> None:
    found = shortfalls(kind, tight=False)
    assert found.min() >= -1e-9
    assert found.mean() < 0.01
    assert found.max() < 0.05
    assert (found < 0.001).mean() > 0.7


@pytest.mark.parametrize("kind", [*KINDS, *RISING], ids=str)
def test_the_best_plan_is_found_where_it_uses_up_the_budget(kind: dict[str, Any]) -> None:
    found = shortfalls(kind, tight=True)
    assert found.mean() < 0.001
    assert (found < 1e-6).mean() > 0.8


@PROPERTY
@given(
    seed=ANY_SEED,
    kind=st.sampled_from(
        [*KINDS, {"rising": True}, {"menu": 1}, {"layers": 1, "menu": 8}, {"layers": 30, "menu": 8}]
    ),
    share=st.floats(0, 1.2),
)
def test_budget_is_never_exceeded(seed: int, kind: dict[str, Any], share: float) -> None:
    profile = make_profile(seed, **kind)
    budget = budget_at(profile, share)
    allocation = allocate(profile, budget)
    pairs = zip(allocation.plan.layers, allocation.plan.fidelities, strict=True)
    exact = sum(
        fidelity.weight_bytes(layer.out_features, layer.in_features) for layer, fidelity in pairs
    )
    assert allocation.plan.layers == profile.layers
    assert set(allocation.plan.fidelities) <= set(profile.fidelities)
    assert allocation.weight_bytes == allocation.plan.weight_bytes == exact <= budget
    assert allocation.slack_bytes == budget - exact


@PROPERTY
@given(
    seed=ANY_SEED,
    kind=st.sampled_from(
        [{}, {"layers": 30, "menu": 8}, {"rising": True}, {"coupling": 0.5, "rank": 1}, {"rank": 0}]
    ),
    share=st.floats(0, 1),
)
def test_what_is_unused_is_next_to_nothing_or_every_change_harms(
    seed: int, kind: dict[str, Any], share: float
) -> None:
    profile = make_profile(seed, **kind)
    allocation = allocate(profile, budget_at(profile, share))
    assert min(larger_ones(profile, allocation), default=np.inf) > allocation.predicted_loss


@PROPERTY
@given(
    seed=ANY_SEED,
    kind=st.sampled_from(
        [
            {"rising": True},
            {"rising": True, "spread": 12.0},
            {"rising": True, "layers": 30, "menu": 8},
        ]
    ),
    share=st.floats(0, 0.99),
)
def test_where_damages_just_add_up_no_change_that_still_fits_is_within_the_allowance(
    seed: int, kind: dict[str, Any], share: float
) -> None:
    profile = make_profile(seed, rank=0, **kind)
    allocation = allocate(profile, budget_at(profile, share))
    least = allocation.bound + FILL_RISE * abs(allocation.bound)
    assert min(larger_ones(profile, allocation), default=np.inf) > least


@PROPERTY
@given(seed=ANY_SEED, share=st.floats(0, 1), kind=st.sampled_from([*KINDS, {"rising": True}]))
def test_predicted_loss_is_that_of_the_plan_and_no_plan_is_below_the_bound(
    seed: int, share: float, kind: dict[str, Any]
) -> None:
    profile = make_profile(seed, **kind)
    program, budget = Program.of(profile), budget_at(profile, share)
    allocation = allocate(profile, budget)
    _, best = best_choice(program, budget)
    assert allocation.predicted_loss == program.loss(np.array(choice_of(profile, allocation)))
    assert allocation.predicted_loss == pytest.approx(
        profile.loss(choice_of(profile, allocation)), rel=1e-12
    )
    assert allocation.bound <= best + 1e-9 * program.scale()
    assert allocation.gap == pytest.approx(1 - allocation.bound / allocation.predicted_loss)


def test_the_order_of_the_layers_does_not_matter() -> None:
    equal = []
    for seed in SEEDS:
        profile = make_profile(seed, layers=10, menu=6)
        order = np.random.default_rng(seed).permutation(10).tolist()
        budget = budget_at(profile, 0.5)
        straight, turned = allocate(profile, budget), allocate(permuted(profile, order), budget)
        span = profile.loss([0] * 10) - straight.predicted_loss
        assert turned.predicted_loss == pytest.approx(
            straight.predicted_loss, abs=0.01 * span, rel=0
        )
        equal.append(turned.predicted_loss == pytest.approx(straight.predicted_loss, abs=1e-9))
    assert sum(equal) >= len(equal) - 1


def test_a_budget_of_exactly_the_smallest_plan_gets_it() -> None:
    profile = make_profile(0)
    allocation = allocate(profile, byte_ends(profile)[0])
    assert allocation.plan == Plan.uniform(profile.layers, profile.fidelities[0])
    assert allocation.slack_bytes == 0


def test_a_budget_of_exactly_the_largest_plan_gets_it() -> None:
    profile = make_profile(0)
    allocation = allocate(profile, byte_ends(profile)[1])
    assert allocation.plan == Plan.uniform(profile.layers, profile.fidelities[-1])
    assert allocation.slack_bytes == 0


def test_a_budget_above_the_largest_plan_gets_it_with_a_note() -> None:
    profile = make_profile(6, rising=True)
    largest = byte_ends(profile)[1]
    allocation = allocate(profile, 3 * largest)
    assert allocation.plan == Plan.uniform(profile.layers, profile.fidelities[-1])
    assert allocation.slack_bytes == 2 * largest
    assert f"the budget holds the largest plan of the menu ({largest} bytes)" in allocation.notes[0]


def test_a_budget_of_the_largest_plan_gets_it_even_where_less_would_do() -> None:
    profile = make_profile(0)
    layers = (
        *profile.layers[:4],
        replace(profile.layers[4], out_features=8),
    )  # next to nothing of the budget
    linear = profile.linear.copy()
    linear[4] = [0.0, 0.0, 0.0, 1.0]
    profile = replace(profile, layers=layers, linear=linear, factor=profile.factor * 0)
    largest = byte_ends(profile)[1]
    assert choice_of(profile, allocate(profile, largest - 1))[4] < 3
    assert choice_of(profile, allocate(profile, largest)) == [3] * 5


def test_a_budget_below_the_smallest_plan_is_told_the_feasible_range() -> None:
    profile = make_profile(0)
    low, high = byte_ends(profile)
    with pytest.raises(
        BudgetInfeasible, match=f"budget {low - 1} bytes .* feasible are {low} to {high} bytes"
    ):
        allocate(profile, low - 1)


def notes_of(allocation: Allocation) -> tuple[str, ...]:
    """Return the notes that say something else than how much is left."""
    return tuple(note for note in allocation.notes if "bytes are left" not in note)


def test_a_budget_far_from_the_context_is_noted() -> None:
    profile = make_profile(0)
    low, high = profile.budget_range
    assert byte_ends(profile)[0] < low
    assert high < byte_ends(profile)[1]
    for budget in (low, (low + high) // 2, high):
        assert notes_of(allocate(profile, budget)) == ()
    for budget in (low - 1, high + 1):
        (note,) = notes_of(allocate(profile, budget))
        assert f"measured around a uniform plan of {profile.fidelities[2].name}" in note
        assert f"trusted from {low} to {high} bytes" in note
        assert "profile the model anew" in note


def test_the_original_as_the_context_is_noted_at_any_budget() -> None:
    profile = make_profile(0, in_original=True)
    low, high = byte_ends(profile)
    for budget in (low, (low + high) // 2, high - 1):
        (note,) = notes_of(allocate(profile, budget))
        assert "measured in the original model" in note
    full, original = allocate(profile, high).notes
    assert "holds the largest plan" in full
    assert "measured in the original model" in original


@pytest.mark.parametrize("kind", [{}, *RISING], ids=str)
def test_bytes_that_are_left_are_noted_where_they_are_more_than_next_to_nothing(
    kind: dict[str, Any],
) -> None:
    noted = 0
    for seed in SEEDS:
        profile = make_profile(seed, **kind)
        for share in (*SHARES, 1.0, 1.2):
            allocation = allocate(profile, budget_at(profile, share))
            left = allocation.slack_bytes > UNUSED_SHARE * allocation.budget_bytes and share < 1
            found = [
                note
                for note in allocation.notes
                if note.startswith(f"{allocation.slack_bytes} bytes are left")
            ]
            assert len(found) == left == sum("bytes are left" in note for note in allocation.notes)
            noted += left
    assert noted > 0


def test_layers_without_effect_pay_for_the_others() -> None:
    profile = make_profile(2, layers=6, silent=3)
    context = Plan.uniform(profile.layers, profile.fidelities[profile.context])
    allocation = allocate(profile, context.weight_bytes)
    assert sum(allocation.plan.layer_bytes[3:]) < sum(context.layer_bytes[3:])
    assert allocation.predicted_loss < profile.context_loss


def test_a_model_that_nothing_harms_gets_a_plan() -> None:
    profile = make_profile(0, silent=5)
    allocation = allocate(profile, budget_at(profile, 0.5))
    assert allocation.predicted_loss == profile.context_loss
    assert allocation.gap == pytest.approx(0, abs=1e-6)


def test_fidelities_of_one_size_are_chosen_by_their_loss() -> None:
    profile = make_profile(0, menu=4)
    narrow = tuple(
        replace(layer, in_features=64) for layer in profile.layers
    )  # every split has one step of columns
    linear = np.tile([3.0, 1.0, 0.0, -1.0], (5, 1))
    profile = replace(profile, layers=narrow, linear=linear, factor=profile.factor * 0)
    split = profile.plan([1] * 5).weight_bytes
    assert split == profile.plan([2] * 5).weight_bytes
    assert choice_of(profile, allocate(profile, split)) == [2] * 5


def test_the_same_question_has_the_same_answer() -> None:
    profile = make_profile(3, layers=20, menu=8)
    budget = budget_at(profile, 0.4)
    assert allocate(profile, budget) == allocate(profile, budget)


@PROPERTY
@given(seed=ANY_SEED, rank=st.sampled_from([0, 3]), place=st.floats(0, 1), room=st.floats(0, 1))
def test_a_plan_under_rules_and_limits_respects_them_and_none_is_below_its_bound(
    seed: int, rank: int, place: float, room: float
) -> None:
    profile = make_profile(seed, layers=6, rank=rank)
    inside = [at for at, layer in enumerate(profile.layers) if layer.block == 1]
    low, high = (int(profile.weight_bytes[inside, option].sum()) for option in (0, -1))
    pool = Pool("gpu0", "blocks.1.*", low + round(room * (high - low)))
    constraints = Constraints(
        rules=(Rule.parse("blocks.0.*!=int2g64"), Rule.parse("blocks.2.*<=3")), pools=(pool,)
    )
    program = WhatIf(profile, constraints).program
    smallest, largest = program.byte_range()
    budget = smallest + round(place * (largest - smallest))
    allocation = allocate(profile, budget, constraints)
    _, best = best_choice(program, budget)
    assert allocation.weight_bytes == allocation.plan.weight_bytes <= budget
    assert sum(allocation.plan.layer_bytes[at] for at in inside) <= pool.most_bytes
    for layer, fidelity in zip(profile.layers, allocation.plan.fidelities, strict=True):
        assert layer.block != 0 or fidelity.name != "int2g64"
        assert (
            layer.block != 2
            or fidelity.bits_lo + fidelity.ratio * (fidelity.bits_hi - fidelity.bits_lo) <= 3
        )
    assert allocation.bound <= best + 1e-9 * program.scale()
    assert best <= allocation.predicted_loss + 1e-12


@pytest.mark.parametrize("kind", [*KINDS, *RISING], ids=str)
def test_small_programs_are_solved_to_the_end(kind: dict[str, Any]) -> None:
    for seed in SEEDS:
        profile = make_profile(seed, **kind)
        assert all(
            allocate(profile, budget_at(profile, share)).status == "solved" for share in SHARES
        )
