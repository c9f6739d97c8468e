"""Where budget or limits cannot be met, the answer names what binds and the nearest budget."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints, Pool
from allocator.demands.rules import Rule
from allocator.errors import BudgetInfeasible, LimitInfeasible
from allocator.solver.exhaustive import best_choice
from tests.support.further_limits import (
    ANY_SEED,
    FIRST_BLOCK,
    bytes_in,
    latency_at,
    pool_at,
    rules,
    table_of,
    time_of,
)
from tests.support.synthetic_profiles import (
    PROPERTY,
    budget_at,
    byte_ends,
    every_plan,
    make_fidelities,
    make_layers,
    make_profile,
)


def test_a_pool_of_exactly_what_its_layers_need_is_enough_and_one_byte_less_is_not() -> None:
    profile = make_profile(0)
    exact = pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, 0)
    allocation = WhatIf(profile, Constraints(pools=(exact,))).plan(budget_at(profile, 0.5))
    assert bytes_in(allocation, FIRST_BLOCK) == exact.most_bytes
    with pytest.raises(
        LimitInfeasible,
        match=f"'first' of {exact.most_bytes - 1} bytes .* {exact.most_bytes} bytes",
    ):
        WhatIf(
            profile,
            Constraints(
                pools=(Pool("loose", "*", 10**9), replace(exact, most_bytes=exact.most_bytes - 1))
            ),
        )


def test_a_time_below_that_of_the_fastest_plan_is_told_how_fast_it_is() -> None:
    profile = make_profile(0)
    times = np.tile([4.0, 3.0, 2.5, 2.0], (5, 1))
    fastest = {"latency": table_of(profile, times), "most_latency_us": 10.0}
    allocation = WhatIf(profile, Constraints(**fastest)).plan(byte_ends(profile)[1])
    assert {fidelity.name for fidelity in allocation.plan.fidelities} == {"int4g64"}
    with pytest.raises(LimitInfeasible, match=r"'latency' of 9\.5 us .* 10 us"):
        WhatIf(profile, Constraints(**fastest | {"most_latency_us": 9.5}))


def test_rules_are_heeded_when_the_least_use_of_a_limit_is_told() -> None:
    profile = make_profile(0)
    least = profile.weight_bytes[0, 3] + profile.weight_bytes[1, 0]
    pinned = rules("blocks.0.linear0=int4g64")
    with pytest.raises(LimitInfeasible, match=f"'first' .* {least} bytes"):
        WhatIf(
            profile, Constraints(rules=pinned, pools=(Pool("first", "blocks.0.*", int(least) - 1),))
        )
    WhatIf(profile, Constraints(rules=pinned, pools=(Pool("first", "blocks.0.*", int(least)),)))


def test_limits_that_cannot_be_met_together_are_all_named() -> None:
    profile = make_profile(0)
    small = Pool("small", "*", byte_ends(profile)[0])
    fast = {
        "latency": table_of(profile, np.tile([4.0, 3.0, 2.5, 2.0], (5, 1))),
        "most_latency_us": 11.0,
    }
    WhatIf(profile, Constraints(pools=(small,)))
    WhatIf(profile, Constraints(**fast))
    with pytest.raises(LimitInfeasible, match="within the limits 'small', 'latency' together"):
        WhatIf(profile, Constraints(pools=(small,), **fast))


def refused(whatif: WhatIf, budget: int) -> BudgetInfeasible:
    with pytest.raises(BudgetInfeasible) as caught:
        whatif.plan(budget)
    with pytest.raises(BudgetInfeasible):
        whatif.bound(budget)
    error = caught.value
    assert error.budget_bytes == budget
    assert f"budget {budget} bytes" in str(error)
    assert f"{error.nearest_bytes} to {error.largest_bytes} bytes" in str(error)
    assert str(error).endswith(f"what binds: {', '.join(error.binding)}")
    return error


def test_below_the_smallest_plan_the_menu_binds() -> None:
    profile = make_profile(0)
    low, high = byte_ends(profile)
    error = refused(WhatIf(profile), low - 1)
    assert (error.nearest_bytes, error.largest_bytes, error.binding) == (low, high, ("menu",))
    assert WhatIf(profile).plan(low).weight_bytes == low


FLOORS = st.dictionaries(
    st.sampled_from([f"blocks.{at // 2}.linear{at % 2}" for at in range(5)]),
    st.sampled_from([">=2.5", ">=3", "=int4g64", "!=int2g64"]),
    min_size=1,
)


@PROPERTY
@given(seed=ANY_SEED, floors=FLOORS, rank=st.sampled_from([0, 3]), below=st.integers(1, 10**6))
def test_rules_that_bind_are_named_by_their_bytes_and_the_nearest_budget_is_the_smallest(
    seed: int, floors: dict[str, str], rank: int, below: int
) -> None:
    profile = make_profile(seed, rank=rank)
    smallest = {">=2.5": 1, ">=3": 2, "=int4g64": 3, "!=int2g64": 1}
    costs = {
        name + demand: profile.weight_bytes[at, smallest[demand]] - profile.weight_bytes[at, 0]
        for name, demand in floors.items()
        for at, layer in enumerate(profile.layers)
        if layer.name == name
    }
    whatif = WhatIf(profile, Constraints(rules=rules(*costs)))
    low = byte_ends(profile)[0]
    nearest = low + int(sum(costs.values()))
    error = refused(whatif, nearest - 1)
    assert (error.nearest_bytes, error.largest_bytes) == (nearest, byte_ends(profile)[1])
    assert set(error.binding) == set(costs)
    assert [costs[rule] for rule in error.binding] == sorted(costs.values(), reverse=True)
    assert whatif.plan(error.nearest_bytes).weight_bytes == nearest
    assert set(refused(whatif, low - 1).binding) == {"menu", *costs}
    assert refused(whatif, max(nearest - below, low)).binding == error.binding


def test_a_rule_that_costs_no_bytes_does_not_bind() -> None:
    profile = make_profile(0)
    whatif = WhatIf(
        profile, Constraints(rules=rules("blocks.0.*>=3", "blocks.1.*<=3", "blocks.2.*!=int4g64"))
    )
    assert refused(whatif, byte_ends(profile)[0]).binding == ("blocks.0.*>=3",)


def test_one_rule_for_many_layers_is_named_once() -> None:
    profile = make_profile(0)
    whatif = WhatIf(profile, Constraints(rules=rules("*>=3")))
    error = refused(whatif, byte_ends(profile)[0])
    assert error.binding == ("*>=3",)
    assert error.nearest_bytes == profile.weight_bytes[:, 2].sum()


def test_a_limit_that_needs_larger_layers_binds() -> None:
    for seed in range(5):
        profile = make_profile(seed)
        slow_when_small = table_of(profile, np.tile([4.0, 3.0, 2.5, 2.0], (5, 1)))
        whatif = WhatIf(profile, Constraints(latency=slow_when_small, most_latency_us=12.0))
        choices, sizes, _ = every_plan(profile)
        times = np.array([4.0, 3.0, 2.5, 2.0])[choices].sum(axis=1)
        smallest = sizes[times <= 12].min()
        error = refused(whatif, byte_ends(profile)[0])
        assert error.binding == ("latency",)
        assert byte_ends(profile)[0] < error.nearest_bytes <= smallest
        assert error.nearest_bytes > 0.9 * smallest
        assert whatif.plan(byte_ends(profile)[1]).weight_bytes >= smallest


def test_rules_and_limits_that_bind_are_both_named() -> None:
    profile = make_profile(0)
    slow_when_small = table_of(profile, np.tile([4.0, 3.0, 2.5, 2.0], (5, 1)))
    constraints = Constraints(
        latency=slow_when_small, most_latency_us=12.0, rules=rules("blocks.0.linear0=int4g64")
    )
    error = refused(WhatIf(profile, constraints), byte_ends(profile)[0] - 1)
    assert error.binding == ("menu", "blocks.0.linear0=int4g64", "latency")


def test_ties_pools_and_rules_hold_together() -> None:
    layers = make_layers(6)
    profile = replace(make_profile(4, layers=6), layers=layers, fidelities=make_fidelities(4))
    constraints = Constraints(
        ties=("*.linear0,*.linear1",),
        rules=rules("blocks.2.linear0>=3"),
        pools=(pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, 0.6),),
    )
    budget, whatif = budget_at(profile, 0.6), WhatIf(profile, constraints)
    allocation = whatif.plan(budget)
    chosen = allocation.plan.fidelities
    assert [chosen[0], chosen[2], chosen[4]] == [chosen[1], chosen[3], chosen[5]]
    assert chosen[4].name in ("int2+4r0.5g64", "int4g64")
    assert bytes_in(allocation, FIRST_BLOCK) <= constraints.pools[0].most_bytes
    assert allocation.weight_bytes <= budget
    assert allocation.bound <= best_choice(whatif.program, budget)[1] + 1e-9


def test_the_smallest_budget_that_is_said_to_be_feasible_is_and_no_smaller_one() -> None:
    for seed in range(30):
        profile, rng = make_profile(seed), np.random.default_rng(seed)
        times = rng.uniform(1, 10, profile.linear.shape)
        whatif = WhatIf(profile, Constraints(**latency_at(profile, times, 0.4)))
        smallest = whatif.byte_range[0]
        assert whatif.plan(smallest).weight_bytes == smallest
        with pytest.raises(BudgetInfeasible) as caught:
            whatif.plan(smallest - 1)
        assert caught.value.nearest_bytes == smallest
        with pytest.raises(BudgetInfeasible):
            best_choice(whatif.program, smallest - 1)


def test_only_what_binds_is_named() -> None:
    profile = make_profile(0)
    roomy = Pool("roomy", "blocks.0.*", 10**9)
    times = np.tile(np.arange(4.0, 0.0, -1.0), (5, 1))  # the larger, the faster
    timed = latency_at(profile, times, 0.3)
    with pytest.raises(BudgetInfeasible) as caught:
        WhatIf(profile, Constraints(pools=(roomy,), **timed)).plan(byte_ends(profile)[0])
    assert caught.value.binding == ("latency",)
    rules = tuple(Rule.parse(text) for text in ("*>=2.1", "*!=int4g64"))
    with pytest.raises(BudgetInfeasible) as caught:
        WhatIf(profile, Constraints(rules=rules)).plan(byte_ends(profile)[0])
    assert caught.value.binding == ("*>=2.1",)


def test_few_fidelities_and_a_limit_that_some_of_them_break_go_together() -> None:
    profile = make_profile(0)
    times = np.tile(np.arange(1.0, 5.0), (5, 1))
    table = latency_at(profile, times, 0.5)["latency"]
    found = WhatIf(profile, Constraints(latency=table, most_latency_us=12.0, most_distinct=2)).plan(
        byte_ends(profile)[1]
    )
    assert time_of(profile, times, found) <= 12
    assert len(set(found.plan.fidelities)) <= 2
