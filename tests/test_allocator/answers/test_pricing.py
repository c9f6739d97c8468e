"""A plan that a person edited is priced, and the constraints that it breaks are named."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.pricing import Pricing, price_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints, LatencyTable, Pool
from allocator.demands.rules import Rule
from allocator.errors import RuleError
from allocator.profile import Profile
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from tests.support.synthetic_profiles import (
    GROUP,
    PROPERTY,
    make_decoder_profile,
    make_fidelities,
    make_profile,
)

ANY_SEED = st.integers(0, 10**6)
CHOICE = st.lists(st.integers(0, 3), min_size=5, max_size=5)
INT4, INT8 = Fidelity.uniform(4, GROUP), Fidelity.uniform(8, GROUP)
MENU = make_fidelities(4)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def turned(plan: Plan, order: Sequence[int]) -> Plan:
    """Return the same plan with its layers in another order."""
    return Plan(tuple(plan.layers[at] for at in order), tuple(plan.fidelities[at] for at in order))


def edited(plan: Plan, **fidelities: Fidelity) -> Plan:
    """Return a plan with other fidelities for some layers, `blocks_0_linear0` being the first."""
    named = {name.replace("_", "."): fidelity for name, fidelity in fidelities.items()}
    assert named.keys() <= plan.by_name.keys()
    return Plan(plan.layers, tuple((plan.by_name | named)[layer.name] for layer in plan.layers))


def priced(
    constraints: Constraints, plan: Plan, profile: Profile | None = None, budget: int | None = None
) -> Pricing:
    return price_plan(WhatIf(profile or make_profile(0), constraints), plan, budget)


def test_a_plan_that_breaks_nothing_is_sound() -> None:
    profile = make_profile(0)
    plan = profile.plan([0, 1, 2, 3, 0])
    found = priced(Constraints(), turned(plan, [3, 1, 4, 0, 2]))
    assert found.sound
    assert (found.weight_bytes, found.bits_per_weight) == (
        plan.weight_bytes,
        pytest.approx(plan.bits_per_weight),
    )
    assert found.predicted_loss == pytest.approx(profile.loss([0, 1, 2, 3, 0]))
    assert found.to_json() == {
        "weight_bytes": plan.weight_bytes,
        "bits_per_weight": found.bits_per_weight,
        "predicted_loss_nats_per_token": found.predicted_loss,
        "sound": True,
        "off_menu": [],
        "broken_ties": [],
        "broken_rules": [],
        "broken_limits": [],
    }


def test_a_budget_is_broken_by_one_byte_and_not_by_none() -> None:
    plan = make_profile(0).plan([0, 1, 2, 3, 0])
    assert priced(Constraints(), plan, budget=plan.weight_bytes).sound
    found = priced(Constraints(), plan, budget=plan.weight_bytes - 1)
    assert not found.sound
    assert found.broken_limits == (
        f"budget of {plan.weight_bytes - 1} bytes: the plan has {plan.weight_bytes}",
    )


def test_broken_ties_name_the_layers_and_their_fidelities() -> None:
    profile = make_decoder_profile(0, KINDS, 2)
    plan = profile.plan([1, 1, 1, 3, 2, 3, 2, 0])
    found = priced(Constraints(target="vllm"), turned(plan, [7, 6, 5, 4, 3, 2, 1, 0]), profile)
    (tie,) = found.broken_ties
    assert not found.sound
    assert all(f"model.layers.1.{kind}" in tie for kind in KINDS[:3])
    assert "vllm" in tie
    assert "o_proj" not in tie
    assert "int2+4r0.5g64, int4g64" in tie
    assert priced(Constraints(target="vllm", untied=("*.k_proj",)), plan, profile).sound
    assert priced(Constraints(), plan, profile).sound


def test_ties_of_the_user_are_checked_too() -> None:
    profile = make_decoder_profile(0, KINDS, 1)
    found = priced(Constraints(ties=("*.q_proj,*.o_proj",)), profile.plan([1, 2, 2, 0]), profile)
    assert len(found.broken_ties) == 1
    assert priced(
        Constraints(ties=("*.q_proj,*.o_proj",)), profile.plan([1, 0, 2, 1]), profile
    ).sound


def test_broken_rules_name_layer_fidelity_and_rule() -> None:
    rules = tuple(
        Rule.parse(text) for text in ("*>=2.5", "blocks.1.*!=int4g64", "blocks.2.linear0=int2g64")
    )
    plan = make_profile(0).plan([0, 1, 2, 3, 0])
    found = priced(Constraints(rules=rules), plan)
    assert not found.sound
    first, second = found.broken_rules
    assert first == "blocks.0.linear0 has int2g64, against the rule '*>=2.5'"
    assert second == "blocks.1.linear1 has int4g64, against the rule 'blocks.1.*!=int4g64'"
    mended = edited(plan, blocks_0_linear0=INT4, blocks_1_linear1=Fidelity(2, 4, 0.5, GROUP))
    assert priced(Constraints(rules=rules), mended).sound


def test_a_rule_for_one_tied_layer_is_broken_by_each_of_them() -> None:
    profile = make_decoder_profile(0, KINDS, 1)
    constraints = Constraints(target="vllm", rules=(Rule.parse("*.q_proj=int4g64"),))
    found = priced(constraints, profile.plan([3, 2, 3, 0]), profile)
    assert [message.split()[0] for message in found.broken_rules] == [
        "model.layers.0.self_attn.k_proj"
    ]
    assert len(found.broken_ties) == 1


def test_more_distinct_fidelities_than_allowed_break_the_rules() -> None:
    plan = make_profile(0).plan([0, 1, 2, 1, 0])
    assert priced(Constraints(most_distinct=3), plan).sound
    found = priced(Constraints(most_distinct=2), plan)
    assert found.broken_rules == ("3 distinct fidelities; at most 2 were asked for",)
    assert not found.sound


def test_broken_limits_name_the_limit_and_its_use() -> None:
    profile = make_profile(0)
    plan = profile.plan([0, 1, 2, 3, 0])
    inside = sum(plan.layer_bytes[:2])
    names = [fidelity.name for fidelity in profile.fidelities]
    table = LatencyTable(
        tuple(("*", name, time) for name, time in zip(names, (1.0, 2.0, 3.0, 4.5), strict=True))
    )

    def limits(pool: int, time: float) -> Constraints:
        return Constraints(
            pools=(Pool("first", "blocks.0.*", pool),), latency=table, most_latency_us=time
        )

    assert priced(limits(inside, 11.5), plan).sound
    assert priced(limits(inside - 1, 11.5), plan).broken_limits == (
        f"limit 'first' of {inside - 1} bytes: the plan uses {inside}",
    )
    assert priced(limits(inside, 11.25), plan).broken_limits == (
        "limit 'latency' of 11.25 us: the plan uses 11.5",
    )
    assert len(priced(limits(inside - 1, 11.0), plan, budget=1).broken_limits) == 3


def test_fidelities_off_the_menu_are_named_and_priced_but_break_nothing() -> None:
    profile = make_profile(0)
    plan = edited(
        profile.plan([0] * 5), blocks_1_linear0=INT8, blocks_2_linear0=Fidelity.uniform(3, 128)
    )
    found = priced(Constraints(), plan)
    assert found.off_menu == ("blocks.1.linear0", "blocks.2.linear0")
    assert found.weight_bytes == plan.weight_bytes
    assert found.predicted_loss < profile.loss([0] * 5)
    assert found.sound


def test_a_time_that_the_table_does_not_know_is_asked_for() -> None:
    profile = make_profile(0)
    table = LatencyTable(tuple(("*", fidelity.name, 1.0) for fidelity in profile.fidelities))
    with pytest.raises(RuleError, match=r"no row for layer 'blocks\.1\.linear0' at int8g64"):
        priced(
            Constraints(latency=table, most_latency_us=9.0),
            edited(profile.plan([0] * 5), blocks_1_linear0=INT8),
        )


RULES = ("*>=2.5", "*.0.*=int4g64", "*.o_proj!=int2g64", "*.1.*<=3", "*.1.self_attn.k_proj>=3")


@PROPERTY
@given(
    seed=ANY_SEED,
    target=st.sampled_from(["transformers", "vllm", "llama.cpp"]),
    ties=st.sampled_from([(), ("*.q_proj,*.o_proj",)]),
    rules=st.lists(st.sampled_from(RULES), max_size=3),
    limit=st.sampled_from(["none", "pool", "latency", "distinct"]),
    tight=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_a_plan_is_always_sound_under_its_own_constraints(
    seed: int,
    target: str,
    ties: tuple[str, ...],
    rules: list[str],
    limit: str,
    tight: float,
    share: float,
) -> None:
    profile = make_decoder_profile(seed, KINDS, 2)
    constraints = Constraints(
        target=target, ties=ties, rules=tuple(Rule.parse(rule) for rule in rules)
    )
    free = WhatIf(profile, constraints)
    smallest, largest = (free.plan(end).plan for end in free.byte_range)
    constraints = replace(constraints, **limit_between(smallest, largest, limit, tight))
    whatif = WhatIf(profile, constraints)
    low, high = whatif.byte_range
    budget = low + round(share * (high - low)) if limit != "distinct" else high
    allocation = whatif.plan(budget)
    found = price_plan(whatif, allocation.plan, budget)
    assert found.sound, found
    assert found.off_menu == ()
    assert found.weight_bytes == allocation.weight_bytes
    assert found.predicted_loss == pytest.approx(allocation.predicted_loss, abs=1e-9)


def limit_between(smallest: Plan, largest: Plan, limit: str, tight: float) -> dict[str, Any]:
    """Return a limit that only the smallest plan is within at 0, and the largest one at 1."""

    def at(layers: int) -> int:
        low, high = (sum(plan.layer_bytes[:layers]) for plan in (smallest, largest))
        return low + round(tight * (high - low))

    if limit == "pool":
        return {"pools": (Pool("first", "model.layers.0.*", at(4)),)}
    if limit == "latency":
        rows = (
            (
                layer.name,
                fidelity.name,
                float(fidelity.weight_bytes(layer.out_features, layer.in_features)),
            )
            for layer in smallest.layers
            for fidelity in MENU
        )
        return {"latency": LatencyTable(tuple(rows)), "most_latency_us": float(at(8))}
    return {"most_distinct": 2 + round(2 * tight)} if limit == "distinct" else {}


def test_the_rule_that_took_a_fidelity_away_is_named_not_the_last_one() -> None:
    rules = tuple(Rule.parse(text) for text in ("*>=2.5", "*!=int4g64"))
    (broken, *_) = priced(
        Constraints(rules=rules), make_profile(0).plan([0, 1, 2, 2, 2])
    ).broken_rules
    assert broken.endswith("against the rule '*>=2.5'")


def test_what_is_off_the_menu_may_keep_the_rules_all_the_same() -> None:
    profile, rule = make_profile(0), Rule.parse("*>=2.6")
    found = priced(
        Constraints(rules=(rule,)), Plan.uniform(profile.layers, Fidelity.uniform(8, GROUP))
    )
    assert found.broken_rules == ()
    assert len(found.off_menu) == 5
