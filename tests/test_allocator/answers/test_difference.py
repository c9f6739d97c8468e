"""Two plans of a model are compared layer by layer, and any plan has a modelled loss."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.difference import Change, compare_plans, loss_of
from allocator.answers.pricing import price_plan
from allocator.answers.whatif import WhatIf
from allocator.errors import ProfileError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan
from tests.support.synthetic_profiles import (
    GROUP,
    PROPERTY,
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
