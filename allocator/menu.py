"""Which fidelities a budget is spent on, and which uniform context a profile is measured in."""

from collections.abc import Sequence
from dataclasses import dataclass

from allocator.errors import BudgetInfeasible, BudgetNotNeeded
from quantizer.fidelity import Fidelity
from quantizer.plan import LayerSpec, Plan

RATIOS = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
"""Shares of high-impact columns on a menu, between none and all."""

CONTEXT_RATIOS = (0.0625, 0.125, 0.25, 0.5)
"""Shares at which a uniform plan may serve as the context of a profile."""

WIDTHS = ((2, 4), (3, 4), (4, 8))
"""Pairs of code widths, each serving budgets up to the middle of what the next pair can use."""


@dataclass(frozen=True, slots=True)
class Menu:
    """The fidelities that every layer may choose from, smallest first.

    Attributes:
        fidelities: uniform at `bits_lo`, splits at rising ratios, uniform at `bits_hi`.
        context: index of the fidelity that all layers have while one layer is measured.
    """

    fidelities: tuple[Fidelity, ...]
    context: int


def make_menu(bits_lo: int, bits_hi: int, group_size: int, context_ratio: float) -> Menu:
    """Return the menu of one pair of code widths with the context at `context_ratio`, one of `CONTEXT_RATIOS`."""
    splits = tuple(Fidelity(bits_lo, bits_hi, ratio, group_size) for ratio in RATIOS)
    ends = Fidelity.uniform(bits_lo, group_size), Fidelity.uniform(bits_hi, group_size)
    return Menu((ends[0], *splits, ends[1]), 1 + RATIOS.index(context_ratio))


def choose_menu(layers: Sequence[LayerSpec], budget_bytes: int, group_size: int) -> Menu:
    """Return the menu for a budget: the lowest pair of widths that can use it well, and the context nearest to it.

    A pair is left for the next one when the budget would put more than 5/8 of its columns at the high width, and the next pair's
    smallest plan fits. So all budgets of a neighbourhood share one menu, and one profile.

    Raises:
        BudgetInfeasible: the budget is below the smallest plan of the lowest pair.
    """
    pair = WIDTHS[0]
    for following in WIDTHS[1:]:
        low, high = (uniform_bytes(layers, Fidelity.uniform(bits, group_size)) for bits in pair)
        next_low = uniform_bytes(layers, Fidelity.uniform(following[0], group_size))
        if budget_bytes < max(low + 5 * (high - low) // 8, next_low):
            break
        pair = following
    smallest = uniform_bytes(layers, Fidelity.uniform(WIDTHS[0][0], group_size))
    if budget_bytes < smallest:
        raise infeasible(layers, budget_bytes, smallest, uniform_bytes(layers, Fidelity.uniform(WIDTHS[-1][1], group_size)))

    def distance(ratio: float) -> int:
        return abs(uniform_bytes(layers, Fidelity(*pair, ratio, group_size)) - budget_bytes)

    return make_menu(*pair, group_size, min(CONTEXT_RATIOS, key=distance))


def check_budget(layers: Sequence[LayerSpec], budget_bytes: int, original_bytes: int) -> None:
    """Refuse a budget that the layers fit without quantization.

    Raises:
        BudgetNotNeeded: the budget is at least `original_bytes`.
    """
    if budget_bytes >= original_bytes:
        raise BudgetNotNeeded(
            f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.2f} bpw) holds the layers as they are "
            f"({original_bytes} bytes): use the original model, nothing was stored"
        )


def infeasible(layers: Sequence[LayerSpec], budget_bytes: int, smallest: int, largest: int) -> BudgetInfeasible:
    """Return the error for a budget outside smallest .. largest bytes."""
    return BudgetInfeasible(
        f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.3f} bpw) is below the smallest plan; feasible are "
        f"{smallest} to {largest} bytes ({bpw(layers, smallest):.3f} to {bpw(layers, largest):.3f} bpw)"
    )


def uniform_bytes(layers: Sequence[LayerSpec], fidelity: Fidelity) -> int:
    """Return the bytes of the plan that stores every layer at `fidelity`."""
    return Plan.uniform(layers, fidelity).weight_bytes


def bpw(layers: Sequence[LayerSpec], size_bytes: int) -> float:
    """Return bytes as bits per weight of the layers."""
    return 8 * size_bytes / sum(layer.weights for layer in layers)
