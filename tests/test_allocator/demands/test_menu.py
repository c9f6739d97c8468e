"""The menu follows the budget, and neighbouring budgets share it."""

import re
from dataclasses import replace
from itertools import pairwise
from math import ceil, log

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from allocator.demands.menu import (
    LOWEST_SPAN,
    RANGES,
    Menu,
    bpw,
    check_budget,
    choose_menu,
    uniform_bytes,
)
from allocator.errors import BudgetInfeasible, BudgetNotNeeded
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec
from tests.support.synthetic_profiles import PROPERTY, make_layers

SHAPES = ((4096, 4096), (1024, 4096), (16384, 4096), (4096, 16384))
"""Wide enough that ratios are exact to the column.

The first fidelity of a range is then the smallest of it to the byte.
"""

LAYERS = tuple(LayerSpec(f"blocks.0.{at}", 0, str(at), *shape) for at, shape in enumerate(SHAPES))
WEIGHTS = sum(layer.weights for layer in LAYERS)
GROUPS = st.sampled_from([None, 32, 64, 128, 256])


def bytes_of(fidelity: Fidelity, group_size: int | None = None) -> int:
    fidelity = replace(fidelity, group_size=group_size or fidelity.group_size)
    return sum(fidelity.weight_bytes(*shape) for shape in SHAPES)


def names(menu: Menu) -> tuple[str, ...]:
    return tuple(fidelity.name for fidelity in menu.fidelities)


def names_of(range_index: int) -> tuple[str, ...]:
    return tuple(fidelity.name for fidelity in RANGES[range_index].fidelities)


def range_of(menu: Menu) -> int:
    """Return which of `RANGES` a menu is, whatever its group size."""
    widths = [(fidelity.bits_lo, fidelity.bits_hi, fidelity.ratio) for fidelity in menu.fidelities]
    spans = [
        [(fidelity.bits_lo, fidelity.bits_hi, fidelity.ratio) for fidelity in span.fidelities]
        for span in RANGES
    ]
    return spans.index(widths)


def context_bytes(menu: Menu) -> int:
    return bytes_of(menu.fidelities[menu.context])


LOWEST, HIGHEST = bytes_of(RANGES[0].fidelities[0]), bytes_of(RANGES[2].fidelities[-1])
COMMON = ceil(LOWEST_SPAN * min(bytes_of(fidelity) for fidelity in RANGES[1].fidelities))
FOUR = next(
    fidelity for fidelity in RANGES[1].fidelities if (fidelity.bits_lo, fidelity.ratio) == (4, 0)
)
FOUR_BITS = bytes_of(FOUR)
BUDGETS = st.integers(LOWEST, HIGHEST * 2)


def choose(budget: int) -> Menu:
    return choose_menu(LAYERS, budget)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (LOWEST, COMMON - 1, 0),
        (COMMON, FOUR_BITS - 1, 1),
        (FOUR_BITS, HIGHEST, 2),
        (HIGHEST, HIGHEST * 99, 2),
    ],
)
def test_each_range_of_budgets_has_its_menu(low: int, high: int, expected: int) -> None:
    for budget in (low, low + (high - low) // 3, low + (high - low) // 2, high):
        assert names(choose(budget)) == names_of(expected)


def test_two_bits_without_a_high_impact_part_are_on_the_menu_of_the_lowest_budgets_only() -> None:
    alone = [
        any((fidelity.bits_lo, fidelity.ratio) == (2, 0) for fidelity in span.fidelities)
        for span in RANGES
    ]
    assert alone == [True, False, False]


@pytest.mark.parametrize(
    "fidelities", [span.fidelities for span in RANGES], ids=["lowest", "common", "high"]
)
def test_a_menu_rises_in_bits_per_weight_and_holds_each_fidelity_once(
    fidelities: tuple[Fidelity, ...],
) -> None:
    bits = []
    for fidelity in fidelities:
        codes = fidelity.bits_lo + fidelity.ratio * (fidelity.bits_hi - fidelity.bits_lo)
        bits.append(
            codes + (codes + fidelity.scale_bits) / fidelity.group_size
        )  # a zero point and a scale for each group
    assert all(small <= large for small, large in pairwise(bits))
    assert len(set(fidelities)) == len(fidelities)


@PROPERTY
@given(budget=BUDGETS, group_size=GROUPS)
def test_the_context_lies_between_the_two_ends_of_its_menu(
    budget: int, group_size: int | None
) -> None:
    assume(budget >= bytes_of(RANGES[0].fidelities[0], group_size))
    menu = choose_menu(LAYERS, budget, group_size)
    assert 0 < menu.context < len(menu.fidelities) - 1
    assert bytes_of(menu.fidelities[0]) < context_bytes(menu) < bytes_of(menu.fidelities[-1])


@PROPERTY
@given(budget=BUDGETS, group_size=GROUPS)
def test_a_menu_can_use_its_budget(budget: int, group_size: int | None) -> None:
    smallest, largest = (bytes_of(RANGES[at].fidelities[at], group_size) for at in (0, -1))
    if budget < smallest:
        with pytest.raises(BudgetInfeasible):
            choose_menu(LAYERS, budget, group_size)
        return
    sizes = [bytes_of(fidelity) for fidelity in choose_menu(LAYERS, budget, group_size).fidelities]
    assert min(sizes) <= budget
    assert min(budget, largest) <= max(sizes)


@PROPERTY
@given(budget=BUDGETS, group_size=st.sampled_from([32, 64, 128, 256]))
def test_a_group_size_that_was_asked_for_is_that_of_all_fidelities(
    budget: int, group_size: int
) -> None:
    menu = choose_menu(
        LAYERS, max(budget, bytes_of(RANGES[0].fidelities[0], group_size)), group_size
    )
    assert {fidelity.group_size for fidelity in menu.fidelities} == {group_size}
    assert len(set(menu.fidelities)) == len(menu.fidelities)


@PROPERTY
@given(group_size=st.sampled_from([32, 64, 128, 256]))
def test_ranges_begin_and_end_at_the_bytes_of_the_group_size_that_was_asked_for(
    group_size: int,
) -> None:
    smallest = min(bytes_of(fidelity, group_size) for fidelity in RANGES[1].fidelities)
    turns = ceil(LOWEST_SPAN * smallest), bytes_of(FOUR, group_size)
    for expected, turn in enumerate(turns):
        menus = [choose_menu(LAYERS, budget, group_size) for budget in (turn - 1, turn)]
        assert [range_of(menu) for menu in menus] == [expected, expected + 1]


@PROPERTY
@given(first=BUDGETS, second=BUDGETS)
def test_more_bytes_never_choose_a_lower_menu_or_context(first: int, second: int) -> None:
    less, more = choose(min(first, second)), choose(max(first, second))
    assert range_of(less) <= range_of(more)
    assert context_bytes(less) <= context_bytes(more)


@PROPERTY
@given(budget=BUDGETS)
def test_the_context_is_the_one_nearest_the_budget_by_their_quotient(budget: int) -> None:
    menu = choose(budget)
    distances = [
        abs(log(bytes_of(context) / budget)) for context in RANGES[range_of(menu)].contexts
    ]
    assert menu.fidelities[menu.context] in RANGES[range_of(menu)].contexts
    assert abs(log(context_bytes(menu) / budget)) == min(distances)


@pytest.mark.parametrize("index", [1, 2])
def test_contexts_change_at_their_geometric_mean(index: int) -> None:
    less, more = (bytes_of(context) for context in RANGES[index].contexts)
    turn = int((less * more) ** 0.5)
    assert [context_bytes(choose(budget)) for budget in (turn - 1, turn + 2)] == [less, more]


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("reach", [1.2, 1.45])
def test_the_smaller_context_is_used_as_far_as_it_reaches(index: int, reach: float) -> None:
    less, more = (bytes_of(context) for context in RANGES[index].contexts)
    turn = min(int(reach * less), HIGHEST)
    found = [
        context_bytes(choose_menu(LAYERS, budget, reach=reach)) for budget in (turn - 1, turn + 1)
    ]
    assert found == [less, more]


def test_near_budgets_share_a_menu() -> None:
    steps = [choose(LOWEST + (HIGHEST - LOWEST) * step // 1000) for step in range(1001)]
    assert (
        sum(left != right for left, right in pairwise(steps))
        == sum(len(span.contexts) for span in RANGES) - 1
    )
    around = {
        choose(context_bytes(steps[300]) + offset * LOWEST // 1000) for offset in range(-5, 6)
    }
    assert around == {steps[300]}


@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_a_budget_below_the_smallest_plan_is_told_the_feasible_range(
    group_size: int | None,
) -> None:
    low = bytes_of(RANGES[0].fidelities[0], group_size)
    high = bytes_of(RANGES[2].fidelities[-1], group_size)
    assert range_of(choose_menu(LAYERS, low, group_size)) == 0
    with pytest.raises(BudgetInfeasible) as caught:
        choose_menu(LAYERS, low - 1, group_size)
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(caught.value))}
    assert {low - 1, low, high} <= numbers
    assert {round(8 * low / WEIGHTS, 3), round(8 * high / WEIGHTS, 3)} <= numbers


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


@pytest.mark.parametrize("fidelity", ["int3g64", "int2+4r0.25g128"])
def test_uniform_bytes_are_the_sum_over_layers_of_mixed_shapes(fidelity: str) -> None:
    layers, parsed = make_layers(6), Fidelity.parse(fidelity)
    assert uniform_bytes(layers, parsed) == sum(
        parsed.weight_bytes(layer.out_features, layer.in_features) for layer in layers
    )
