"""The uniform plan gives every layer the same share, and wastes at most one step of one layer."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import BudgetInfeasible
from allocator.menu import uniform_bytes
from allocator.uniform import uniform_plan
from quantizer.fidelity import COLUMN_STEP, Fidelity
from quantizer.plan import LayerSpec, Plan
from tests.test_allocator.synthetic import GROUP, PROPERTY

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
        LayerSpec(f"layers.{block}.{kind}", block, kind, *shape) for block in range(blocks) for kind, shape in shapes.items()
    )


LAYERS = decoder(4, 192, 512)


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
    """Return the most bytes that `COLUMN_STEP` more high columns cost in any layer."""
    largest = 0
    for layer in layers:
        counts = range(COLUMN_STEP, layer.in_features, COLUMN_STEP)
        splits = [Fidelity(*widths, count / layer.in_features, GROUP) for count in counts]
        options = [Fidelity.uniform(widths[0], GROUP), *splits, Fidelity.uniform(widths[1], GROUP)]
        sizes = [option.weight_bytes(layer.out_features, layer.in_features) for option in options]
        largest = max(largest, *(after - before for before, after in pairwise(sizes)))
    return largest


@PROPERTY
@given(widths=WIDTHS, share=SHARES)
def test_budget_is_never_exceeded(widths: tuple[int, int], share: float) -> None:
    budget = between(LAYERS, widths, share)
    assert uniform_plan(LAYERS, *widths, GROUP, budget).weight_bytes <= budget


@PROPERTY
@given(
    layers=st.builds(decoder, st.integers(1, 4), st.sampled_from([64, 192, 256]), st.sampled_from([160, 384, 512])),
    widths=WIDTHS,
    share=SHARES,
)
def test_at_most_one_step_of_one_layer_is_left_unused(layers: tuple[LayerSpec, ...], widths: tuple[int, int], share: float) -> None:
    budget = between(layers, widths, share)
    plan = uniform_plan(layers, *widths, GROUP, budget)
    assert budget - plan.weight_bytes <= largest_step(layers, widths)


@pytest.mark.parametrize(("blocks", "hidden", "inner", "share"), [(8, 576, 1536, 108 / 149), (4, 80, 160, 0.95)])
def test_layers_never_take_a_step_together(blocks: int, hidden: int, inner: int, share: float) -> None:
    layers = decoder(blocks, hidden, inner)
    budget = between(layers, (2, 4), share)
    plan = uniform_plan(layers, 2, 4, GROUP, budget)
    assert budget - plan.weight_bytes <= largest_step(layers, (2, 4))


@PROPERTY
@given(widths=WIDTHS, share=SHARES)
def test_all_layers_have_nearly_the_same_share(widths: tuple[int, int], share: float) -> None:
    plan = uniform_plan(LAYERS, *widths, GROUP, between(LAYERS, widths, share))
    shares = [high_share(layer, fidelity, widths) for layer, fidelity in zip(plan.layers, plan.fidelities, strict=True)]
    steps = [COLUMN_STEP / layer.in_features for layer in LAYERS]
    assert max(s - step for s, step in zip(shares, steps, strict=True)) <= min(
        s + step for s, step in zip(shares, steps, strict=True)
    )


@PROPERTY
@given(widths=WIDTHS, share=SHARES)
def test_only_the_two_widths_are_used(widths: tuple[int, int], share: float) -> None:
    plan = uniform_plan(LAYERS, *widths, GROUP, between(LAYERS, widths, share))
    used = {(fidelity.bits_lo, fidelity.bits_hi) for fidelity in plan.fidelities}
    assert used <= {widths, (widths[0], widths[0]), (widths[1], widths[1])}


@PROPERTY
@given(first=SHARES, second=SHARES)
def test_more_bytes_never_give_a_smaller_plan(first: float, second: float) -> None:
    less, more = (between(LAYERS, (2, 4), share) for share in sorted((first, second)))
    assert uniform_plan(LAYERS, 2, 4, GROUP, less).weight_bytes <= uniform_plan(LAYERS, 2, 4, GROUP, more).weight_bytes


def test_the_smallest_budget_gives_every_layer_the_low_width() -> None:
    low, _ = ends(LAYERS, (2, 4))
    assert uniform_plan(LAYERS, 2, 4, GROUP, low) == Plan.uniform(LAYERS, Fidelity.uniform(2, GROUP))


@pytest.mark.parametrize("surplus", [0, 1, 10**9])
def test_a_budget_of_the_largest_plan_or_more_gives_every_layer_the_high_width(surplus: int) -> None:
    _, high = ends(LAYERS, (2, 4))
    assert uniform_plan(LAYERS, 2, 4, GROUP, high + surplus) == Plan.uniform(LAYERS, Fidelity.uniform(4, GROUP))


def test_a_budget_below_the_low_width_is_refused_with_the_least_that_would_do() -> None:
    low, _ = ends(LAYERS, (3, 4))
    with pytest.raises(BudgetInfeasible, match=f"{low - 1} bytes is below {low} bytes"):
        uniform_plan(LAYERS, 3, 4, GROUP, low - 1)
