"""What-ifs: one profile, many questions, each answered exactly, quickly, and with a proof."""

import gc
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.feasibility import check_feasible
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.errors import AllocatorError, ProfileError
from allocator.profile import Profile
from allocator.solver.exhaustive import best_choice
from allocator.solver.program import Program
from tests.support.further_limits import FIRST_BLOCK, pool_at, rules
from tests.support.paths import ROOT
from tests.support.stored_profiles import NAMES, stored_profile
from tests.support.synthetic_profiles import PROPERTY, budget_at, byte_ends, make_profile, permuted

SEEDS = st.integers(0, 10**6)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"duplicated": True},
    {"silent": 5},
    {"menu": 1},
    {"rising": True},
    {"spread": 12.0},
    {"rank": 0},
    {"rank": 0, "spread": 12.0},
    {"rank": 0, "rising": True},
    {"layers": 1, "menu": 8},
]


@PROPERTY
@given(seed=SEEDS, options=st.sampled_from(OPTIONS), place=st.floats(0, 1.2))
def test_a_plan_fits_and_lies_between_its_bound_and_all_other_plans(
    seed: int, options: dict[str, Any], place: float
) -> None:
    profile = make_profile(seed, **options)
    budget = budget_at(profile, place)
    found = WhatIf(profile).plan(budget)
    assert found.weight_bytes == found.plan.weight_bytes <= budget
    _, best = best_choice(Program.of(profile), budget)
    scale = 1e-9 * max(1.0, Program.of(profile).scale(), abs(best))
    assert found.bound <= best + scale
    if place < 1:  # larger budgets get the largest plan, better or not
        assert best <= found.predicted_loss + scale
    assert found.predicted_loss == pytest.approx(
        profile.loss([profile.fidelities.index(f) for f in found.plan.fidelities])
    )


@PROPERTY
@given(seed=SEEDS, rank=st.sampled_from([0, 3]))
def test_permuting_the_layers_permutes_the_plan(seed: int, rank: int) -> None:
    profile = make_profile(seed, layers=8, menu=5, rank=rank)
    order = np.random.default_rng(seed).permutation(8).tolist()
    budget = budget_at(profile, 0.5)
    straight, turned = WhatIf(profile).plan(budget), WhatIf(permuted(profile, order)).plan(budget)
    # of plans that are equally good to the solver's accuracy, another may be found
    assert turned.predicted_loss == pytest.approx(straight.predicted_loss, rel=5e-3)
    if turned.predicted_loss == pytest.approx(straight.predicted_loss, rel=1e-12):
        assert turned.plan.by_name == straight.plan.by_name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_ends_of_the_range_have_one_answer(options: dict[str, Any]) -> None:
    profile = make_profile(1, **options)
    low, high = byte_ends(profile)
    whatif = WhatIf(profile)
    assert whatif.plan(low).weight_bytes == low
    assert whatif.plan(high).weight_bytes == high
    assert whatif.byte_range == (low, high)


def test_layers_that_are_the_same_are_treated_the_same_but_for_the_last_bytes() -> None:
    profile = make_profile(3, layers=8, menu=4, duplicated=True, rank=0)
    kinds = {
        fidelity.name for fidelity in WhatIf(profile).plan(budget_at(profile, 0.5)).plan.fidelities
    }
    assert len(kinds) <= 3


def test_a_change_that_helps_is_taken_although_it_is_smaller() -> None:
    profile = make_profile(0, layers=3, menu=3, rank=0)
    linear = np.array([[-1.0, 0.0, 0.5], [3.0, 0.0, -1.0], [2.0, 0.0, -1.0]])
    found = WhatIf(replace(profile, linear=linear)).plan(byte_ends(profile)[1] - 1)
    assert [profile.fidelities.index(fidelity) for fidelity in found.plan.fidelities] == [0, 2, 2]
    assert found.predicted_loss == pytest.approx(profile.context_loss - 3.0)
    assert found.gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_effects_that_are_no_numbers_are_refused_with_the_layer(value: float) -> None:
    profile = make_profile(0)
    linear = profile.linear.copy()
    linear[2, 1] = value
    with pytest.raises(ProfileError, match=profile.layers[2].name):
        replace(profile, linear=linear)


@pytest.mark.parametrize("rows", [0, -4])
def test_layers_without_bytes_are_refused_by_name(rows: int) -> None:
    profile = make_profile(0)
    layers = (
        *profile.layers[:2],
        replace(profile.layers[2], out_features=rows),
        *profile.layers[3:],
    )
    with pytest.raises(ProfileError, match=profile.layers[2].name):
        replace(profile, layers=layers)


@pytest.mark.parametrize("name", NAMES)
def test_real_plans_are_proven_to_be_near_the_best(name: str) -> None:
    profile = stored_profile(name)
    whatif = WhatIf(profile)
    weights = sum(layer.weights for layer in profile.layers)
    found = [whatif.plan(int(bits * weights / 8)) for bits in (2.3, 2.4, 2.5, 2.7, 3.0, 3.5, 4.0)]
    assert max(plan.gap for plan in found) < 0.01
    assert min(plan.gap for plan in found) >= 0
    assert all(plan.status == "solved" for plan in found)
    for plan in found:
        left_over = plan.slack_bytes > 1e-3 * plan.budget_bytes
        assert left_over <= (plan.price == 0)
        assert any("are left" in note for note in plan.notes) == left_over
    assert all(left.price >= right.price for left, right in pairwise(found))


def test_the_price_of_a_byte_is_what_bytes_buy() -> None:
    profile = stored_profile("smollm2-135m-output")
    whatif = WhatIf(profile)
    budget, more = 34_000_000, 200_000
    here, there = whatif.plan(budget), whatif.plan(budget + more)
    assert (here.predicted_loss - there.predicted_loss) / more == pytest.approx(here.price, rel=0.3)


def tied_profile() -> Profile:
    """Return the real profile with coupling."""
    return stored_profile("smollm2-135m-output")


def test_ties_cost_something_and_are_kept() -> None:
    profile = tied_profile()
    free, tied = (
        WhatIf(profile, Constraints(target=target)).plan(34_000_000)
        for target in ("transformers", "vllm")
    )
    chosen = tied.plan.by_name
    for block in range(30):
        attention = {chosen[f"model.layers.{block}.self_attn.{name}_proj"] for name in "qkv"}
        inner = {chosen[f"model.layers.{block}.mlp.{name}_proj"] for name in ("gate", "up")}
        assert len(attention) == len(inner) == 1
    assert free.bound < tied.bound <= tied.predicted_loss
    assert free.predicted_loss < tied.predicted_loss


def test_the_fast_path_starts_quickly_and_without_torch_or_cvxpy() -> None:
    code = (
        "import time; start = time.process_time()\n"
        "import allocator.answers.whatif, allocator.answers.frontier\n"
        "spent = time.process_time() - start; import sys; print(spent, *sys.modules)"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(words[0]) for words in found) < 1.0
    assert not {"torch", "cvxpy", "transformers", "matplotlib"} & set(found[0])


@pytest.mark.parametrize("constraints", [Constraints(), Constraints(most_distinct=2)], ids=str)
def test_threads_get_the_answers_that_one_alone_gets(constraints: Constraints) -> None:
    profile = make_profile(2, layers=8, menu=4)
    budgets = [budget_at(profile, place) for place in np.linspace(0.02, 0.98, 16)]
    expected = [WhatIf(profile, constraints).plan(budget) for budget in budgets]
    order = np.random.default_rng(0).permutation(len(budgets)).tolist()
    shared = WhatIf(profile, constraints)
    with ThreadPoolExecutor(8) as threads:
        found = dict(
            zip(order, threads.map(lambda at: shared.plan(budgets[at]), order), strict=True)
        )
    assert [found[at] for at in range(len(budgets))] == expected


@PROPERTY
@given(
    seed=SEEDS,
    place=st.floats(-0.1, 0.4),
    floor=st.sampled_from(["", "blocks.0.*>=3", "*.linear1!=int2g64"]),
    pool=st.floats(-0.1, 1.0),
    most_distinct=st.sampled_from([None, 1, 2]),
    ties=st.sampled_from([(), ("*.linear0,*.linear1",)]),
)
def test_what_is_feasible_is_known_before_anything_is_measured(
    seed: int,
    place: float,
    floor: str,
    pool: float,
    most_distinct: int | None,
    ties: tuple[str, ...],
) -> None:
    profile = make_profile(seed)
    constraints = Constraints(
        ties=ties,
        rules=rules(floor) if floor else (),
        pools=(pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, pool),),
        most_distinct=most_distinct,
    )
    budget = budget_at(profile, place)

    def refusal(ask: Callable[[], object]) -> str:
        try:
            ask()
        except AllocatorError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    before = refusal(
        lambda: check_feasible(profile.layers, profile.fidelities, budget, constraints)
    )
    assert before == refusal(lambda: WhatIf(profile, constraints).check(budget))


@pytest.mark.parametrize("questions", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_many_questions_leave_memory_and_files_as_they_were(questions: int) -> None:
    process, whatif = psutil.Process(), WhatIf(make_profile(0, layers=10, menu=6))
    low, high = whatif.byte_range
    budgets = np.random.default_rng(0).integers(low, high, 1000 + questions).tolist()
    for budget in budgets[:1000]:
        whatif.plan(budget)
    gc.collect()
    memory, files = process.memory_info().rss, process.num_fds()
    for budget in budgets[1000:]:
        whatif.plan(budget)
    gc.collect()
    assert process.num_fds() <= files
    assert process.memory_info().rss < memory + 8e6
