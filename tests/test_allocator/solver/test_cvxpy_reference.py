"""The relaxation in CVXPY: its optimum, its bound, and its price of a byte."""

from dataclasses import replace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest

from allocator.errors import SolverFailed
from allocator.profile import Profile
from allocator.solver.cvxpy_reference import AllocationProblem, ReferenceSolution
from allocator.solver.exhaustive import best_choice
from allocator.solver.program import Limit, Program
from tests.support.synthetic_profiles import budget_at, byte_ends, make_profile

ACCURACY = 1e-6
"""How far a relaxed loss may be off, as a share of the largest single damage.

Clarabel is asked for 1e-8.
"""

CASES: list[dict[str, Any]] = [
    {"seed": 0},
    {"seed": 1, "layers": 12, "menu": 8, "rank": 5},
    {"seed": 2, "layers": 8, "rank": 20, "coupling": 0.4},
    {"seed": 3, "spread": 6.0},
    {"seed": 4, "duplicated": True},
    {"seed": 5, "silent": 3},
    {"seed": 6, "rising": True},
    {"seed": 7, "layers": 1, "menu": 2, "rank": 1},
    {"seed": 8, "menu": 1},
    {"seed": 4, "rank": 1},
    {"seed": 12, "menu": 8},
    {"seed": 0, "rank": 0},
    {"seed": 1, "rank": 0, "layers": 12, "menu": 8},
    {"seed": 3, "rank": 0, "spread": 6.0},
    {"seed": 4, "rank": 0, "duplicated": True},
    {"seed": 6, "rank": 0, "rising": True},
    {"seed": 2, "in_original": True},
]
SHARES = (0.15, 0.5, 0.85)


def reference_loss(profile: Profile, budget_bytes: int, program: Program | None = None) -> float:
    """Return the relaxed optimum within rules and limits by another solver.

    The problem is a dense quadratic form in the shares alone, solved by HiGHS.
    """
    layers, menu = profile.linear.shape
    unit = largest_damage(profile)
    share = cp.Variable(layers * menu, nonneg=True)
    gram = profile.factor.T @ profile.factor / unit
    rows = np.kron(np.eye(layers), np.ones(menu))
    sizes = profile.weight_bytes.ravel() / 1000
    objective = profile.linear.ravel() / unit @ share + cp.quad_form(share, cp.psd_wrap(gram)) / 2
    constraints = [rows @ share == 1, sizes @ share <= budget_bytes / 1000]
    if program is not None:
        constraints += [share <= program.allowed.ravel().astype(float)]
        constraints += [limit.cost.ravel() @ share <= limit.most for limit in program.limits]
    problem = cp.Problem(cp.Minimize(objective), constraints)
    problem.solve(solver=cp.HIGHS)
    assert problem.status == cp.OPTIMAL
    return float(problem.value) * unit + profile.context_loss


def hull_loss(profile: Profile, budget_bytes: int) -> float:
    """Return the relaxed optimum where damages just add up.

    Bytes are bought at the best rate on each layer's convex hull first.
    """
    loss = profile.context_loss
    left = float(budget_bytes)
    offers = []
    for sizes, damages in zip(profile.weight_bytes.tolist(), profile.linear.tolist(), strict=True):
        size, damage = min(zip(sizes, damages, strict=True))
        loss += damage
        left -= size
        while True:
            rates = [
                ((damage - less) / (more - size), more, less)
                for more, less in zip(sizes, damages, strict=True)
                if more > size
            ]
            rate, more, less = max(rates, default=(0.0, size, damage))
            if rate <= 0:
                break
            offers.append((rate, more - size))
            size, damage = more, less
    for rate, size in sorted(offers, reverse=True):
        bought = min(size, left)
        loss, left = loss - rate * bought, left - bought
    return loss


def largest_damage(profile: Profile) -> float:
    return float(np.abs(profile.damage()).max()) or 1.0


def solve(profile: Profile, share: float) -> ReferenceSolution:
    return AllocationProblem(Program.of(profile)).solve(budget_at(profile, share))


def constrained(seed: int, rank: int) -> tuple[Profile, Program]:
    """Return a profile, and its program under rules and limits.

    The rules forbid a third of the fidelities; there are two further limits.
    """
    profile, rng = make_profile(seed, rank=rank), np.random.default_rng(seed)
    whole = Program.of(profile)
    allowed = rng.random(whole.sizes.shape) < 2 / 3
    allowed[:, 0] = True
    time, energy = (
        rng.uniform(0, 1, (2, *whole.sizes.shape)).cumsum(axis=2)
        * np.array([1.0, 1e6])[:, None, None]
    )
    limits = tuple(
        Limit(name, unit, cost, float(0.6 * cost[:, 0].sum() + 0.4 * cost[:, -1].sum()))
        for name, unit, cost in (("time", "us", time), ("energy", "nJ", energy))
    )
    return profile, replace(whole.restricted_to(allowed), limits=limits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_relaxed_optimum_is_that_of_another_solver(case: dict[str, Any]) -> None:
    profile = make_profile(**case)
    for share in SHARES:
        found = solve(profile, share).loss
        expected = reference_loss(profile, budget_at(profile, share))
        assert found == pytest.approx(expected, abs=ACCURACY * largest_damage(profile), rel=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.get("rank") == 0], ids=str)
def test_where_damages_just_add_up_bytes_are_bought_at_the_best_rate_first(
    case: dict[str, Any],
) -> None:
    profile = make_profile(**case)
    for share in (0.0, *SHARES, 1.0, 1.2):
        found, expected = solve(profile, share).loss, hull_loss(profile, budget_at(profile, share))
        assert found == pytest.approx(expected, abs=ACCURACY * largest_damage(profile), rel=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shares_are_a_mix_within_the_budget_at_the_loss_that_was_said(case: dict[str, Any]) -> None:
    profile = make_profile(**case)
    for share in SHARES:
        solution = solve(profile, share)
        assert (solution.share >= 0).all()
        assert solution.share.sum(axis=1) == pytest.approx(np.ones(len(profile.layers)), abs=1e-12)
        assert (profile.weight_bytes * solution.share).sum() <= budget_at(profile, share) * (
            1 + ACCURACY
        )
        said = profile.loss_of_shares(solution.share)
        assert solution.loss == pytest.approx(said, abs=ACCURACY * largest_damage(profile), rel=0)


def test_solving_again_is_the_same_as_solving_afresh() -> None:
    profile = make_profile(1, layers=12, menu=8)
    kept = AllocationProblem(Program.of(profile))
    for share in (0.5, 0.1, 0.9, 0.5, 0.2):
        again, fresh = kept.solve(budget_at(profile, share)), solve(profile, share)
        assert again.loss == pytest.approx(
            fresh.loss, abs=ACCURACY * largest_damage(profile), rel=0
        )
        assert profile.loss_of_shares(again.share) == pytest.approx(
            profile.loss_of_shares(fresh.share), abs=ACCURACY * largest_damage(profile), rel=0
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.get("layers", 5) <= 6], ids=str)
def test_no_plan_beats_the_relaxed_optimum(case: dict[str, Any]) -> None:
    profile = make_profile(**case)
    for share in SHARES:
        _, best = best_choice(Program.of(profile), budget_at(profile, share))
        assert solve(profile, share).loss <= best + ACCURACY * largest_damage(profile)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_smallest_budget_leaves_one_mix_only(case: dict[str, Any]) -> None:
    profile = make_profile(**case)
    smallest = profile.loss([0] * len(profile.layers))
    assert solve(profile, 0).loss == pytest.approx(
        smallest, abs=ACCURACY * largest_damage(profile), rel=0
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loosening_the_budget_never_raises_the_relaxed_loss(case: dict[str, Any]) -> None:
    profile = make_profile(**case)
    problem = AllocationProblem(Program.of(profile))
    losses = np.array(
        [problem.solve(budget_at(profile, share)).loss for share in np.linspace(0, 1.2, 9)]
    )
    assert (np.diff(losses) <= ACCURACY * largest_damage(profile)).all()


@pytest.mark.parametrize("seed", [0, 1, 2, 6])
def test_the_price_is_what_a_byte_more_or_less_changes(seed: int) -> None:
    profile = make_profile(seed, layers=8, menu=6)
    problem = AllocationProblem(Program.of(profile))
    budget, step = budget_at(profile, 0.5), budget_at(profile, 0.55) - budget_at(profile, 0.5)
    less, here, more = (problem.solve(budget + offset) for offset in (-step, 0, step))
    saved, lost = (here.loss - more.loss) / step, (less.loss - here.loss) / step
    assert 0 < saved * 0.98 <= here.price <= lost * 1.02  # the loss is convex in the budget
    assert lost < 2 * saved


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_price_is_never_negative(case: dict[str, Any]) -> None:
    profile = make_profile(**case)
    assert all(solve(profile, share).price >= 0 for share in (0, *SHARES, 1, 2))


def test_bytes_beyond_the_largest_plan_are_worth_nothing() -> None:
    profile = make_profile(0)
    low, high = byte_ends(profile)
    solution = solve(profile, 2)
    assert solution.price * (high - low) <= ACCURACY * largest_damage(profile)
    assert solution.loss == pytest.approx(
        reference_loss(profile, high), abs=ACCURACY * largest_damage(profile)
    )


def test_a_model_that_nothing_harms_keeps_the_loss_of_its_context() -> None:
    profile = make_profile(0, layers=3, silent=3)
    solution = solve(profile, 0.5)
    assert solution.loss == pytest.approx(profile.context_loss, abs=1e-6)
    assert solution.price * budget_at(profile, 0.5) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_unit_of_the_effects_does_not_matter(rank: int) -> None:
    profile = make_profile(2, rank=rank)
    tiny = replace(
        profile, linear=profile.linear * 1e-9, factor=profile.factor * 1e-9**0.5, context_loss=0.0
    )
    for share in SHARES:
        large, small = solve(profile, share), solve(tiny, share)
        assert small.loss * 1e9 == pytest.approx(large.loss - profile.context_loss, rel=1e-6)
        assert small.price * 1e9 == pytest.approx(large.price, rel=1e-6)


def test_small_programs_are_solved_to_the_end() -> None:
    for options in (
        {"coupling": 0.05},
        {"coupling": 0.1, "rank": 1},
        {"coupling": 0.1, "menu": 8},
        {"rank": 0},
    ):
        for seed in range(15):
            profile = make_profile(seed, **options)
            for share in SHARES:
                assert solve(profile, share).status == "optimal"


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("seed", range(6))
def test_rules_and_further_limits_have_the_optimum_of_another_solver_too(
    seed: int, rank: int
) -> None:
    profile, program = constrained(seed, rank)
    problem = AllocationProblem(program)
    for share in SHARES:
        budget = budget_at(profile, share)
        found, expected = problem.solve(budget).loss, reference_loss(profile, budget, program)
        assert found == pytest.approx(expected, abs=ACCURACY * largest_damage(profile), rel=0)


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_not_allowed_gets_no_share_and_limits_hold(rank: int) -> None:
    bound = 0
    for seed in range(6):
        profile, program = constrained(seed, rank)
        share = AllocationProblem(program).solve(budget_at(profile, 0.85)).share
        free = solve(profile, 0.85).share
        assert share[~program.allowed].max() <= ACCURACY
        for limit in program.limits:
            assert (limit.cost * share).sum() <= limit.most * (1 + ACCURACY)
            bound += int((limit.cost * free).sum() > limit.most)
    assert bound > 6


def test_a_limit_on_bytes_is_as_good_as_a_budget() -> None:
    profile = make_profile(0)
    whole, budget = Program.of(profile), budget_at(profile, 0.5)
    limited = replace(
        whole, limits=(Limit("pool", "bytes", whole.sizes.astype(float), float(budget)),)
    )
    found = AllocationProblem(limited).solve(byte_ends(profile)[1])
    assert found.loss == pytest.approx(
        solve(profile, 0.5).loss, abs=ACCURACY * largest_damage(profile), rel=0
    )


@pytest.mark.parametrize("solver", [None, cp.OSQP, cp.SCS])
def test_the_optimum_is_the_same_by_any_solver(solver: str | None) -> None:
    options = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 50_000} if solver == cp.OSQP else {}
    for seed in (0, 1, 2):
        profile = make_profile(seed)
        found = AllocationProblem(Program.of(profile)).solve(
            budget_at(profile, 0.5), solver, **options
        )
        assert found.loss == pytest.approx(
            solve(profile, 0.5).loss, abs=1e-4 * largest_damage(profile), rel=0
        )


def test_a_solver_without_an_answer_is_said_to_have_failed() -> None:
    profile = make_profile(0)
    problem = AllocationProblem(Program.of(profile))
    with pytest.raises(
        SolverFailed,
        match=f"CLARABEL says 'infeasible' for a budget of {byte_ends(profile)[0] // 2} bytes",
    ):
        problem.solve(byte_ends(profile)[0] // 2)
    with pytest.raises(SolverFailed, match="OSQP says 'user_limit'"):
        problem.solve(budget_at(profile, 0.5), cp.OSQP, max_iter=1)
