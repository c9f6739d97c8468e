"""Limits beside the budget hold exactly; where they cannot, the answer names what is in the way."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.allocation import Allocation
from allocator.constraints import Constraints, LatencyTable, Pool
from allocator.errors import BudgetError, BudgetInfeasible, LimitInfeasible, RuleError
from allocator.exhaustive import best_choice
from allocator.profile import Array, Profile
from allocator.rules import Rule
from allocator.whatif import WhatIf
from quantizer.fidelity import Fidelity
from tests.test_allocator.synthetic import (
    GROUP,
    PROPERTY,
    budget_at,
    byte_ends,
    every_plan,
    make_fidelities,
    make_layers,
    make_profile,
)

FIRST_BLOCK = [0, 1]
SECOND_OF_EACH_BLOCK = [1, 3]
"""Layers of a profile of five that `blocks.0.*` and `*.linear1` name."""

KINDS: list[dict[str, Any]] = [{}, {"rank": 0}, {"rising": True}, {"coupling": 0.3}, {"spread": 4.0}, {"duplicated": True}]
ANY_SEED = st.integers(0, 10**6)
SHARE = st.floats(0, 1)


def rules(*texts: str) -> tuple[Rule, ...]:
    return tuple(Rule.parse(text) for text in texts)


def pool_at(profile: Profile, name: str, pattern: str, inside: list[int], share: float) -> Pool:
    """Return a pool that holds the smallest fidelities of its layers at share 0, and the largest at 1."""
    sizes = profile.weight_bytes[inside]
    low, high = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    return Pool(name, pattern, low + round(share * (high - low)))


def table_of(profile: Profile, times: Array) -> LatencyTable:
    """Return a latency table with these times of each layer at each fidelity, [L, K]."""
    return LatencyTable(
        tuple(
            (layer.name, fidelity.name, float(time))
            for layer, row in zip(profile.layers, times, strict=True)
            for fidelity, time in zip(profile.fidelities, row, strict=True)
        )
    )


def times_by_bytes(profile: Profile) -> Array:
    """Return times of layers that are read from memory: a fixed part and one for each byte."""
    return 3 + profile.weight_bytes / 1000


def latency_at(profile: Profile, times: Array, share: float) -> dict[str, Any]:
    """Return constraints that only the fastest plan meets at share 0, and any plan at 1."""
    low, high = times.min(axis=1).sum(), times.max(axis=1).sum()
    return {"latency": table_of(profile, times), "most_latency_us": float(low + share * (high - low))}


def time_of(profile: Profile, times: Array, allocation: Allocation) -> float:
    rows = [profile.fidelities.index(fidelity) for fidelity in allocation.plan.fidelities]
    return float(times[np.arange(len(rows)), rows].sum())


def bytes_in(allocation: Allocation, inside: list[int]) -> int:
    return sum(allocation.plan.layer_bytes[at] for at in inside)


# what a user writes


@pytest.mark.parametrize(
    ("text", "pool"),
    [
        ("gpu0:model.layers.[0-9].*=40MB", Pool("gpu0", "model.layers.[0-9].*", 40_000_000)),
        ("npu: *.down_proj = 1.5KiB", Pool("npu", "*.down_proj", 1536)),
        ("a:*=7B", Pool("a", "*", 7)),
    ],
)
def test_a_pool_is_a_name_a_pattern_and_a_size(text: str, pool: Pool) -> None:
    assert Pool.parse(text) == pool


@pytest.mark.parametrize("text", ["", "gpu0", "gpu0:*", "*=40MB", ":*=40MB", "gpu0:=40MB", "gpu0=40MB:*"])
def test_what_is_no_pool_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(RuleError, match="write NAME:PATTERN=SIZE"):
        Pool.parse(text)


@pytest.mark.parametrize("size", ["", "40", "lots", "0MB", "-1MB"])
def test_the_size_of_a_pool_is_a_size(size: str) -> None:
    with pytest.raises(BudgetError):
        Pool.parse(f"gpu0:*={size}")


def test_a_pool_counts_bytes_not_bits_per_weight() -> None:
    with pytest.raises(RuleError, match="in bytes"):
        Pool.parse("gpu0:*=3bpw")


def read(*lines: str) -> LatencyTable:
    return LatencyTable.read(io.StringIO("\n".join(lines)))


def test_a_latency_table_is_a_csv_file_in_any_order_of_columns() -> None:
    table = read("fidelity, note,latency_us,layer".replace(" ", ""), "int2g64,x,1.5,*.linear0", "int4g64,y, 2 ,blocks.0.linear1 ")
    assert table.rows == (("*.linear0", "int2g64", 1.5), ("blocks.0.linear1", "int4g64", 2.0))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (("layer,fidelity", "*,int2g64"), "line 1: columns layer, fidelity and latency_us are needed"),
        (("layer,fidelity,time", "*,int2g64,1"), "line 1: columns layer, fidelity and latency_us are needed"),
        (("layer,fidelity,latency_us", "*,int2g64,1", "*,int4g64"), "line 3: columns layer, fidelity and latency_us are needed"),
        (("layer,fidelity,latency_us", "*,int2g64,1", "*,int4g64,fast"), "line 3: 'fast' is not a time"),
        (("layer,fidelity,latency_us", "*,int2g64,1", "*,int4g64,"), "line 3: '' is not a time"),
        (("layer,fidelity,latency_us", "*,int2g64,1e999999"), "line 2: '1e999999' is not a time"),
        (("*,int2g64,1", "*,int4g64,1"), "line 1: columns layer, fidelity and latency_us are needed"),
        (("nothing of the kind",), "line 1: columns layer, fidelity and latency_us are needed"),
        (("layer,fidelity,latency_us", "*,int2g64,1", "x" * 200_000), "columns layer, fidelity and latency_us are needed"),
    ],
)
def test_a_latency_table_that_lacks_something_is_told_the_line_and_the_columns(lines: tuple[str, ...], told: str) -> None:
    with pytest.raises(RuleError, match=told):
        read(*lines)


def test_a_latency_table_may_begin_with_a_byte_order_mark() -> None:
    assert read("\ufefflayer,fidelity,latency_us", "*,int2g64,1").rows == (("*", "int2g64", 1.0),)


@pytest.mark.parametrize("most", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_latency_limit_is_a_positive_number(most: float) -> None:
    with pytest.raises(RuleError, match="give a positive number"):
        Constraints(latency=read("layer,fidelity,latency_us", "*,int2g64,1"), most_latency_us=most)


@pytest.mark.parametrize("text", [" :*=4MB", "a: =4MB", "a:*=0.1B"])
def test_a_pool_has_a_name_layers_and_bytes(text: str) -> None:
    with pytest.raises(RuleError):
        Pool.parse(text)


@pytest.mark.parametrize("time", ["-1", "-0.001", "nan", "inf"])
def test_a_time_is_a_number_of_at_least_zero(time: str) -> None:
    with pytest.raises(RuleError, match=r"line 3: .* is not a time in microseconds"):
        read("layer,fidelity,latency_us", "*,int2g64,0", f"*,int4g64,{time}")


def test_the_last_row_that_names_a_layer_counts() -> None:
    layers = make_layers(3)
    fidelity = Fidelity.uniform(4, GROUP)
    table = read("layer,fidelity,latency_us", "*,int4g64,5", "blocks.0.*,int4g64,7", "*.linear1,int4g64,2", "*,int2g64,9")
    assert [table.latency_us(layer, fidelity) for layer in layers] == [7, 2, 5]


def test_a_gap_in_the_latency_table_is_named_at_once() -> None:
    profile = make_profile(0, menu=2)
    table = read("layer,fidelity,latency_us", "*,int2g64,5", "blocks.[01].*,int4g64,7")
    with pytest.raises(RuleError, match=r"no row for layer 'blocks\.2\.linear0' at int4g64"):
        WhatIf(profile, Constraints(latency=table, most_latency_us=100))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"latency": LatencyTable(())}, "both"),
        ({"most_latency_us": 5.0}, "both"),
        ({"latency": LatencyTable(()), "most_latency_us": 0.0}, "positive"),
        ({"latency": LatencyTable(()), "most_latency_us": -1.0}, "positive"),
        ({"latency": LatencyTable(()), "most_latency_us": float("nan")}, "positive"),
        ({"most_distinct": 0}, "1 or more"),
        ({"pools": (Pool("a", "*", 1), Pool("b", "*", 1), Pool("a", "*.linear0", 1))}, "name of its own"),
    ],
)
def test_constraints_that_make_no_sense_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(RuleError, match=word):
        Constraints(**values)


def test_a_pool_that_holds_no_layer_is_refused() -> None:
    with pytest.raises(RuleError, match=r"'model\.\*' names no layer"):
        WhatIf(make_profile(0), Constraints(pools=(Pool("a", "model.*", 10**9),)))


# limits hold


@PROPERTY
@given(seed=ANY_SEED, kind=st.sampled_from(KINDS), share=SHARE, pools=st.tuples(SHARE, st.floats(0.5, 1)), latency=SHARE)
def test_whenever_something_is_within_pools_and_time_so_is_the_plan_and_its_bound_holds(
    seed: int, kind: dict[str, Any], share: float, pools: tuple[float, float], latency: float
) -> None:
    profile = make_profile(seed, **kind)
    times = times_by_bytes(profile)
    constraints = Constraints(
        pools=(
            pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, pools[0]),
            pool_at(profile, "second", "*.linear1", SECOND_OF_EACH_BLOCK, pools[1]),
        ),
        **latency_at(profile, times, latency),
    )
    budget, whatif = budget_at(profile, share), WhatIf(profile, constraints)
    _, best = best_choice(whatif.program, budget)
    allocation = whatif.plan(budget)
    assert allocation.plan.weight_bytes <= budget
    assert bytes_in(allocation, FIRST_BLOCK) <= constraints.pools[0].most_bytes
    assert bytes_in(allocation, SECOND_OF_EACH_BLOCK) <= constraints.pools[1].most_bytes
    assert time_of(profile, times, allocation) <= constraints.most_latency_us * (1 + 1e-9)
    assert allocation.bound <= best + 1e-9
    assert best <= allocation.predicted_loss + 1e-9


@PROPERTY
@given(seed=ANY_SEED, kind=st.sampled_from(KINDS), share=SHARE, pool=SHARE)
def test_the_slow_twin_within_a_pool_is_the_best_of_all_plans_that_fit_it(
    seed: int, kind: dict[str, Any], share: float, pool: float
) -> None:
    profile = make_profile(seed, **kind)
    held = pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, pool)
    choices, sizes, losses = every_plan(profile)
    inside = profile.weight_bytes[FIRST_BLOCK, choices[:, FIRST_BLOCK]].sum(axis=1)
    budget = budget_at(profile, share)
    _, best = best_choice(WhatIf(profile, Constraints(pools=(held,))).program, budget)
    assert best == pytest.approx(losses[(sizes <= budget) & (inside <= held.most_bytes)].min(), abs=1e-9)


def shortfalls(pools: float | None, latency: float | None, kind: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the loss of plans above the best ones within the same limits, as shares of what all bytes can buy."""
    found = []
    for seed in range(8):
        profile = make_profile(seed, **kind)
        held = () if pools is None else (pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, pools),)
        timed = {} if latency is None else latency_at(profile, times_by_bytes(profile), latency)
        whatif = WhatIf(profile, Constraints(pools=held, **timed))
        span = abs(profile.loss([0] * 5) - profile.loss([3] * 5))
        for share in (0.2, 0.5, 0.8):
            budget = budget_at(profile, share)
            found.append((whatif.plan(budget).predicted_loss - best_choice(whatif.program, budget)[1]) / span)
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("pools", "latency"), [(0.3, None), (None, 0.5), (0.4, 0.6)])
def test_within_limits_the_loss_is_close_to_the_best_one(pools: float | None, latency: float | None, kind: dict[str, Any]) -> None:
    found = shortfalls(pools, latency, kind)
    assert found.min() >= -1e-9
    assert found.mean() < 0.01
    assert found.max() < 0.1
    assert (found < 1e-6).mean() > 0.7


def test_whatever_the_times_a_plan_is_within_them_and_its_bound_holds() -> None:
    plans = 0
    for seed in range(40):
        profile, rng = make_profile(seed, **KINDS[seed % len(KINDS)]), np.random.default_rng(seed)
        times = rng.uniform(1, 10, profile.linear.shape)  # larger fidelities may be the faster ones
        constraints = Constraints(**latency_at(profile, times, 0.05 if seed % 2 else 0.4))
        budget, whatif = budget_at(profile, 0.5), WhatIf(profile, constraints)
        try:
            allocation = whatif.plan(budget)
        except (BudgetInfeasible, LimitInfeasible):
            with pytest.raises(BudgetInfeasible):  # nor does trying every plan find one
                best_choice(whatif.program, budget)
            continue
        plans += 1
        assert allocation.plan.weight_bytes <= budget
        assert time_of(profile, times, allocation) <= constraints.most_latency_us * (1 + 1e-9)
        assert allocation.bound <= best_choice(whatif.program, budget)[1] + 1e-9
    assert 20 < plans < 40


def test_a_plan_reports_what_it_uses_of_each_limit() -> None:
    profile = make_profile(3)
    times = times_by_bytes(profile)
    held = pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, 0.5)
    timed = latency_at(profile, times, 0.7)
    allocation = WhatIf(profile, Constraints(pools=(held,), **timed)).plan(budget_at(profile, 0.8))
    pool, latency = allocation.limits
    assert (pool.name, pool.unit, pool.used, pool.most) == ("first", "bytes", bytes_in(allocation, FIRST_BLOCK), held.most_bytes)
    assert (latency.name, latency.unit, latency.most) == ("latency", "us", timed["most_latency_us"])
    assert latency.used == pytest.approx(time_of(profile, times, allocation))
    assert allocation.to_json()["limits"] == [
        {"name": use.name, "unit": use.unit, "used": use.used, "most": use.most, "price_nats_per_token": use.price}
        for use in (pool, latency)
    ]


def test_a_limit_has_a_price_where_it_binds_and_none_where_it_does_not() -> None:
    for seed in range(5):
        profile = make_profile(seed)
        tight, loose = pool_at(profile, "tight", "blocks.0.*", FIRST_BLOCK, 0.3), Pool("loose", "*.linear1", 10**9)
        whatif = WhatIf(profile, Constraints(pools=(tight, loose)))
        one, other = whatif.plan(budget_at(profile, 0.9)).limits
        steepest = np.ptp(profile.linear) / np.diff(profile.weight_bytes, axis=1).min()
        assert one.price > 1e-3 * steepest
        assert 0 <= other.price < 1e-6 * steepest


def test_the_price_of_a_limit_is_what_one_more_unit_of_it_saves() -> None:
    saved, priced = [], []
    for seed in range(6):
        profile = make_profile(seed, layers=20, menu=8)
        inside = list(range(10))
        held = pool_at(profile, "half", "blocks.[0-4].*", inside, 0.4)
        more = 2000
        budget = budget_at(profile, 0.9)
        tight, looser = (
            WhatIf(profile, Constraints(pools=(pool,))).plan(budget)
            for pool in (held, replace(held, most_bytes=held.most_bytes + more))
        )
        saved.append(tight.bound - looser.bound)
        priced.append(more * (tight.limits[0].price + looser.limits[0].price) / 2)
    assert saved == pytest.approx(priced, rel=0.2)


# what cannot be


def test_a_pool_of_exactly_what_its_layers_need_is_enough_and_one_byte_less_is_not() -> None:
    profile = make_profile(0)
    exact = pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, 0)
    allocation = WhatIf(profile, Constraints(pools=(exact,))).plan(budget_at(profile, 0.5))
    assert bytes_in(allocation, FIRST_BLOCK) == exact.most_bytes
    with pytest.raises(LimitInfeasible, match=f"'first' of {exact.most_bytes - 1} bytes .* {exact.most_bytes} bytes"):
        WhatIf(profile, Constraints(pools=(Pool("loose", "*", 10**9), replace(exact, most_bytes=exact.most_bytes - 1))))


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
        WhatIf(profile, Constraints(rules=pinned, pools=(Pool("first", "blocks.0.*", int(least) - 1),)))
    WhatIf(profile, Constraints(rules=pinned, pools=(Pool("first", "blocks.0.*", int(least)),)))


def test_limits_that_cannot_be_met_together_are_all_named() -> None:
    profile = make_profile(0)
    small = Pool("small", "*", byte_ends(profile)[0])
    fast = {"latency": table_of(profile, np.tile([4.0, 3.0, 2.5, 2.0], (5, 1))), "most_latency_us": 11.0}
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
def test_rules_that_bind_are_named_by_the_bytes_they_cost_and_the_nearest_budget_is_exactly_the_smallest(
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
    whatif = WhatIf(profile, Constraints(rules=rules("blocks.0.*>=3", "blocks.1.*<=3", "blocks.2.*!=int4g64")))
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
    constraints = Constraints(latency=slow_when_small, most_latency_us=12.0, rules=rules("blocks.0.linear0=int4g64"))
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
    found = WhatIf(profile, Constraints(latency=table, most_latency_us=12.0, most_distinct=2)).plan(byte_ends(profile)[1])
    assert time_of(profile, times, found) <= 12
    assert len(set(found.plan.fidelities)) <= 2
