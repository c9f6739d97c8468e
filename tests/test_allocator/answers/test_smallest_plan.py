"""The smallest plan for a wanted loss is nearly the smallest there is, and its bound is proven."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.smallest_plan import smallest_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints, Pool
from allocator.demands.rules import Rule
from allocator.errors import LossUnreachable
from tests.support.synthetic_profiles import (
    PROPERTY,
    byte_ends,
    every_plan,
    make_decoder_profile,
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


@PROPERTY
@given(seed=ANY_SEED, kind=st.sampled_from(KINDS), place=st.floats(0, 1))
def test_the_smallest_plan_has_the_wanted_loss_and_no_smaller_one_than_its_bound_has(
    seed: int, kind: dict[str, Any], place: float
) -> None:
    profile = make_profile(seed, **kind)
    _, sizes, losses = every_plan(profile)
    most = float(np.sort(losses)[int(place * (len(losses) - 1))]) + 1e-9
    whatif = WhatIf(profile)
    found = smallest_plan(whatif, most)
    allocation = found.allocation
    assert allocation.predicted_loss <= most
    assert found.bound_bytes == byte_ends(profile)[0] or whatif.bound(found.bound_bytes - 1) > most
    assert allocation.plan.weight_bytes == allocation.weight_bytes == allocation.budget_bytes
    assert found.bound_bytes <= sizes[losses <= most].min() <= allocation.weight_bytes


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_smallest_plan_is_close_to_the_smallest_there_is(kind: dict[str, Any]) -> None:
    over, under = [], []
    for seed in range(8):
        profile = make_profile(seed, **kind)
        _, sizes, losses = every_plan(profile)
        low, high = byte_ends(profile)
        for place in (0.05, 0.3, 0.7):
            most = float(np.quantile(losses, place))
            smallest = sizes[losses <= most].min()
            found = smallest_plan(WhatIf(profile), most)
            over.append((found.allocation.weight_bytes - smallest) / (high - low))
            under.append((smallest - found.bound_bytes) / (high - low))
    assert max(over) < 0.05
    assert np.mean(over) < 0.005
    assert np.mean(np.array(over) == 0) > 0.8
    assert max(under) < 0.15


def test_a_loss_that_every_plan_has_gets_the_smallest_plan() -> None:
    profile = make_profile(0)
    low = byte_ends(profile)[0]
    found = smallest_plan(WhatIf(profile), profile.loss([0] * 5))
    assert (found.allocation.weight_bytes, found.bound_bytes) == (low, low)


def test_a_loss_that_only_the_largest_plan_has_gets_it() -> None:
    profile = make_profile(0)
    high = byte_ends(profile)[1]
    found = smallest_plan(WhatIf(profile), profile.loss([3] * 5))
    assert found.allocation.weight_bytes == high
    assert found.bound_bytes <= high


@pytest.mark.parametrize("kind", [{}, {"rank": 0}], ids=str)
def test_a_loss_that_no_plan_has_is_told_the_best_one(kind: dict[str, Any]) -> None:
    profile = make_profile(0, **kind)
    least, high = profile.loss([3] * 5), byte_ends(profile)[1]
    with pytest.raises(
        LossUnreachable, match=f"{least - 0.01:.6g} nats/token; .* {least:.6g}, with {high} bytes"
    ):
        smallest_plan(WhatIf(profile), least - 0.01)


def test_where_more_bytes_do_harm_a_loss_that_the_largest_plan_lacks_is_found() -> None:
    for seed in range(20):
        profile = make_profile(seed, rising=True)
        most = float(np.quantile(every_plan(profile)[2], 0.01))
        assert (
            smallest_plan(WhatIf(profile), most).allocation.predicted_loss
            <= most
            < profile.loss([3] * 5)
        )


def test_the_smallest_plan_heeds_ties_rules_and_pools() -> None:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    for seed in range(4):
        profile = make_decoder_profile(seed, kinds, 2)
        choices, sizes, losses = every_plan(profile)
        inside = profile.weight_bytes[:3][np.arange(3), choices[:, :3]].sum(axis=1)
        pool = Pool("first", "model.layers.0.*", int(profile.weight_bytes[:3, 1].sum()))
        fine = (
            (choices[:, 0] == choices[:, 1])
            & (choices[:, 3] == choices[:, 4])
            & (choices[:, 5] >= 2)
        )
        fine &= inside <= pool.most_bytes
        most = float(np.quantile(losses[fine], 0.3))
        whatif = WhatIf(
            profile,
            Constraints(target="vllm", rules=(Rule.parse("*.1.mlp.down_proj>=3"),), pools=(pool,)),
        )
        found = smallest_plan(whatif, most)
        chosen = tuple(
            profile.fidelities.index(fidelity) for fidelity in found.allocation.plan.fidelities
        )
        at = int(np.flatnonzero((choices == chosen).all(axis=1))[0])
        assert fine[at]
        assert losses[at] <= most
        assert found.bound_bytes <= sizes[fine & (losses <= most)].min() <= sizes[at]
