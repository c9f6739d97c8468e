"""An allocation is a document, and can deliver another plan."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.allocate import allocate
from allocator.demands.constraints import Constraints, Pool
from allocator.demands.rules import Rule
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from tests.support.synthetic_profiles import (
    GROUP,
    PROPERTY,
    budget_at,
    make_profile,
)

ANY_SEED = st.integers(0, 10**6)


@PROPERTY
@given(
    seed=ANY_SEED, share=st.floats(0, 1), choice=st.lists(st.integers(0, 3), min_size=5, max_size=5)
)
def test_another_plan_can_be_delivered_at_its_own_loss_and_bytes(
    seed: int, share: float, choice: list[int]
) -> None:
    profile = make_profile(seed)
    allocation = allocate(profile, budget_at(profile, share))
    other = allocation.replaced_by(profile.plan(choice), profile)
    assert other.plan == profile.plan(choice)
    assert other.predicted_loss == pytest.approx(profile.loss(choice), rel=1e-12)
    assert other.slack_bytes == allocation.budget_bytes - profile.plan(choice).weight_bytes
    assert other.gap == pytest.approx(
        (other.predicted_loss - allocation.bound) / abs(other.predicted_loss)
    )
    assert (
        replace(
            other,
            plan=allocation.plan,
            weight_bytes=allocation.weight_bytes,
            predicted_loss=allocation.predicted_loss,
        )
        == allocation
    )


def test_a_delivered_plan_with_fidelities_off_the_menu_is_priced_between_those_on_it() -> None:
    profile = make_profile(0, menu=2)
    split = Plan.uniform(profile.layers, Fidelity(2, 4, 0.5, GROUP))
    other = allocate(profile, budget_at(profile, 0.8)).replaced_by(split, profile)
    assert profile.loss([1] * 5) < other.predicted_loss < profile.loss([0] * 5)


def test_an_allocation_is_a_plan_document_with_the_solvers_findings() -> None:
    profile = make_profile(0)
    allocation = allocate(profile, budget_at(profile, 0.9))
    document = json.loads(allocation.dumps())
    assert Plan.from_json(document) == Plan.loads(allocation.dumps()) == allocation.plan
    assert document == allocation.to_json()
    assert set(document) - set(allocation.plan.to_json()) == {
        "budget_bytes",
        "slack_bytes",
        "predicted_loss_nats_per_token",
        "bound_nats_per_token",
        "gap",
        "price_nats_per_token_per_byte",
        "limits",
        "decided_by",
        "status",
        "solver",
        "bitwright",
        "notes",
    }
    assert (
        document["weight_bytes"] + document["slack_bytes"]
        == document["budget_bytes"]
        == budget_at(profile, 0.9)
    )
    assert document["predicted_loss_nats_per_token"] == allocation.predicted_loss
    assert (document["status"], document["notes"]) == (allocation.status, list(allocation.notes))
    assert document["bound_nats_per_token"] == allocation.bound
    assert document["solver"] == allocation.solver
    assert document["bitwright"] == version("bitwright")
    assert (document["limits"], document["decided_by"]) == ([], {})


def test_rules_and_limits_stand_in_the_document() -> None:
    profile = make_profile(0, layers=6)
    rules = Rule.parse("blocks.0.*!=int2g64"), Rule.parse("blocks.0.linear1=int4g64")
    inside = [at for at, layer in enumerate(profile.layers) if layer.block == 1]
    most = int(profile.weight_bytes[inside, 0].sum() * 1.1)
    constraints = Constraints(rules=rules, pools=(Pool("gpu0", "blocks.1.*", most),))
    allocation = allocate(profile, budget_at(profile, 0.8), constraints)
    document = json.loads(allocation.dumps())
    (limit,) = document["limits"]
    assert document["decided_by"] == {
        "blocks.0.linear0": str(rules[0]),
        "blocks.0.linear1": str(rules[1]),
    }
    assert (limit["name"], limit["unit"], limit["most"]) == ("gpu0", "bytes", most)
    assert limit["used"] == sum(allocation.plan.layer_bytes[at] for at in inside) <= most
    assert limit["price_nats_per_token"] == allocation.limits[0].price > 0
    assert Plan.from_json(document) == allocation.plan


@pytest.mark.parametrize(("rank", "solver"), [(0, "hull, exact"), (3, f"OSQP {version('osqp')}")])
def test_an_allocation_says_who_solved_it(rank: int, solver: str) -> None:
    profile = make_profile(0, rank=rank)
    assert allocate(profile, budget_at(profile, 0.5)).solver == solver
