"""The menu follows the budget, and neighbouring budgets share it."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import BudgetInfeasible, BudgetNotNeeded
from allocator.menu import CONTEXT_RATIOS, Menu, bpw, check_budget, choose_menu, make_menu, uniform_bytes
from quantizer.fidelity import Fidelity
from tests.test_allocator.synthetic import GROUP, PROPERTY, make_layers

LAYERS = make_layers(6)
WEIGHTS = sum(layer.out_features * layer.in_features for layer in LAYERS)


def bytes_at(bits: int) -> int:
    fidelity = Fidelity.uniform(bits, GROUP)
    return sum(fidelity.weight_bytes(layer.out_features, layer.in_features) for layer in LAYERS)


LOWEST, HIGHEST = bytes_at(2), bytes_at(8)
BUDGETS = st.integers(LOWEST, HIGHEST * 2)


def choose(budget: int) -> Menu:
    return choose_menu(LAYERS, budget, GROUP)


def widths(menu: Menu) -> tuple[int, int]:
    return menu.fidelities[0].bits_lo, menu.fidelities[-1].bits_hi


def context_bytes(menu: Menu) -> int:
    return uniform_bytes(LAYERS, menu.fidelities[menu.context])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (LOWEST, bytes_at(3), (2, 4)),
        (LOWEST + (bytes_at(4) - LOWEST) * 5 // 8, bytes_at(4) - 1, (3, 4)),
        (bytes_at(4), HIGHEST, (4, 8)),
        (HIGHEST, HIGHEST * 100, (4, 8)),
    ],
)
def test_each_range_of_budgets_has_its_pair_of_widths(low: int, high: int, expected: tuple[int, int]) -> None:
    budgets = [low, low + (high - low) // 3, low + (high - low) // 2, high]
    assert {widths(choose(budget)) for budget in budgets} == {expected}


def test_the_lowest_pair_is_left_where_five_eighths_of_the_columns_would_be_high() -> None:
    turn = LOWEST + (bytes_at(4) - LOWEST) * 5 // 8
    assert (widths(choose(turn - 1)), widths(choose(turn))) == ((2, 4), (3, 4))


def test_a_menu_runs_from_uniform_low_over_rising_ratios_to_uniform_high() -> None:
    menu = make_menu(3, 4, GROUP, 0.25)
    assert menu.fidelities[0] == Fidelity.uniform(3, GROUP)
    assert menu.fidelities[-1] == Fidelity.uniform(4, GROUP)
    assert all((fidelity.bits_lo, fidelity.bits_hi) == (3, 4) for fidelity in menu.fidelities[1:-1])
    for layer in LAYERS:
        sizes = [fidelity.weight_bytes(layer.out_features, layer.in_features) for fidelity in menu.fidelities]
        assert all(small < large for small, large in pairwise(sizes))


@pytest.mark.parametrize("ratio", CONTEXT_RATIOS)
def test_the_context_has_the_ratio_that_was_asked_for(ratio: float) -> None:
    menu = make_menu(2, 4, GROUP, ratio)
    assert menu.fidelities[menu.context] == Fidelity(2, 4, ratio, GROUP)


def test_a_menu_uses_the_group_size_that_was_asked_for() -> None:
    assert {fidelity.group_size for fidelity in choose_menu(LAYERS, bytes_at(3), 128).fidelities} == {128}


@PROPERTY
@given(first=BUDGETS, second=BUDGETS)
def test_more_bytes_never_choose_a_lower_menu_or_context(first: int, second: int) -> None:
    less, more = choose(min(first, second)), choose(max(first, second))
    assert widths(less) <= widths(more)
    assert context_bytes(less) <= context_bytes(more)


@PROPERTY
@given(budget=BUDGETS)
def test_the_context_is_the_one_nearest_the_budget(budget: int) -> None:
    menu = choose(budget)
    others = [uniform_bytes(LAYERS, Fidelity(*widths(menu), ratio, GROUP)) for ratio in CONTEXT_RATIOS]
    assert abs(context_bytes(menu) - budget) == min(abs(size - budget) for size in others)


def test_near_budgets_share_a_menu() -> None:
    steps = [choose(LOWEST + (HIGHEST - LOWEST) * step // 1000) for step in range(1001)]
    assert sum(left != right for left, right in pairwise(steps)) <= 3 * len(CONTEXT_RATIOS) - 1
    around = {choose(context_bytes(steps[300]) + offset * LOWEST // 1000) for offset in range(-5, 6)}
    assert around == {steps[300]}


def test_a_budget_below_the_smallest_plan_is_told_the_feasible_range() -> None:
    assert widths(choose(LOWEST)) == (2, 4)
    with pytest.raises(BudgetInfeasible) as caught:
        choose(LOWEST - 1)
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(caught.value))}
    assert {LOWEST - 1, LOWEST, HIGHEST} <= numbers
    assert {round(8 * LOWEST / WEIGHTS, 3), round(8 * HIGHEST / WEIGHTS, 3)} <= numbers


def test_a_budget_that_holds_the_original_is_refused() -> None:
    original = 2 * WEIGHTS
    with pytest.raises(BudgetNotNeeded, match=f"{original} bytes") as caught:
        check_budget(LAYERS, original, original)
    assert "16.00 bpw" in str(caught.value)
    with pytest.raises(BudgetNotNeeded):
        check_budget(LAYERS, 10 * original, original)


def test_a_budget_just_below_the_original_is_accepted() -> None:
    check_budget(LAYERS, 2 * WEIGHTS - 1, 2 * WEIGHTS)


def test_bits_per_weight_are_bytes_times_eight_over_weights() -> None:
    assert bpw(LAYERS, WEIGHTS) == 8
    assert bpw(LAYERS[:1], LAYERS[0].weights // 4) == 2
