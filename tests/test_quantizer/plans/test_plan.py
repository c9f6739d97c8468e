"""Promises of quantizer.plans.plan.

A plan survives JSON, is priced by what it says, and wrong documents are refused.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizer.errors import FidelityError, PlanError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import SCHEMA, LayerSpec, Plan, by_block
from tests.support.quantized import fidelities, fixed

LAYERS = (
    LayerSpec("model.layers.0.self_attn.q_proj", 0, "self_attn.q_proj", 64, 100),
    LayerSpec("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", 33, 64),
    LayerSpec("model.layers.1.self_attn.q_proj", 1, "self_attn.q_proj", 64, 100),
)
PLAN = Plan(LAYERS, (Fidelity.uniform(3, 64), Fidelity(2, 4, 0.25, 32), Fidelity.uniform(8, 128)))


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(PLAN.to_json()))
    return document


def _with(field: str, value: object) -> str:
    document = _document()
    document["layers"][LAYERS[1].name][field] = value
    return json.dumps(document)


layer_specs = st.builds(
    LayerSpec,
    st.text(min_size=1, max_size=20),
    st.integers(0, 99),
    st.text(max_size=20),
    st.integers(1, 5000),
    st.integers(1, 5000),
)


@fixed
@given(
    st.lists(
        st.tuples(layer_specs, fidelities()),
        min_size=1,
        max_size=6,
        unique_by=lambda row: row[0].name,
    )
)
def test_a_plan_survives_json(rows: list[tuple[LayerSpec, Fidelity]]) -> None:
    plan = Plan(tuple(layer for layer, _ in rows), tuple(fidelity for _, fidelity in rows))
    assert Plan.loads(json.dumps(plan.to_json())) == plan


def test_bytes_are_the_sum_over_the_layers() -> None:
    expected = [
        fidelity.weight_bytes(layer.out_features, layer.in_features)
        for layer, fidelity in zip(PLAN.layers, PLAN.fidelities, strict=True)
    ]
    assert list(PLAN.layer_bytes) == expected
    assert PLAN.weight_bytes == sum(expected)
    assert PLAN.bits_per_weight == 8 * sum(expected) / (2 * 64 * 100 + 33 * 64)


def test_the_document_says_what_each_layer_costs() -> None:
    document = _document()
    assert document["schema"] == SCHEMA
    assert document["weight_bytes"] == PLAN.weight_bytes
    assert document["bits_per_weight"] == PLAN.bits_per_weight
    assert [row["weight_bytes"] for row in document["layers"].values()] == list(PLAN.layer_bytes)
    assert document["layers"][LAYERS[1].name]["fidelity"] == "int2+4r0.25g32"
    assert list(document["layers"]) == [layer.name for layer in LAYERS]


def test_an_edited_fidelity_is_priced_anew() -> None:
    plan = Plan.loads(_with("fidelity", "int8g32"))
    assert plan.by_name[LAYERS[1].name] == Fidelity.uniform(8, 32)
    assert plan.layer_bytes[1] == Fidelity.uniform(8, 32).weight_bytes(33, 64)
    assert plan.weight_bytes == PLAN.weight_bytes - PLAN.layer_bytes[1] + plan.layer_bytes[1]


def test_byte_counts_in_the_document_are_not_believed() -> None:
    document = json.loads(_with("weight_bytes", 1))
    document["weight_bytes"] = document["bits_per_weight"] = 0
    assert Plan.loads(json.dumps(document)).weight_bytes == PLAN.weight_bytes


def test_layers_by_block_are_in_block_order_and_keep_their_own() -> None:
    assert by_block(reversed(LAYERS)) == {0: (LAYERS[1], LAYERS[0]), 1: (LAYERS[2],)}
    assert list(by_block(reversed(LAYERS))) == [0, 1]
    assert by_block(()) == {}


def test_a_uniform_plan_stores_every_layer_alike() -> None:
    plan = Plan.uniform(iter(LAYERS), Fidelity.uniform(4, 64))
    assert plan.layers == LAYERS
    assert set(plan.by_name.values()) == {Fidelity.uniform(4, 64)}
    assert list(plan.by_name) == [layer.name for layer in LAYERS]


@pytest.mark.parametrize("layers", [(), LAYERS[:2]])
def test_layers_and_fidelities_must_agree(layers: tuple[LayerSpec, ...]) -> None:
    with pytest.raises(PlanError, match="must agree"):
        Plan(layers, PLAN.fidelities)


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(PlanError):
        Plan((), ())
    with pytest.raises(PlanError):
        Plan.loads(json.dumps({"schema": SCHEMA, "layers": {}}))


@pytest.mark.parametrize("text", ["", "{", "not json", '{"schema": }'])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not JSON"):
        Plan.loads(text)


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"plan"', "str")]
)
def test_json_that_is_no_object_is_refused(text: str, kind: str) -> None:
    with pytest.raises(PlanError, match=kind):
        Plan.loads(text)


@pytest.mark.parametrize("schema", [None, "bitwright.plan/2", "", 1, ["bitwright.plan/1"]])
def test_other_schemas_are_refused_by_name(schema: object) -> None:
    document = _document()
    document["schema"] = schema
    with pytest.raises(PlanError, match=r"bitwright\.plan/1"):
        Plan.loads(json.dumps(document))
    del document["schema"]
    with pytest.raises(PlanError):
        Plan.loads(json.dumps(document))


@pytest.mark.parametrize("field", ["fidelity", "block", "kind", "shape"])
def test_missing_fields_are_named_with_their_layer(field: str) -> None:
    document = _document()
    del document["layers"][LAYERS[1].name][field]
    with pytest.raises(PlanError, match=f"layer 1.*{field}"):
        Plan.loads(json.dumps(document))


@pytest.mark.parametrize("layers", [[], "x", None, 3, {"a": None}, {"a": []}, {"a": "int3g64"}])
def test_layers_of_the_wrong_kind_are_refused(layers: object) -> None:
    with pytest.raises(PlanError):
        Plan.loads(json.dumps({"schema": SCHEMA, "layers": layers}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fidelity", 3),
        ("fidelity", None),
        ("block", "first"),
        ("block", None),
        ("shape", 64),
        ("shape", [64]),
        ("shape", [1, 2, 3]),
        ("shape", ["a", 2]),
        ("shape", None),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(field: str, value: object) -> None:
    with pytest.raises(PlanError, match="layer 1"):
        Plan.loads(_with(field, value))


@pytest.mark.parametrize("shape", [[0, 64], [-1, 64], [64, 0], [1.5, 64], "12", [1e999, 64]])
def test_impossible_shapes_are_refused(shape: object) -> None:
    with pytest.raises(PlanError):
        Plan.loads(_with("shape", shape))


def test_a_fidelity_that_does_not_exist_is_a_fidelity_error() -> None:
    with pytest.raises(FidelityError, match="5"):
        Plan.loads(_with("fidelity", "int5g64"))
