"""Rules are read in order.

Each narrows what is left, the last one wins, and it is known which one decided a layer.
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.demands.rules import Rule, apply_rules, code_bits
from allocator.demands.ties import group_layers
from allocator.errors import RuleError
from quantizer.plans.fidelity import Fidelity
from tests.support.synthetic_profiles import (
    PROPERTY,
    budget_at,
    decoder_layers,
    make_decoder_profile,
    make_layers,
    make_profile,
)

MENU = tuple(
    Fidelity.parse(name)
    for name in ("int2g256", "int2g64", "int2+4r0.125g64", "int3g64", "int3+4r0.5g64", "int4g64")
)
LAYERS = make_layers(6)
ALONE = [(at,) for at in range(6)]
NAMES = tuple(fidelity.name for fidelity in MENU)


def left_by(*rules: str, layer: int = 0) -> list[str]:
    """Return the fidelities that rules leave to a layer."""
    decision = apply_rules(LAYERS, MENU, ALONE, [Rule.parse(rule) for rule in rules])
    return [name for name, allowed in zip(NAMES, decision.allowed[layer], strict=True) if allowed]


def deciders(*rules: str) -> list[str]:
    """Return the rule that decided each layer, empty where none did."""
    return [
        str(rule or "")
        for rule in apply_rules(
            LAYERS, MENU, ALONE, [Rule.parse(rule) for rule in rules]
        ).decided_by
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("*.down_proj=int4g128", Rule("*.down_proj", "=", "int4g128")),
        ("model.layers.0.*!=int2*", Rule("model.layers.0.*", "!=", "int2*")),
        ("*.self_attn.*>=3", Rule("*.self_attn.*", ">=", "3")),
        ("*<=2.25", Rule("*", "<=", "2.25")),
        ("  *.mlp.*  =  int[34]g64 ", Rule("*.mlp.*", "=", "int[34]g64")),
        ("a.[0-9].b=int2+4r0.125g64", Rule("a.[0-9].b", "=", "int2+4r0.125g64")),
    ],
)
def test_a_rule_is_a_pattern_a_relation_and_a_value(text: str, rule: Rule) -> None:
    assert Rule.parse(text) == rule
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "=int4g64",
        "*=",
        "*==int4g64",
        "*>3",
        "*<3",
        "*=>3",
        "*>=",
        "a b=int4g64",
        "*=int4g64 int3g64",
        "*:int4g64",
    ],
)
def test_what_is_no_rule_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(
        RuleError, match="write PATTERN=FIDELITY, PATTERN!=FIDELITY, PATTERN>=BITS or PATTERN<=BITS"
    ):
        Rule.parse(text)


@pytest.mark.parametrize("text", ["*>=int3g64", "*<=three", "*>=3,5"])
def test_bits_are_a_number(text: str) -> None:
    with pytest.raises(RuleError, match="is not a number of bits"):
        Rule.parse(text)


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("*=int4g64", ["int4g64"]),
        ("*=int2*", ["int2g256", "int2g64", "int2+4r0.125g64"]),
        ("*=int?g64", ["int2g64", "int3g64", "int4g64"]),
        ("*=*+*", ["int2+4r0.125g64", "int3+4r0.5g64"]),
        ("*!=int2*", ["int3g64", "int3+4r0.5g64", "int4g64"]),
        ("*!=int4g128", list(NAMES)),
        ("*>=3", ["int3g64", "int3+4r0.5g64", "int4g64"]),
        ("*>=2.25", ["int2+4r0.125g64", "int3g64", "int3+4r0.5g64", "int4g64"]),
        ("*>=3.5", ["int3+4r0.5g64", "int4g64"]),
        ("*<=2.25", ["int2g256", "int2g64", "int2+4r0.125g64"]),
        ("*<=2", ["int2g256", "int2g64"]),
    ],
)
def test_one_rule_leaves_what_it_admits(rule: str, left: list[str]) -> None:
    assert left_by(rule) == left


def test_bits_are_those_of_codes_alone() -> None:
    assert code_bits(Fidelity.uniform(3, 32)) == code_bits(Fidelity.uniform(3, 128)) == 3
    assert code_bits(Fidelity(2, 4, 0.25, 64)) == 2.5
    assert code_bits(Fidelity(3, 8, 0.5, 64)) == 5.5


def test_a_rule_names_layers_by_their_pattern_alone() -> None:
    assert [left_by("blocks.1.*=int4g64", layer=layer) == ["int4g64"] for layer in range(6)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert left_by("blocks.1.linear1=int4g64", layer=2) == list(NAMES)


def test_rules_narrow_what_rules_before_them_left() -> None:
    assert left_by("*>=2.25", "*<=3.5", "*!=*+*") == ["int3g64"]
    assert left_by("*=int2*", "blocks.0.*=*g64") == ["int2g64", "int2+4r0.125g64"]


def test_where_nothing_would_be_left_the_last_rule_replaces_the_others() -> None:
    assert left_by("*=int2g64", "*=int4g64") == ["int4g64"]
    assert left_by("*>=3", "*<=3", "*=int2*") == ["int2g256", "int2g64", "int2+4r0.125g64"]
    assert left_by("*=int2g64", "*>=3", "*!=int4g64") == ["int3g64", "int3+4r0.5g64"]


def test_the_last_rule_wins_so_exceptions_come_after_what_holds_for_all() -> None:
    assert left_by("*=int2g64", "blocks.0.*=int4g64") == ["int4g64"]
    assert left_by("*=int2g64", "blocks.0.*=int4g64", layer=2) == ["int2g64"]
    assert left_by("blocks.0.*=int4g64", "*=int2g64") == ["int2g64"]


def test_the_rule_that_decided_a_layer_is_the_last_one_that_changed_its_choice() -> None:
    everywhere = "*>=2.25"
    block = "blocks.0.*=int4g64"
    layer = "blocks.2.linear1!=int4g64"
    assert deciders() == [""] * 6
    assert deciders(block) == [block, block, "", "", "", ""]
    assert deciders(everywhere, block, layer) == [
        block,
        block,
        everywhere,
        everywhere,
        everywhere,
        layer,
    ]
    assert deciders(block, everywhere)[0] == block  # at 4 bits already
    assert deciders("*=int2g64", block)[:3] == [block, block, "*=int2g64"]
    assert deciders("*!=int8g64") == [""] * 6


def test_a_rule_for_one_of_several_tied_layers_holds_for_all_of_them() -> None:
    layers = decoder_layers(("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"), 2)
    groups = group_layers(layers, "vllm")
    rules = [Rule.parse("model.layers.0.self_attn.q_proj>=3"), Rule.parse("*.k_proj!=int4g64")]
    decision = apply_rules(layers, MENU, groups, rules)
    assert groups == ((0, 1), (2,), (3, 4), (5,))
    assert [
        [name for name, fine in zip(NAMES, row, strict=True) if fine] for row in decision.allowed
    ] == [
        ["int3g64", "int3+4r0.5g64"],
        list(NAMES),
        list(NAMES[:-1]),
        list(NAMES),
    ]
    assert decision.decided_by == (rules[1], None, rules[1], None)


@pytest.mark.parametrize("wanted", ["=int4g64", ">=5"])
def test_a_rule_that_names_no_layer_is_told_what_layers_are_called(wanted: str) -> None:
    with pytest.raises(
        RuleError,
        match=r"'blocks\.7\.\*' matches no layer; .*'blocks\.0\.linear0' to 'blocks\.2\.linear1'",
    ):
        left_by(f"blocks.7.*{wanted}")


@pytest.mark.parametrize("rule", ["*=int4g128", "*>=5", "*<=1.5", "*!=*"])
def test_a_rule_that_leaves_nothing_is_told_the_menu(rule: str) -> None:
    with pytest.raises(RuleError) as caught:
        left_by("*=int4g64", rule)
    assert repr(rule) in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)
    assert "change the rule, or profile for another budget" in str(caught.value)


def read_in_order(
    groups: Sequence[Sequence[int]], menu: int, rules: Iterable[tuple[str, Iterable[int], set[int]]]
) -> tuple[list[set[int]], list[str]]:
    """Return what rules leave to each layer and which rule decided it, as `rules` documents it.

    Args:
        groups: layers that must agree.
        menu: number of fidelities.
        rules: text, layers and fidelities of each rule.
    """
    left, decided = [set(range(menu)) for _ in groups], [""] * len(groups)
    for text, layers, admitted in rules:
        for at, group in enumerate(groups):
            now = (left[at] & admitted or admitted) if set(layers) & set(group) else left[at]
            if now != left[at]:
                left[at], decided[at] = now, text
    of_layer = [
        at
        for layer in range(sum(map(len, groups)))
        for at, group in enumerate(groups)
        if layer in group
    ]
    return [left[at] for at in of_layer], [decided[at] for at in of_layer]


PATTERNS = {
    "*": range(6),
    "blocks.0.*": (0, 1),
    "*.linear1": (1, 3, 5),
    "blocks.[12].linear0": (2, 4),
    "blocks.2.linear1": (5,),
}
ADMITTED = {
    "=int2*": {0, 1, 2},
    "=int4g64": {5},
    "!=int2*": {3, 4, 5},
    "!=*+*": {0, 1, 3, 5},
    ">=2.25": {2, 3, 4, 5},
    ">=3.5": {4, 5},
    "<=3": {0, 1, 2, 3},
    "<=2": {0, 1},
}


@PROPERTY
@given(
    rules=st.lists(
        st.tuples(st.sampled_from(list(PATTERNS)), st.sampled_from(list(ADMITTED))), max_size=6
    )
)
def test_any_rules_leave_each_layer_a_choice_by_narrowing_in_order_or_replacing(
    rules: list[tuple[str, str]],
) -> None:
    left, decided = read_in_order(
        ALONE,
        6,
        [(pattern + demand, PATTERNS[pattern], ADMITTED[demand]) for pattern, demand in rules],
    )
    decision = apply_rules(
        LAYERS, MENU, ALONE, [Rule.parse(pattern + demand) for pattern, demand in rules]
    )
    assert [set(np.flatnonzero(row).tolist()) for row in decision.allowed] == left
    assert [str(rule or "") for rule in decision.decided_by] == decided
    assert decision.allowed.any(axis=1).all()


DECODER = {
    "*": range(6),
    "model.layers.0.*": (0, 1),
    "*.k_proj": (1, 3, 5),
    "*.[12].self_attn.q_proj": (2, 4),
    "model.layers.2.self_attn.k_proj": (5,),
}
FOUR = {
    "=int2*": {0, 1, 2},
    "!=int2*": {3},
    "!=*+*": {0, 3},
    ">=2.75": {1, 2, 3},
    ">=3": {2, 3},
    "<=3": {0, 1, 2},
    "<=2": {0},
}
"""What demands admit of the menu int2g64, int2+4r0.375g64, int2+4r0.5g64, int4g64."""

GROUPS = {"transformers": ALONE, "vllm": [(0, 1), (2, 3), (4, 5)]}


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    rules=st.lists(
        st.tuples(st.sampled_from(list(DECODER)), st.sampled_from(list(FOUR))), max_size=4
    ),
    share=st.floats(0, 1),
    rank=st.sampled_from([0, 3]),
    target=st.sampled_from(list(GROUPS)),
)
def test_a_plan_obeys_its_rules_and_says_which_one_decided_each_layer(
    seed: int, rules: list[tuple[str, str]], share: float, rank: int, target: str
) -> None:
    profile = make_decoder_profile(
        seed, ("self_attn.q_proj", "self_attn.k_proj"), 3, menu=4, rank=rank
    )
    left, decided = read_in_order(
        GROUPS[target],
        4,
        [(pattern + demand, DECODER[pattern], FOUR[demand]) for pattern, demand in rules],
    )
    whatif = WhatIf(
        profile,
        Constraints(
            target=target, rules=tuple(Rule.parse(pattern + demand) for pattern, demand in rules)
        ),
    )
    low, high = whatif.byte_range
    allocation = whatif.plan(low + round(share * (high - low)))
    chosen = [profile.fidelities.index(fidelity) for fidelity in allocation.plan.fidelities]
    assert all(option in options for option, options in zip(chosen, left, strict=True))
    assert list(allocation.decided_by) == (decided if rules else [])
    document = json.loads(allocation.dumps())
    assert document["decided_by"] == {
        layer.name: rule for layer, rule in zip(profile.layers, decided, strict=True) if rule
    }


def test_a_pinned_layer_keeps_its_fidelity_at_every_budget_and_the_others_make_room() -> None:
    profile = make_profile(1, layers=6, menu=6)
    free = WhatIf(profile)
    pinned = WhatIf(profile, Constraints(rules=(Rule.parse("blocks.1.linear0=int4g64"),)))
    for share in (0.3, 0.5, 0.7):
        budget = budget_at(profile, share)
        allocation = pinned.plan(budget)
        assert allocation.plan.by_name["blocks.1.linear0"].name == "int4g64"
        assert allocation.plan.weight_bytes <= budget
        assert allocation.decided_by == ("", "", "blocks.1.linear0=int4g64", "", "", "")
        assert free.plan(budget).bound <= allocation.predicted_loss


def test_without_rules_nothing_was_decided() -> None:
    allocation = WhatIf(make_profile(0)).plan(budget_at(make_profile(0), 0.5))
    assert allocation.decided_by == ()
    assert allocation.to_json()["decided_by"] == {}


def test_a_pattern_may_negate_characters_as_a_shell_does() -> None:
    rule = Rule.parse("blocks.[!0].*=int4g64")
    assert (rule.pattern, rule.relation, rule.value) == ("blocks.[!0].*", "=", "int4g64")


@pytest.mark.parametrize("bits", ["nan", "inf", "-inf"])
def test_bits_are_a_finite_number(bits: str) -> None:
    with pytest.raises(RuleError, match="is not a number of bits"):
        Rule.parse(f"*>={bits}")
