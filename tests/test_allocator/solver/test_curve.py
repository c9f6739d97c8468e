"""The curve finds the optimum that CVXPY finds, on synthetic and real profiles, and bounds it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import LimitInfeasible
from allocator.solver.curve import ExactCurve, SolvedCurve, curve_of
from allocator.solver.cvxpy_reference import AllocationProblem
from allocator.solver.integer import smallest_choice
from allocator.solver.osqp_solver import OsqpProgram
from allocator.solver.program import Limit, Program
from allocator.solver.relaxation import ACCURACY
from tests.support.stored_profiles import NAMES, stored_profile
from tests.support.synthetic_profiles import PROPERTY, make_profile

OPTIONS: list[dict[str, Any]] = [
    {},
    {"layers": 12, "menu": 8, "rank": 5},
    {"layers": 8, "rank": 20, "coupling": 0.4},
    {"spread": 6.0},
    {"spread": 12.0},
    {"duplicated": True},
    {"silent": 3},
    {"rising": True},
    {"layers": 1, "menu": 2, "rank": 1},
    {"menu": 1},
    {"rank": 0},
    {"rank": 0, "layers": 12, "menu": 8},
    {"rank": 0, "rising": True, "spread": 6.0},
    {"in_original": True},
]
PLACES = (0.1, 0.35, 0.6, 0.9)


def budget_in(program: Program, place: float) -> int:
    low, high = program.byte_range()
    return low + round(place * (high - low))


def worst_loss(program: Program) -> float:
    """Return the largest number that a loss is made of, to measure differences by."""
    return max(
        abs(program.loss(program.sizes.argmin(axis=1))), abs(program.constant), program.scale()
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hundreds_of_made_up_programs_have_the_optimum_of_the_reference(
    options: dict[str, Any],
) -> None:
    for seed in range(8):
        program = Program.of(make_profile(seed, **options))
        compiled, reference = OsqpProgram(program), AllocationProblem(program)
        start = compiled.start_from(program.one_hot(smallest_choice(program)), 0.0)
        for place in PLACES:
            budget = budget_in(program, place)
            expected = reference.solve(budget)
            found, _ = compiled.solve(budget, start, accuracy=1e-6, chunks=400)
            assert found.bound == pytest.approx(expected.loss, abs=1e-4 * worst_loss(program))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_curve_is_near_the_optimum_everywhere_and_its_bound_never_above(
    options: dict[str, Any],
) -> None:
    for seed in range(8):
        program = Program.of(make_profile(seed, **options))
        curve, reference = curve_of(program), AllocationProblem(program)
        for place in PLACES:
            budget = budget_in(program, place)
            found, expected = curve.at(budget), reference.solve(budget)
            assert found.bound == pytest.approx(expected.loss, abs=1e-2 * worst_loss(program))
            assert found.bound <= expected.loss + 1e-6 * program.scale()


@pytest.mark.parametrize("name", NAMES)
def test_real_profiles_have_the_optimum_of_the_reference(name: str) -> None:
    program = Program.of(stored_profile(name))
    curve, reference = curve_of(program), AllocationProblem(program)
    for place in (0.05, 0.1, 0.3, 0.7):
        budget = budget_in(program, place)
        found, expected = curve.at(budget), reference.solve(budget)
        assert found.bound == pytest.approx(expected.loss, rel=2e-3)
        assert found.bound <= expected.loss * (1 + 1e-5)
        assert found.gap <= ACCURACY
        assert found.price == pytest.approx(expected.price, rel=0.1)


@PROPERTY
@given(seed=st.integers(0, 10**6), options=st.sampled_from(OPTIONS), place=st.floats(0, 1.2))
def test_a_mix_is_a_mix_within_the_budget_or_priced_beyond_it(
    seed: int, options: dict[str, Any], place: float
) -> None:
    program = Program.of(make_profile(seed, **options))
    found, budget = curve_of(program).at(budget_in(program, place)), budget_in(program, place)
    assert (found.share >= 0).all()
    assert found.share.sum(axis=1) == pytest.approx(np.ones(program.groups), abs=1e-9)
    assert found.price >= 0
    assert float((program.sizes * found.share).sum()) <= budget * 1.03
    assert (
        found.bound
        <= program.loss_of_shares(found.share)
        + found.price * ((program.sizes * found.share).sum() - budget)
        + 1e-9
    )


@pytest.mark.parametrize(
    "options", [{"layers": 12, "menu": 8, "rank": 5}, {"rank": 0}, {"rising": True}], ids=str
)
def test_loosening_a_budget_never_raises_the_bound(options: dict[str, Any]) -> None:
    for seed in range(4):
        program = Program.of(make_profile(seed, **options))
        curve = curve_of(program)
        bounds = np.array(
            [curve.at(budget_in(program, place)).bound for place in np.linspace(0, 1.2, 40)]
        )
        assert (
            np.diff(bounds) <= ACCURACY * np.maximum(np.abs(bounds[:-1]), program.scale())
        ).all()


def test_what_was_asked_before_does_not_matter() -> None:
    program = Program.of(make_profile(1, layers=12, menu=8, rank=5))
    places = np.linspace(0, 1, 21)
    used = SolvedCurve(program)
    fresh = [SolvedCurve(program).at(budget_in(program, place)) for place in places]
    for at in np.random.default_rng(0).permutation(21):
        found = used.at(budget_in(program, places[at]))
        assert found.bound == fresh[at].bound
        assert np.array_equal(found.share, fresh[at].share)


def test_a_prepared_curve_answers_without_the_solver() -> None:
    program = Program.of(stored_profile("smollm2-135m-output"))
    curve = SolvedCurve(program)
    curve.prepare()
    solves = curve.solves
    found = [
        curve.at(budget_in(program, place))
        for place in np.random.default_rng(0).uniform(0.05, 1, 200)
    ]
    assert curve.solves <= solves + 2
    assert max(relaxed.gap for relaxed in found) <= ACCURACY


def test_a_program_without_coupling_needs_no_solver() -> None:
    program = Program.of(make_profile(0, rank=0))
    assert isinstance(curve_of(program), ExactCurve)
    assert isinstance(curve_of(Program.of(make_profile(0))), SolvedCurve)
    limited = replace(program, limits=(Limit("time", "us", np.ones(program.sizes.shape), 5.0),))
    assert isinstance(curve_of(limited), SolvedCurve)


@pytest.mark.parametrize("rank", [0, 3])
def test_rules_and_further_limits_have_the_optimum_of_the_reference_too(rank: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        whole = Program.of(make_profile(seed, layers=8, menu=5, rank=rank))
        allowed = rng.random(whole.sizes.shape) < 0.8
        allowed[:, 0] = True
        cost = np.cumsum(rng.uniform(0, 1, whole.sizes.shape), axis=1)
        program = replace(
            whole.restricted_to(allowed),
            limits=(Limit("time", "us", cost, 0.6 * cost[:, -1].sum()),),
        )
        curve, reference = curve_of(program), AllocationProblem(program)
        for place in PLACES:
            budget = budget_in(program, place)
            found, expected = curve.at(budget), reference.solve(budget)
            assert found.bound == pytest.approx(expected.loss, abs=1e-2 * worst_loss(program))
            assert found.bound <= expected.loss + 1e-6 * program.scale()
            assert not found.share[~program.allowed].any()


def test_the_smallest_budget_under_a_limit_is_found_where_small_is_slow() -> None:
    program = Program.of(make_profile(0, layers=4, rank=0))
    slow_when_small = np.tile([4.0, 3.0, 2.0, 1.0], (4, 1))
    limited = replace(program, limits=(Limit("time", "us", slow_when_small, 10.0),))
    curve = curve_of(limited)
    assert curve.smallest_bytes > program.byte_range()[0]
    assert (limited.limits[0].cost * curve.at(curve.smallest_bytes).share).sum() <= 10 * 1.01
    with pytest.raises(
        LimitInfeasible, match="'time' of 3 us cannot be met: the least that a plan can use is 4 us"
    ):
        curve_of(replace(program, limits=(Limit("time", "us", slow_when_small, 3.0),)))


def test_limits_that_cannot_be_met_together_are_named() -> None:
    program = Program.of(make_profile(0, layers=4, rank=0))
    rising = np.tile([1.0, 2.0, 3.0, 4.0], (4, 1))
    both = (Limit("one", "us", rising, 6.0), Limit("other", "us", rising[:, ::-1].copy(), 6.0))
    with pytest.raises(LimitInfeasible, match="within the limits 'one', 'other' together"):
        curve_of(replace(program, limits=both))
