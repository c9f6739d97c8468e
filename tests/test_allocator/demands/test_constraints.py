"""Limits beside the budget hold exactly."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints, LatencyTable, Pool
from allocator.errors import BudgetError, BudgetInfeasible, LimitInfeasible, RuleError
from allocator.solver.exhaustive import best_choice
from quantizer.plans.fidelity import Fidelity
from tests.support.further_limits import (
    ANY_SEED,
    FIRST_BLOCK,
    KINDS,
    SECOND_OF_EACH_BLOCK,
    SHARE,
    bytes_in,
    latency_at,
    pool_at,
    time_of,
    times_by_bytes,
)
from tests.support.synthetic_profiles import (
    GROUP,
    PROPERTY,
    budget_at,
    every_plan,
    make_layers,
    make_profile,
)

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


@pytest.mark.parametrize(
    "text", ["", "gpu0", "gpu0:*", "*=40MB", ":*=40MB", "gpu0:=40MB", "gpu0=40MB:*"]
)
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
    table = read(
        "fidelity, note,latency_us,layer".replace(" ", ""),
        "int2g64,x,1.5,*.linear0",
        "int4g64,y, 2 ,blocks.0.linear1 ",
    )
    assert table.rows == (("*.linear0", "int2g64", 1.5), ("blocks.0.linear1", "int4g64", 2.0))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ("layer,fidelity", "*,int2g64"),
            "line 1: columns layer, fidelity and latency_us are needed",
        ),
        (
            ("layer,fidelity,time", "*,int2g64,1"),
            "line 1: columns layer, fidelity and latency_us are needed",
        ),
        (
            ("layer,fidelity,latency_us", "*,int2g64,1", "*,int4g64"),
            "line 3: columns layer, fidelity and latency_us are needed",
        ),
        (
            ("layer,fidelity,latency_us", "*,int2g64,1", "*,int4g64,fast"),
            "line 3: 'fast' is not a time",
        ),
        (("layer,fidelity,latency_us", "*,int2g64,1", "*,int4g64,"), "line 3: '' is not a time"),
        (("layer,fidelity,latency_us", "*,int2g64,1e999999"), "line 2: '1e999999' is not a time"),
        (
            ("*,int2g64,1", "*,int4g64,1"),
            "line 1: columns layer, fidelity and latency_us are needed",
        ),
        (("nothing of the kind",), "line 1: columns layer, fidelity and latency_us are needed"),
        (
            ("layer,fidelity,latency_us", "*,int2g64,1", "x" * 200_000),
            "columns layer, fidelity and latency_us are needed",
        ),
    ],
)
def test_a_latency_table_that_lacks_something_is_told_the_line_and_the_columns(
    lines: tuple[str, ...], told: str
) -> None:
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
    table = read(
        "layer,fidelity,latency_us",
        "*,int4g64,5",
        "blocks.0.*,int4g64,7",
        "*.linear1,int4g64,2",
        "*,int2g64,9",
    )
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
        (
            {"pools": (Pool("a", "*", 1), Pool("b", "*", 1), Pool("a", "*.linear0", 1))},
            "name of its own",
        ),
    ],
)
def test_constraints_that_make_no_sense_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(RuleError, match=word):
        Constraints(**values)


def test_a_pool_that_holds_no_layer_is_refused() -> None:
    with pytest.raises(RuleError, match=r"'model\.\*' matches no layer"):
        WhatIf(make_profile(0), Constraints(pools=(Pool("a", "model.*", 10**9),)))


# limits hold


@PROPERTY
@given(
    seed=ANY_SEED,
    kind=st.sampled_from(KINDS),
    share=SHARE,
    pools=st.tuples(SHARE, st.floats(0.5, 1)),
    latency=SHARE,
)
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
    assert best == pytest.approx(
        losses[(sizes <= budget) & (inside <= held.most_bytes)].min(), abs=1e-9
    )


def shortfalls(
    pools: float | None, latency: float | None, kind: dict[str, Any]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return how far the loss of plans is above that of the best plans within the same limits.

    In units of the difference between the losses of the smallest and the largest plan.
    """
    found = []
    for seed in range(8):
        profile = make_profile(seed, **kind)
        held = (
            () if pools is None else (pool_at(profile, "first", "blocks.0.*", FIRST_BLOCK, pools),)
        )
        timed = {} if latency is None else latency_at(profile, times_by_bytes(profile), latency)
        whatif = WhatIf(profile, Constraints(pools=held, **timed))
        span = abs(profile.loss([0] * 5) - profile.loss([3] * 5))
        for share in (0.2, 0.5, 0.8):
            budget = budget_at(profile, share)
            found.append(
                (whatif.plan(budget).predicted_loss - best_choice(whatif.program, budget)[1]) / span
            )
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("pools", "latency"), [(0.3, None), (None, 0.5), (0.4, 0.6)])
def test_within_limits_the_loss_is_close_to_the_best_one(
    pools: float | None, latency: float | None, kind: dict[str, Any]
) -> None:
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
    assert (pool.name, pool.unit, pool.used, pool.most) == (
        "first",
        "bytes",
        bytes_in(allocation, FIRST_BLOCK),
        held.most_bytes,
    )
    assert (latency.name, latency.unit, latency.most) == ("latency", "us", timed["most_latency_us"])
    assert latency.used == pytest.approx(time_of(profile, times, allocation))
    assert allocation.to_json()["limits"] == [
        {
            "name": use.name,
            "unit": use.unit,
            "used": use.used,
            "most": use.most,
            "price_nats_per_token": use.price,
        }
        for use in (pool, latency)
    ]


def test_a_limit_has_a_price_where_it_binds_and_none_where_it_does_not() -> None:
    for seed in range(5):
        profile = make_profile(seed)
        tight = pool_at(profile, "tight", "blocks.0.*", FIRST_BLOCK, 0.3)
        loose = Pool("loose", "*.linear1", 10**9)
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
