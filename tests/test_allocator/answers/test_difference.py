"""Two plans of a model are compared layer by layer.

A plan that a person edited is priced, and what it breaks is named.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.difference import Change, Pricing, compare_plans, loss_of, price_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints, LatencyTable, Pool
from allocator.demands.rules import Rule
from allocator.errors import ProfileError, RuleError
from allocator.profile import Profile
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan
from tests.support.synthetic_profiles import (
    GROUP,
    PROPERTY,
    make_decoder_profile,
    make_fidelities,
    make_layers,
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


# what changes


@PROPERTY
@given(
    seed=ANY_SEED,
    one=CHOICE,
    two=CHOICE,
    order=st.permutations(range(5)),
    rank=st.sampled_from([0, 3]),
)
def test_a_difference_names_the_layers_that_differ_with_their_bytes_whatever_the_order_of_layers(
    seed: int, one: list[int], two: list[int], order: list[int], rank: int
) -> None:
    profile = make_profile(seed, rank=rank)
    before, after = profile.plan(one), profile.plan(two)
    found = compare_plans(before, turned(after, order), profile)
    differ = [at for at in range(5) if one[at] != two[at]]
    assert [change.layer for change in found.changes] == [profile.layers[at].name for at in differ]
    assert [(change.before, change.after) for change in found.changes] == [
        (profile.fidelities[one[at]].name, profile.fidelities[two[at]].name) for at in differ
    ]
    assert [change.bytes_more for change in found.changes] == [
        after.layer_bytes[at] - before.layer_bytes[at] for at in differ
    ]
    assert (found.layers, found.bytes_before, found.bytes_after) == (
        5,
        before.weight_bytes,
        after.weight_bytes,
    )
    assert found.bytes_after - found.bytes_before == sum(
        change.bytes_more for change in found.changes
    )
    assert found.loss_before == pytest.approx(profile.loss(one), abs=1e-12)
    assert found.loss_after == pytest.approx(profile.loss(two), abs=1e-12)


def test_a_plan_does_not_differ_from_itself() -> None:
    plan = make_profile(0).plan([0, 1, 2, 3, 0])
    found = compare_plans(plan, turned(plan, [4, 2, 0, 1, 3]))
    assert found.changes == ()
    assert found.bytes_before == found.bytes_after == plan.weight_bytes


def test_without_a_profile_bytes_are_known_and_losses_are_not() -> None:
    profile = make_profile(0)
    found = compare_plans(profile.plan([0] * 5), profile.plan([3] * 5))
    assert (found.loss_before, found.loss_after) == (None, None)
    assert set(found.to_json()) == {
        "layers",
        "changed",
        "bytes_before",
        "bytes_after",
        "bytes_more",
        "changes",
    }


def test_a_difference_is_a_document() -> None:
    profile = make_profile(0)
    before, after = profile.plan([1, 0, 0, 0, 3]), profile.plan([1, 0, 2, 0, 0])
    more = [after.layer_bytes[at] - before.layer_bytes[at] for at in (2, 4)]
    assert compare_plans(before, after, profile).to_json() == {
        "layers": 5,
        "changed": 2,
        "bytes_before": before.weight_bytes,
        "bytes_after": after.weight_bytes,
        "bytes_more": sum(more),
        "predicted_loss_before": pytest.approx(profile.loss([1, 0, 0, 0, 3])),
        "predicted_loss_after": pytest.approx(profile.loss([1, 0, 2, 0, 0])),
        "predicted_loss_more": pytest.approx(
            profile.loss([1, 0, 2, 0, 0]) - profile.loss([1, 0, 0, 0, 3])
        ),
        "changes": [
            {
                "layer": "blocks.1.linear0",
                "before": "int2g64",
                "after": "int2+4r0.5g64",
                "bytes_more": more[0],
            },
            {
                "layer": "blocks.2.linear0",
                "before": "int4g64",
                "after": "int2g64",
                "bytes_more": more[1],
            },
        ],
    }
    assert compare_plans(before, after).changes[0] == Change(
        "blocks.1.linear0", "int2g64", "int2+4r0.5g64", more[0]
    )


def other_models() -> dict[str, tuple[LayerSpec, ...]]:
    layers = make_layers(5)
    return {
        "blocks.2.linear0": layers[:4],
        "blocks.2.linear1": make_layers(6),
        "blocks.1.linear1": (
            *layers[:3],
            replace(layers[3], in_features=layers[3].in_features + 64),
            layers[4],
        ),
        "blocks.1.linear0": (*layers[:2], replace(layers[2], kind="other"), *layers[3:]),
        "blocks.0.linear0": (replace(layers[0], block=7), *layers[1:]),
        "blocks.0.linear1": (layers[0], replace(layers[1], name="renamed"), *layers[2:]),
    }


@pytest.mark.parametrize("name", other_models())
def test_plans_of_different_models_are_refused_with_a_layer_that_differs(name: str) -> None:
    here = Plan.uniform(make_layers(5), INT8)
    there = Plan.uniform(other_models()[name], INT8)
    profile = replace(make_profile(0), layers=make_layers(5))
    for one, two in ((here, there), (there, here)):
        with pytest.raises(
            ProfileError, match=f"the two plans are of different models: layer '{name}'"
        ):
            compare_plans(one, two)
    for ask in (
        lambda: loss_of(profile, there),
        lambda: price_plan(WhatIf(profile), there),
        lambda: compare_plans(there, there, profile),
    ):
        with pytest.raises(
            ProfileError, match=f"plan and profile are of different models: layer '{name}'"
        ):
            ask()


@PROPERTY
@given(seed=ANY_SEED, choice=CHOICE, order=st.permutations(range(5)))
def test_the_loss_of_a_plan_is_that_of_the_profile_whatever_the_order_of_layers(
    seed: int, choice: list[int], order: list[int]
) -> None:
    profile = make_profile(seed)
    assert loss_of(profile, turned(profile.plan(choice), order)) == pytest.approx(
        profile.loss(choice), abs=1e-12
    )


def test_a_fidelity_between_two_of_the_menu_has_a_loss_between_theirs() -> None:
    profile = make_profile(0, rank=0)
    assert INT8 not in profile.fidelities
    between = Plan.uniform(profile.layers, Fidelity(2, 4, 0.4375, GROUP))
    assert profile.loss([2] * 5) < loss_of(profile, between) < profile.loss([1] * 5)


# what a plan breaks


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


# plans of our own


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
