"""Layers that an engine fuses have one fidelity.

What else must agree, or need not, the user says.
"""

from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.demands.ties import TARGETS, group_layers, matching_layers
from allocator.errors import RuleError
from quantizer.plans.plan import LayerSpec, Plan
from tests.support.synthetic_profiles import (
    PROPERTY,
    budget_at,
    decoder_layers,
    every_plan,
    make_decoder_profile,
)

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
QKV = set(ATTENTION[:3])
LLAMA = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MIXTRAL = (
    *ATTENTION,
    *(
        f"block_sparse_moe.experts.{expert}.{role}"
        for expert in (0, 3)
        for role in ("w1", "w2", "w3")
    ),
)
QWEN_ROLES = ("gate_proj", "up_proj", "down_proj")
QWEN_MOE = (
    *ATTENTION,
    *(f"mlp.experts.{expert}.{role}" for expert in (0, 5) for role in QWEN_ROLES),
    *(f"mlp.shared_expert.{role}" for role in QWEN_ROLES),
)
QWEN_NEXT = (
    "linear_attn.in_proj_qkvz",
    "linear_attn.in_proj_ba",
    "linear_attn.out_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
SPLIT_NEXT = tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
DENSE_W = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
FAMILIES = {
    "llama": LLAMA,
    "mixtral": MIXTRAL,
    "qwen_moe": QWEN_MOE,
    "qwen_next": QWEN_NEXT,
    "split_next": SPLIT_NEXT,
    "dense_w": DENSE_W,
}

_EXPERTS = {
    family: {kind for kind in FAMILIES[family] if ".experts." in kind}
    for family in ("mixtral", "qwen_moe")
}
FUSED: dict[str, list[set[str]]] = {
    "llama": [QKV, {"mlp.gate_proj", "mlp.up_proj"}],
    "mixtral": [QKV, _EXPERTS["mixtral"]],
    "qwen_moe": [
        QKV,
        _EXPERTS["qwen_moe"],
        {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"},
    ],
    "qwen_next": [
        {"linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"},
        {"mlp.gate_proj", "mlp.up_proj"},
    ],
    "split_next": [set(SPLIT_NEXT[:2]), set(SPLIT_NEXT[2:])],
    "dense_w": [{"feed_forward.w1", "feed_forward.w3"}],
}
"""What vLLM and SGLang load as one, by kind of layer."""

ONE_TENSOR: dict[str, list[set[str]]] = {
    "llama": [],
    "mixtral": [
        {f"block_sparse_moe.experts.{expert}.{role}" for expert in (0, 3)}
        for role in ("w1", "w2", "w3")
    ],
    "qwen_moe": [{f"mlp.experts.{expert}.{role}" for expert in (0, 5)} for role in QWEN_ROLES],
    "qwen_next": [],
    "split_next": [],
    "dense_w": [],
}
"""What llama.cpp stores as one."""

EXPECTED = {
    "transformers": {family: [] for family in FAMILIES},
    "vllm": FUSED,
    "sglang": FUSED,
    "llama.cpp": ONE_TENSOR,
}


def tied(layers: tuple[LayerSpec, ...], target: str, **options: Any) -> list[set[str]]:
    """Return the names in each group of several layers."""
    groups = group_layers(layers, target, **options)
    return [{layers[at].name for at in group} for group in groups if len(group) > 1]


def in_blocks(groups: list[set[str]], blocks: int) -> list[set[str]]:
    """Return the names of groups of kinds in every block."""
    return [
        {f"model.layers.{block}.{kind}" for kind in group}
        for block in range(blocks)
        for group in groups
    ]


def as_sets(groups: list[set[str]]) -> set[frozenset[str]]:
    return {frozenset(group) for group in groups}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_engine_fuses_agrees_within_each_block_and_nothing_else_does(
    family: str, target: str
) -> None:
    found = tied(decoder_layers(FAMILIES[family], 3), target)
    assert as_sets(found) == as_sets(in_blocks(EXPECTED[target][family], 3))


def test_the_attention_of_several_parents_is_not_mixed() -> None:
    layers = decoder_layers(
        ("self_attn.q_proj", "self_attn.k_proj", "cross_attn.q_proj", "cross_attn.k_proj"), 1
    )
    assert as_sets(tied(layers, "vllm")) == as_sets(
        in_blocks(
            [{"self_attn.q_proj", "self_attn.k_proj"}, {"cross_attn.q_proj", "cross_attn.k_proj"}],
            1,
        )
    )


@PROPERTY
@given(
    family=st.sampled_from(list(FAMILIES)),
    target=st.sampled_from(TARGETS),
    ties=st.lists(
        st.sampled_from(["*.layers.*", "model.layers.0.*", "*.0.*", "model.layers.[01].*,*.2.*"]),
        max_size=2,
    ),
    untied=st.lists(st.sampled_from(["*.1.*", "model.layers.2.*", "*"]), max_size=2),
    order=st.randoms(use_true_random=False),
)
def test_every_layer_is_in_exactly_one_group_and_groups_come_in_the_order_of_the_layers(
    family: str, target: str, ties: list[str], untied: list[str], order: Any
) -> None:
    layers = list(decoder_layers(FAMILIES[family], 3))
    order.shuffle(layers)
    groups = group_layers(layers, target, ties, untied)
    assert sorted(chain.from_iterable(groups)) == list(range(len(layers)))
    assert all(list(group) == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    assert all(len({layers[at].block for at in group}) == 1 for group in groups)


def test_a_tie_of_the_user_holds_within_each_block() -> None:
    layers = decoder_layers(LLAMA, 2)
    found = tied(layers, "transformers", ties=["*.q_proj, *.o_proj"])
    assert as_sets(found) == as_sets(in_blocks([{"self_attn.q_proj", "self_attn.o_proj"}], 2))


def test_a_tie_of_the_user_joins_what_the_engine_ties() -> None:
    layers = decoder_layers(LLAMA, 2)
    found = tied(layers, "vllm", ties=["*.q_proj,*.o_proj"])
    assert as_sets(found) == as_sets(
        in_blocks([set(ATTENTION), {"mlp.gate_proj", "mlp.up_proj"}], 2)
    )


def test_ties_that_share_a_layer_are_one() -> None:
    layers = decoder_layers(LLAMA, 1)
    ties = ["*.down_proj,*.o_proj", "*.up_proj,*.v_proj", "*.o_proj,*.v_proj"]
    assert tied(layers, "transformers", ties=ties) == in_blocks(
        [{"mlp.down_proj", "self_attn.o_proj", "mlp.up_proj", "self_attn.v_proj"}], 1
    )


def test_a_tie_can_be_for_one_block_alone() -> None:
    layers = decoder_layers(LLAMA, 2)
    assert tied(layers, "transformers", ties=["model.layers.1.self_attn.*"]) == [
        {f"model.layers.1.{kind}" for kind in ATTENTION}
    ]


def test_untied_layers_choose_alone_and_the_rest_still_agrees() -> None:
    layers = decoder_layers(LLAMA, 2)
    found = tied(layers, "vllm", untied=["*.v_proj", "model.layers.1.mlp.*"])
    queries = in_blocks([{"self_attn.q_proj", "self_attn.k_proj"}], 2)
    assert as_sets(found) == as_sets(
        [*queries, {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}]
    )


def test_what_the_user_ties_is_not_untied() -> None:
    layers = decoder_layers(LLAMA, 1)
    found = tied(layers, "vllm", ties=["*.q_proj,*.v_proj"], untied=["*"])
    assert found == in_blocks([{"self_attn.q_proj", "self_attn.v_proj"}], 1)


def test_an_unknown_target_is_told_which_there_are() -> None:
    with pytest.raises(RuleError, match=r"'exllama'.* transformers, vllm, sglang, llama\.cpp"):
        group_layers(decoder_layers(LLAMA, 1), "exllama")


@pytest.mark.parametrize(
    "options", [{"ties": ["*.q_proj,*.query"]}, {"untied": ["*.query"]}], ids=str
)
def test_a_pattern_that_names_nothing_is_told_what_layers_are_called(
    options: dict[str, Any],
) -> None:
    layers = decoder_layers(LLAMA, 2)
    with pytest.raises(
        RuleError,
        match=r"'\*\.query' matches no layer; "
        r".*model\.layers\.0\.self_attn\.q_proj.*model\.layers\.1\.mlp",
    ):
        group_layers(layers, "vllm", **options)


def test_patterns_are_those_of_a_shell_and_name_whole_names_in_their_own_case() -> None:
    layers = decoder_layers(LLAMA, 12)
    assert [
        layers[at].block for at in matching_layers(layers, "model.layers.[0-2].mlp.down_proj")
    ] == [
        0,
        1,
        2,
    ]
    assert [
        layers[at].block for at in matching_layers(layers, "model.layers.?.mlp.down_proj")
    ] == list(range(10))
    assert [
        layers[at].block for at in matching_layers(layers, "model.layers.1[!0].mlp.down_proj")
    ] == [11]
    for pattern in ("down_proj", "model.layers.0", "*.DOWN_PROJ"):
        with pytest.raises(RuleError, match="matches no layer"):
            matching_layers(layers, pattern)


def agrees(plan: Plan, names: set[str]) -> bool:
    return len({plan.by_name[name] for name in names}) == 1


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "transformers"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen_moe"])
def test_plans_for_an_engine_agree_where_it_fuses(family: str, target: str) -> None:
    groups = in_blocks(EXPECTED[target][family], 2)
    differ = 0
    for seed in range(3):
        profile = make_decoder_profile(seed, FAMILIES[family], 2, menu=6)
        bound, free = WhatIf(profile, Constraints(target=target)), WhatIf(profile)
        for share in (0.2, 0.5, 0.8):
            budget = budget_at(profile, share)
            allocation = bound.plan(budget)
            assert allocation.plan.weight_bytes == allocation.weight_bytes <= budget
            assert all(agrees(allocation.plan, names) for names in groups)
            differ += sum(not agrees(free.plan(budget).plan, names) for names in groups)
    assert (differ > 0) == bool(groups)  # it is the tie that makes them agree


@pytest.mark.parametrize("rank", [0, 3])
def test_a_tied_plan_is_close_to_the_best_of_those_that_agree(rank: int) -> None:
    shortfalls = []
    for seed in range(8):
        profile = make_decoder_profile(seed, LLAMA[:6], 1, rank=rank)
        choices, sizes, losses = every_plan(profile)
        agreeing = (
            (choices[:, 0] == choices[:, 1])
            & (choices[:, 1] == choices[:, 2])
            & (choices[:, 4] == choices[:, 5])
        )
        for share in (0.3, 0.6):
            budget = budget_at(profile, share)
            best = losses[agreeing & (sizes <= budget)].min()
            found = WhatIf(profile, Constraints(target="vllm")).plan(budget)
            assert found.bound <= best + 1e-9
            shortfalls.append((found.predicted_loss - best) / (losses[0] - best))
    assert min(shortfalls) >= -1e-9
    assert max(shortfalls) < 0.05
    assert sum(shortfalls) / len(shortfalls) < 0.01
