"""The frontier falls, and its hull and its knees are where they look to be."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.frontier import KNEE_DEPTH, budgets_between, frontier, knees_of
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints, Pool
from allocator.demands.rules import Rule
from allocator.errors import BudgetInfeasible
from allocator.profile import Profile
from allocator.solver.hull import lower_hull
from tests.support.synthetic_profiles import (
    PROPERTY,
    budget_at,
    byte_ends,
    every_plan,
    make_profile,
)

KINDS: list[dict[str, Any]] = [
    {},
    {"rank": 0},
    {"rising": True},
    {"rising": True, "rank": 0},
    {"coupling": 0.3},
    {"spread": 4.0},
    {"duplicated": True},
    {"in_original": True},
]
ANY_SEED = st.integers(0, 10**6)


def whole_frontier(whatif: WhatIf, points: int) -> Any:
    return frontier(whatif, budgets_between(*whatif.byte_range, points))


def limited(profile: Profile) -> list[WhatIf]:
    """Return the profile without limits, with a pool, with a rule and with few fidelities."""
    pool = Pool("first", "blocks.0.*", int(profile.weight_bytes[:2, 2].sum()))
    return [
        WhatIf(profile, constraints)
        for constraints in (
            Constraints(),
            Constraints(pools=(pool,)),
            Constraints(rules=(Rule.parse("*.linear1>=2.5"),)),
            Constraints(most_distinct=2),
        )
    ]


# budgets


@PROPERTY
@given(low=st.integers(0, 10**12), span=st.integers(1, 10**6), count=st.integers(2, 200))
def test_budgets_are_evenly_spaced_whole_bytes_each_once(low: int, span: int, count: int) -> None:
    budgets = budgets_between(low, low + span, count)
    assert (budgets[0], budgets[-1]) == (low, low + span)
    assert len(budgets) == len(set(budgets)) == min(count, span + 1)
    steps = np.diff(budgets)
    assert steps.min() >= 1
    assert np.ptp(steps) <= 1


# the frontier


@PROPERTY
@given(seed=ANY_SEED, kind=st.sampled_from(KINDS), points=st.integers(2, 12))
def test_losses_never_rise_with_bytes_and_every_plan_is_within_its_budget(
    seed: int, kind: dict[str, Any], points: int
) -> None:
    profile = make_profile(seed, **kind)
    for whatif in limited(profile):
        found = [point.allocation for point in whole_frontier(whatif, points)]
        assert len(found) == points
        assert [allocation.budget_bytes for allocation in found] == budgets_between(
            *whatif.byte_range, points
        )
        assert all(
            allocation.plan.weight_bytes == allocation.weight_bytes <= allocation.budget_bytes
            for allocation in found
        )
        for one, two in pairwise(found):
            assert one.weight_bytes <= two.weight_bytes
            assert one.predicted_loss >= two.predicted_loss


@PROPERTY
@given(seed=ANY_SEED, kind=st.sampled_from(KINDS))
def test_no_plan_within_a_budget_of_the_frontier_is_below_its_bound(
    seed: int, kind: dict[str, Any]
) -> None:
    profile = make_profile(seed, **kind)
    _, sizes, losses = every_plan(profile)
    for point in whole_frontier(WhatIf(profile), 8):
        allocation = point.allocation
        assert allocation.bound <= losses[sizes <= allocation.budget_bytes].min() + 1e-9
        assert allocation.predicted_loss == pytest.approx(
            profile.loss_of_shares(shares(profile, allocation.plan)), abs=1e-9
        )


def shares(profile: Profile, plan: Any) -> Any:
    return np.array(
        [[float(option == chosen) for option in profile.fidelities] for chosen in plan.fidelities]
    )


def test_where_more_bytes_do_harm_the_smaller_plan_is_kept() -> None:
    for seed in range(5):
        profile = make_profile(seed, rising=True)
        whatif, high = WhatIf(profile), byte_ends(profile)[1]
        _, _, losses = every_plan(profile)
        last = frontier(whatif, [budget_at(profile, 0.3), high])[-1].allocation
        assert last.budget_bytes == high
        assert last.bound <= losses.min() + 1e-9
        assert last.weight_bytes < high
        assert (
            last.predicted_loss < whatif.plan(high).predicted_loss
        )  # which is the largest plan, as asked for


def test_budgets_may_come_in_any_order_and_twice() -> None:
    profile = make_profile(0)
    whatif = WhatIf(profile)
    budgets = [budget_at(profile, share) for share in (0.1, 0.4, 0.9)]
    assert frontier(whatif, [budgets[2], budgets[0], budgets[1], budgets[0]]) == frontier(
        whatif, budgets
    )
    assert [point.allocation for point in frontier(whatif, budgets[:1])] == [
        whatif.plan(budgets[0])
    ]


def test_a_budget_that_nothing_fits_is_refused() -> None:
    profile = make_profile(0)
    low, high = byte_ends(profile)
    with pytest.raises(BudgetInfeasible):
        frontier(WhatIf(profile), [high, low - 1])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_points_on_the_hull_are_those_that_no_mix_of_two_others_beats(
    kind: dict[str, Any],
) -> None:
    profile = make_profile(2, layers=6, **kind)
    points = whole_frontier(WhatIf(profile), 30)
    sizes = [point.allocation.weight_bytes for point in points]
    losses = [point.allocation.predicted_loss for point in points]
    assert points[0].on_hull
    for at, point in enumerate(points):
        assert point.on_hull == (not is_beaten(sizes, losses, at))


def is_beaten(sizes: Sequence[float], losses: Sequence[float], at: int) -> bool:
    """Return whether a point is no corner of the hull.

    It equals an earlier one, is above one of its size, or is on or above the line of two others.
    """
    here, others = (sizes[at], losses[at]), [other for other in range(len(sizes)) if other != at]
    if any(
        sizes[other] == here[0]
        and (losses[other] < here[1] or (losses[other] == here[1] and other < at))
        for other in others
    ):
        return True
    return any(
        (here[1] - losses[left]) * (sizes[right] - sizes[left])
        >= (here[0] - sizes[left]) * (losses[right] - losses[left])
        for left in others
        for right in others
        if sizes[left] < here[0] < sizes[right]
    )


POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(-4, 4)), min_size=1, max_size=12)


@PROPERTY
@given(points=POINTS)
def test_the_hull_is_the_lower_convex_hull(points: list[tuple[int, int]]) -> None:
    rows = sorted(points, key=lambda point: point[0])
    sizes = np.array([size for size, _ in rows], dtype=np.int64)
    losses = np.array([loss for _, loss in rows], dtype=np.float64)
    expected = [
        at for at in range(len(points)) if not is_beaten(sizes.tolist(), losses.tolist(), at)
    ]
    assert lower_hull(sizes, losses) == expected


def knees(*points: tuple[float, float]) -> list[int]:
    sizes, losses = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
    return knees_of(sizes, losses)


def test_a_corner_is_a_knee() -> None:
    assert knees((0, 10), (1, 5), (2, 0), (3, 0), (4, 0)) == [2]
    assert knees((0, 9), (1, 1), (9, 0)) == [1]
    assert knees((0, 10), (1, 6), (2, 2), (4, 1.5), (6, 1), (8, 0.5), (9, 0.2), (10, 0)) == [2]


def test_two_corners_are_two_knees() -> None:
    assert knees((0, 100), (2, 40), (10, 10), (30, 0)) == [1, 2]
    assert knees((0, 100), (1, 30), (8, 25), (9, 2), (20, 0)) == [1, 3]


def test_what_does_not_bend_has_no_knee() -> None:
    assert knees(*((at, 10 - at) for at in range(11))) == []
    assert knees(*((at, 3) for at in range(5))) == []
    assert knees((0, 10), (5, 9), (9, 5), (10, 0)) == []  # bends the other way
    assert knees((5, 10), (5, 3)) == []
    assert knees((0, 10), (1, 0)) == []
    assert knees((3, 3)) == []


def test_a_bend_is_a_knee_from_its_least_share_of_the_ranges_on() -> None:
    assert knees((0, 1), (0.5, 0.5 - 1.01 * KNEE_DEPTH), (1, 0)) == [1]
    assert knees((0, 1), (0.5, 0.5 - 0.99 * KNEE_DEPTH), (1, 0)) == []


@PROPERTY
@given(
    points=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 400)),
        min_size=1,
        max_size=12,
        unique_by=lambda point: point[0],
    ),
    powers=st.tuples(st.integers(-20, 30), st.integers(-30, 20)),
    right=st.integers(0, 10**6),
)
def test_knees_do_not_depend_on_units_or_on_where_bytes_are_counted_from(
    points: list[tuple[int, int]], powers: tuple[int, int], right: int
) -> None:
    points = sorted(points)
    found = knees(*points)
    assert (
        knees(
            *(((size + right) * 2.0 ** powers[0], loss * 2.0 ** powers[1]) for size, loss in points)
        )
        == found
    )
    assert all(0 < at < len(points) - 1 for at in found)


def test_a_frontier_bends_where_the_useful_bytes_are_spent() -> None:
    base = make_profile(0, layers=8, rank=0, duplicated=True)
    linear = np.zeros(base.linear.shape)
    linear[:, 0] = 1.0  # the step from the smallest fidelity is worth it, no other is
    linear[:, 1:] = [0.02, 0.01, 0.0]
    profile = replace(base, linear=linear)
    points = whole_frontier(WhatIf(profile), 40)
    (bend,) = (point.allocation for point in points if point.knee)
    spent = profile.plan([1] * 8).weight_bytes
    assert abs(bend.weight_bytes - spent) <= (byte_ends(profile)[1] - byte_ends(profile)[0]) / 39
    assert points[0].on_hull
    assert not points[0].knee


@pytest.mark.parametrize("seed", range(10))
def test_bounds_never_rise_with_the_budget(seed: int) -> None:
    whatif = WhatIf(make_profile(seed, layers=8, menu=5))
    bounds = [
        point.allocation.bound
        for point in frontier(whatif, budgets_between(*whatif.byte_range, 40))
    ]
    assert bounds == sorted(bounds, reverse=True)
