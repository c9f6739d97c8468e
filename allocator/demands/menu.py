"""Which fidelities a budget is spent on, and which uniform context a profile is measured in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

from allocator.errors import BudgetInfeasible, BudgetNotNeeded
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan


@dataclass(frozen=True, slots=True)
class Menu:
    """The fidelities that every layer may choose from, smallest first.

    Attributes:
        fidelities: ratios, code widths and group sizes together, by rising bits per weight.
        context: index of the fidelity that all layers have while one layer is measured.
    """

    fidelities: tuple[Fidelity, ...]
    context: int


@dataclass(frozen=True, slots=True)
class _Range:
    """Fidelities for a range of budgets, and the contexts that a profile of them may be measured in, the smaller first."""

    contexts: tuple[Fidelity, ...]
    fidelities: tuple[Fidelity, ...]


def _range(contexts: tuple[str, ...], *names: str) -> _Range:
    return _Range(
        tuple(Fidelity.parse(name) for name in contexts),
        tuple(Fidelity.parse(name) for name in names),
    )


RANGES = (
    _range(
        ("int2+3r0.0625g128s6",),
        *(
            "int2g128s6",
            "int2+3r0.0625g128s6",
            "int2+3r0.125g64s6",
            "int2+4r0.0625g64s6",
            "int2+3r0.25g64s6",
            "int2+3r0.5g64s6",
        ),
    ),
    _range(
        ("int2+3r0.375g64s6", "int3+4r0.25g64s6"),
        *(
            "int2+3r0.0625g128s6",
            "int2+3r0.125g64s6",
            "int2+4r0.0625g64s6",
            "int2+3r0.25g64s6",
            "int2+3r0.375g64s6",
        ),
        *(
            "int2+3r0.5g64s6",
            "int2+3r0.75g64s6",
            "int3g64s6",
            "int3+4r0.125g64s6",
            "int3+4r0.25g64s6",
            "int3+4r0.5g64s6",
        ),
        *("int4g64s6", "int4+8r0.125g64s6"),
    ),
    _range(
        ("int4+8r0.125g64s6", "int4+8r0.5g64s6"),
        *(
            "int3g64s6",
            "int3+4r0.25g64s6",
            "int4g64s6",
            "int4+8r0.0625g64s6",
            "int4+8r0.125g64s6",
            "int4+8r0.25g64s6",
        ),
        *("int4+8r0.5g64s6", "int4+8r0.75g64s6", "int8g64s6"),
    ),
)
"""For the lowest, for common, and for high budgets.

Two bits without a high-impact part cost so much that only budgets that nothing
else fits use them; tests/benchmarks/LOG.md has what was compared."""

LOWEST_SPAN = 1.03
"""The lowest range serves budgets up to this many times the smallest plan of the common range."""


def choose_menu(
    layers: Sequence[LayerSpec],
    budget_bytes: int,
    group_size: int | None = None,
    reach: float | None = None,
) -> Menu:
    """Return the menu for a budget. All budgets of a wide range share one menu, and so one profile.

    The common range serves budgets from `LOWEST_SPAN` times its smallest uniform plan up to 4 bits
    for all layers. The context is the smallest one that reaches the budget or, if none does or
    `reach` is None, the nearest one by the quotient of their bytes.

    Args:
        layers: the layers of the model.
        budget_bytes: bytes of the quantized layers.
        group_size: columns that share a scale, for all fidelities; None leaves each its own.
        reach: how many times as large as its context a plan may be.

    Raises:
        BudgetInfeasible: the budget is below the smallest plan of the lowest range.
    """
    lowest, common, highest = (_regrouped(span, group_size) for span in RANGES)
    smallest = uniform_bytes(layers, lowest.fidelities[0])
    if budget_bytes < smallest:
        raise infeasible(
            layers, budget_bytes, smallest, uniform_bytes(layers, highest.fidelities[-1])
        )
    chosen = common if budget_bytes < uniform_bytes(layers, common.fidelities[-2]) else highest
    if budget_bytes < LOWEST_SPAN * uniform_bytes(layers, common.fidelities[0]):
        chosen = lowest

    def distance(context: Fidelity) -> float:
        return abs(log(uniform_bytes(layers, context) / budget_bytes))

    reaching = [
        context
        for context in chosen.contexts
        if reach and reach * uniform_bytes(layers, context) >= budget_bytes
    ]
    return Menu(
        chosen.fidelities,
        chosen.fidelities.index(reaching[0] if reaching else min(chosen.contexts, key=distance)),
    )


def _regrouped(span: _Range, group_size: int | None) -> _Range:
    """Return the range with one group size for all its fidelities, each of them once."""
    if group_size is None:
        return span
    contexts, fidelities = (
        tuple(dict.fromkeys(replace(fidelity, group_size=group_size) for fidelity in several))
        for several in (span.contexts, span.fidelities)
    )
    return _Range(contexts, fidelities)


def check_budget(layers: Sequence[LayerSpec], budget_bytes: int, original_bytes: int) -> None:
    """Refuse a budget that the layers fit without quantization.

    Raises:
        BudgetNotNeeded: the budget is at least `original_bytes`.
    """
    if budget_bytes >= original_bytes:
        raise BudgetNotNeeded(
            f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.2f} bpw) holds the layers "
            "as they are "
            f"({original_bytes} bytes): use the original model, nothing was stored"
        )


def infeasible(
    layers: Sequence[LayerSpec], budget_bytes: int, smallest: int, largest: int
) -> BudgetInfeasible:
    """Return the error for a budget outside smallest .. largest bytes."""
    return BudgetInfeasible(
        f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.3f} bpw) is below the smallest "
        "plan; feasible are "
        f"{smallest} to {largest} bytes ({bpw(layers, smallest):.3f} to "
        f"{bpw(layers, largest):.3f} bpw)",
        budget_bytes=budget_bytes,
        nearest_bytes=smallest,
        largest_bytes=largest,
        binding=("menu",),
    )


def uniform_bytes(layers: Sequence[LayerSpec], fidelity: Fidelity) -> int:
    """Return the bytes of the plan that stores every layer at `fidelity`."""
    return Plan.uniform(layers, fidelity).weight_bytes


def bpw(layers: Sequence[LayerSpec], size_bytes: int) -> float:
    """Return bytes as bits per weight of the layers."""
    return 8 * size_bytes / sum(layer.weights for layer in layers)
