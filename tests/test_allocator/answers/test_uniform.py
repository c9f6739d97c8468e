"""The uniform plan gives every layer the same share and wastes at most one step of one layer.

The best of a menu's is the rival.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.answers.uniform import (
    CLOSE,
    UNUSED,
    likely_uniform_plans,
    uniform_plan,
    uniform_plans,
)
from allocator.demands.menu import RANGES, uniform_bytes
from allocator.errors import BudgetInfeasible
from allocator.profile import Profile, shares_of
from quantizer.plans.fidelity import COLUMN_MULTIPLE, Fidelity
from quantizer.plans.plan import LayerSpec, Plan
from tests.support.synthetic_profiles import (
    GROUP,
    PROPERTY,
    budget_at,
    make_fidelities,
    make_profile,
)

WIDTHS = st.sampled_from([(2, 4), (3, 4), (4, 8), (2, 8)])
SHARES = st.floats(0, 1)


def decoder(blocks: int, hidden: int, inner: int) -> tuple[LayerSpec, ...]:
    """Return the layers of a llama of these sizes."""
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden // 2, hidden),
        "v_proj": (hidden // 2, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return tuple(
        LayerSpec(f"layers.{block}.{kind}", block, kind, *shape)
        for block in range(blocks)
        for kind, shape in shapes.items()
    )


LAYERS = decoder(4, 192, 512)


def kind_of(bits_lo: int, bits_hi: int, group_size: int = GROUP, scale_bits: int = 16) -> Fidelity:
    """Return any fidelity of these code widths, and of this group size and width of scales."""
    return Fidelity(bits_lo, bits_hi, 0.0 if bits_lo == bits_hi else 0.3, group_size, scale_bits)


def ends(layers: tuple[LayerSpec, ...], widths: tuple[int, int]) -> tuple[int, int]:
    low, high = (uniform_bytes(layers, Fidelity.uniform(bits, GROUP)) for bits in widths)
    return low, high


def between(layers: tuple[LayerSpec, ...], widths: tuple[int, int], share: float) -> int:
    low, high = ends(layers, widths)
    return low + round(share * (high - low))


def high_share(layer: LayerSpec, fidelity: Fidelity, widths: tuple[int, int]) -> float:
    """Return the share of a layer's columns that are stored at the high width."""
    if fidelity.ratio == 0:
        return float(fidelity.bits_lo == widths[1])
    return fidelity.high_columns(layer.in_features) / layer.in_features


def largest_step(layers: tuple[LayerSpec, ...], widths: tuple[int, int]) -> int:
    """Return the most bytes that `COLUMN_MULTIPLE` more high columns cost in any layer."""
    largest = 0
    for layer in layers:
        counts = range(COLUMN_MULTIPLE, layer.in_features, COLUMN_MULTIPLE)
        splits = [Fidelity(*widths, count / layer.in_features, GROUP) for count in counts]
        options = [Fidelity.uniform(widths[0], GROUP), *splits, Fidelity.uniform(widths[1], GROUP)]
        sizes = [option.weight_bytes(layer.out_features, layer.in_features) for option in options]
        largest = max(largest, *(after - before for before, after in pairwise(sizes)))
    return largest


@PROPERTY
@given(widths=WIDTHS, share=SHARES)
def test_budget_is_never_exceeded(widths: tuple[int, int], share: float) -> None:
    budget = between(LAYERS, widths, share)
    assert uniform_plan(LAYERS, kind_of(*widths), budget).weight_bytes <= budget


@PROPERTY
@given(
    layers=st.builds(
        decoder,
        st.integers(1, 4),
        st.sampled_from([64, 192, 256]),
        st.sampled_from([160, 384, 512]),
    ),
    widths=WIDTHS,
    share=SHARES,
)
def test_at_most_one_step_of_one_layer_is_left_unused(
    layers: tuple[LayerSpec, ...], widths: tuple[int, int], share: float
) -> None:
    budget = between(layers, widths, share)
    plan = uniform_plan(layers, kind_of(*widths), budget)
    assert budget - plan.weight_bytes <= largest_step(layers, widths)


@pytest.mark.parametrize(
    ("blocks", "hidden", "inner", "share"), [(8, 576, 1536, 108 / 149), (4, 80, 160, 0.95)]
)
def test_layers_never_take_a_step_together(
    blocks: int, hidden: int, inner: int, share: float
) -> None:
    layers = decoder(blocks, hidden, inner)
    budget = between(layers, (2, 4), share)
    plan = uniform_plan(layers, kind_of(2, 4), budget)
    assert budget - plan.weight_bytes <= largest_step(layers, (2, 4))


@PROPERTY
@given(widths=WIDTHS, share=SHARES)
def test_all_layers_have_nearly_the_same_share(widths: tuple[int, int], share: float) -> None:
    plan = uniform_plan(LAYERS, kind_of(*widths), between(LAYERS, widths, share))
    shares = [
        high_share(layer, fidelity, widths)
        for layer, fidelity in zip(plan.layers, plan.fidelities, strict=True)
    ]
    steps = [COLUMN_MULTIPLE / layer.in_features for layer in LAYERS]
    assert max(s - step for s, step in zip(shares, steps, strict=True)) <= min(
        s + step for s, step in zip(shares, steps, strict=True)
    )


@PROPERTY
@given(widths=WIDTHS, share=SHARES)
def test_only_the_two_widths_are_used(widths: tuple[int, int], share: float) -> None:
    plan = uniform_plan(LAYERS, kind_of(*widths), between(LAYERS, widths, share))
    used = {(fidelity.bits_lo, fidelity.bits_hi) for fidelity in plan.fidelities}
    assert used <= {widths, (widths[0], widths[0]), (widths[1], widths[1])}


@PROPERTY
@given(first=SHARES, second=SHARES)
def test_more_bytes_never_give_a_smaller_plan(first: float, second: float) -> None:
    less, more = (between(LAYERS, (2, 4), share) for share in sorted((first, second)))
    assert (
        uniform_plan(LAYERS, kind_of(2, 4), less).weight_bytes
        <= uniform_plan(LAYERS, kind_of(2, 4), more).weight_bytes
    )


def test_the_smallest_budget_gives_every_layer_the_low_width() -> None:
    low, _ = ends(LAYERS, (2, 4))
    assert uniform_plan(LAYERS, kind_of(2, 4), low) == Plan.uniform(
        LAYERS, Fidelity.uniform(2, GROUP)
    )


@pytest.mark.parametrize("surplus", [0, 1, 10**9])
def test_a_budget_of_the_largest_plan_or_more_gives_every_layer_the_high_width(
    surplus: int,
) -> None:
    _, high = ends(LAYERS, (2, 4))
    assert uniform_plan(LAYERS, kind_of(2, 4), high + surplus) == Plan.uniform(
        LAYERS, Fidelity.uniform(4, GROUP)
    )


def test_a_budget_below_the_low_width_is_refused_with_the_least_that_would_do() -> None:
    low, _ = ends(LAYERS, (3, 4))
    with pytest.raises(BudgetInfeasible, match=f"{low - 1} bytes is below {low} bytes"):
        uniform_plan(LAYERS, kind_of(3, 4), low - 1)


CODED = tuple(
    Fidelity.parse(name)
    for name in ("int2g64s6", "int2+3r0.25g64s6", "int2+4r0.25g64", "int3g64s8")
)
MENUS = [*(span.fidelities for span in RANGES), make_fidelities(6), make_fidelities(1), CODED]
"""Menus: mixed, of one pair of widths, of one fidelity, and of several widths of scales."""

Kind = tuple[int, int, int, int]
"""Both code widths, group size, and bits of a scale."""


def kinds_of(fidelities: tuple[Fidelity, ...]) -> set[Kind]:
    """Return the kinds of fidelities on a menu."""
    return {
        (fidelity.bits_lo, fidelity.bits_hi, fidelity.group_size, fidelity.scale_bits)
        for fidelity in fidelities
    }


def lowest_of(kind: Kind) -> Fidelity:
    """Return the kind without high-impact columns."""
    return Fidelity(kind[0], kind[0], 0.0, *kind[2:])


def is_of_kind(plan: Plan, kind: Kind) -> bool:
    """Return whether all layers are of one kind, with a share of none, some or all."""
    bits_lo, bits_hi, *rest = kind
    return kinds_of(plan.fidelities) <= {kind, (bits_lo, bits_lo, *rest), (bits_hi, bits_hi, *rest)}


def menu_budget(menu: tuple[Fidelity, ...], share: float) -> int:
    """Return the budget at a share of the way from the smallest uniform plan to the largest."""
    sizes = [uniform_bytes(LAYERS, fidelity) for fidelity in menu]
    return min(sizes) + round(share * (max(sizes) - min(sizes)))


@PROPERTY
@given(menu=st.sampled_from(MENUS), share=st.floats(0, 1.2))
def test_each_uniform_plan_fits_and_is_of_one_kind_on_the_menu(
    menu: tuple[Fidelity, ...], share: float
) -> None:
    budget = menu_budget(menu, share)
    plans = uniform_plans(LAYERS, menu, budget)
    assert plans
    for plan in plans:
        assert plan.layers == LAYERS
        assert plan.weight_bytes <= budget
        assert any(is_of_kind(plan, kind) for kind in kinds_of(menu))


@PROPERTY
@given(menu=st.sampled_from(MENUS), share=st.floats(0, 1.2))
def test_uniform_plans_are_all_that_use_the_budget_as_well_as_the_fullest(
    menu: tuple[Fidelity, ...], share: float
) -> None:
    budget = menu_budget(menu, share)
    fitting = [kind for kind in kinds_of(menu) if uniform_bytes(LAYERS, lowest_of(kind)) <= budget]
    every = [uniform_plan(LAYERS, kind_of(*kind), budget) for kind in fitting]
    fullest = max(plan.weight_bytes for plan in every)
    expected = {plan.fidelities for plan in every if plan.weight_bytes >= (1 - UNUSED) * fullest}
    assert {plan.fidelities for plan in uniform_plans(LAYERS, menu, budget)} == expected


def test_a_mixed_menu_has_rivals_of_several_widths() -> None:
    layers = decoder(4, 1024, 2048)
    plans = uniform_plans(
        layers, RANGES[0].fidelities, uniform_bytes(layers, RANGES[0].fidelities[3])
    )
    assert {max(fidelity.bits_hi for fidelity in plan.fidelities) for plan in plans} == {3, 4}


def test_a_menu_of_uniform_fidelities_has_the_largest_that_fits_as_its_plan() -> None:
    menu = tuple(Fidelity.uniform(bits, GROUP) for bits in (2, 3, 4))
    three = uniform_bytes(LAYERS, menu[1])
    assert uniform_plans(LAYERS, menu, three) == [Plan.uniform(LAYERS, menu[1])]
    assert uniform_plans(LAYERS, menu, three - 1) == [Plan.uniform(LAYERS, menu[0])]


def test_plans_that_leave_more_unused_than_allowed_are_left_out() -> None:
    layers = decoder(2, 4096, 4096)
    menu = tuple(Fidelity.uniform(3, group_size) for group_size in (256, 224, 192))
    least, near, fullest = (uniform_bytes(layers, fidelity) for fidelity in menu)
    assert least < (1 - UNUSED) * fullest < near < fullest
    assert least > (1 - 2 * UNUSED) * fullest
    assert set(uniform_plans(layers, menu, fullest)) == {
        Plan.uniform(layers, fidelity) for fidelity in menu[1:]
    }


def test_a_budget_below_every_uniform_plan_is_refused() -> None:
    menu = RANGES[2].fidelities
    low = min(uniform_bytes(LAYERS, lowest_of(kind)) for kind in kinds_of(menu))
    assert uniform_plans(LAYERS, menu, low)
    with pytest.raises(BudgetInfeasible, match=f"budget {low - 1} bytes"):
        uniform_plans(LAYERS, menu, low - 1)


def mixed_profile(seed: int) -> Profile:
    """Return a profile of the menu of common budgets."""
    return replace(make_profile(seed, menu=8, layers=6), fidelities=RANGES[1].fidelities[:8])


def offers(profile: Profile, plan: Plan) -> int:
    """Return how many fidelities of the menu differ from those of a plan in their ratio only."""
    (widths,) = {(f.bits_lo, f.bits_hi) for f in plan.fidelities if f.ratio} or {
        (plan.fidelities[0].bits_lo,) * 2
    }
    kind = (*widths, plan.fidelities[0].group_size, plan.fidelities[0].scale_bits)
    return sum(kinds_of((fidelity,)) == {kind} for fidelity in profile.fidelities)


@PROPERTY
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_uniform_plans_of_nearly_the_least_modelled_loss_are_likely_to_be_best(
    seed: int, share: float
) -> None:
    profile = mixed_profile(seed)
    budget = budget_at(profile, share)
    plans = uniform_plans(profile.layers, profile.fidelities, budget)
    likely = likely_uniform_plans(profile, budget)
    losses = {plan: profile.loss_of_shares(shares_of(profile, plan)) for plan in plans}
    least = min(losses.values())
    assert set(likely) == {
        plan for plan, loss in losses.items() if loss <= least + CLOSE * abs(least)
    }
    found = [(-offers(profile, plan), losses[plan]) for plan in likely]
    assert found == sorted(found)


@pytest.mark.parametrize("favoured", ["int2+3r0.125g256", "int2+4r0.0625g256"])
def test_the_best_uniform_plan_takes_the_widths_that_do_least_damage(favoured: str) -> None:
    fidelities = tuple(Fidelity.parse(name) for name in ("int2+4r0.0625g256", "int2+3r0.125g256"))
    layers = decoder(2, 1024, 2048)  # both fidelities take the same bytes, but for zero points
    linear = np.array([[float(fidelity.name != favoured) for fidelity in fidelities]] * len(layers))
    factor = np.zeros((0, linear.size))
    profile = Profile("integral", layers, fidelities, 0, 1.0, linear, factor, 0.0, 1, "a", "b")
    best, *_ = likely_uniform_plans(
        profile, max(uniform_bytes(layers, fidelity) for fidelity in fidelities)
    )
    assert {fidelity.bits_hi for fidelity in best.fidelities if fidelity.ratio} == {
        Fidelity.parse(favoured).bits_hi
    }


def test_a_budget_below_every_uniform_plan_has_no_best_one() -> None:
    profile = make_profile(0)
    with pytest.raises(BudgetInfeasible):
        likely_uniform_plans(profile, budget_at(profile, 0) - 1)


@PROPERTY
@given(seed=st.integers(0, 10**6), choice=st.lists(st.integers(0, 7), min_size=6, max_size=6))
def test_a_plan_of_fidelities_on_the_menu_is_those_alone(seed: int, choice: list[int]) -> None:
    profile = mixed_profile(seed)
    assert np.array_equal(shares_of(profile, profile.plan(choice)), np.eye(8)[choice])


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0, 1),
    kind=st.sampled_from(sorted(kinds_of(RANGES[1].fidelities))),
)
def test_a_plan_is_a_mix_of_the_same_bytes_as_far_as_the_menu_reaches(
    seed: int, share: float, kind: Kind
) -> None:
    profile = mixed_profile(seed)
    ends = [uniform_bytes(profile.layers, lowest_of((bits, bits, *kind[2:]))) for bits in kind[:2]]
    plan = uniform_plan(
        profile.layers, kind_of(*kind), ends[0] + round(share * (ends[1] - ends[0]))
    )
    mix, sizes = shares_of(profile, plan), profile.weight_bytes
    assert (mix >= 0).all()
    np.testing.assert_allclose(mix.sum(axis=1), 1)
    assert ((mix > 0).sum(axis=1) <= 2).all()
    expected = np.clip(plan.layer_bytes, sizes.min(axis=1), sizes.max(axis=1))
    np.testing.assert_allclose((mix * sizes).sum(axis=1), expected, rtol=1e-12)


def test_a_mix_is_made_of_the_next_smaller_and_the_next_larger_fidelity() -> None:
    profile = make_profile(0, menu=8)
    between = (profile.fidelities[4].ratio + profile.fidelities[5].ratio) / 2
    mix = shares_of(profile, Plan.uniform(profile.layers, Fidelity(2, 4, between, GROUP)))
    assert (mix[:, [0, 1, 2, 3, 6, 7]] == 0).all()
    assert (mix[:, [4, 5]] > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_menu_of_one_fidelity_is_all_that_a_mix_can_be(bits: int) -> None:
    profile = make_profile(0, menu=1)
    assert (
        shares_of(profile, Plan.uniform(profile.layers, Fidelity.uniform(bits, GROUP))) == 1
    ).all()
