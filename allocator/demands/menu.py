"""The fidelities that a budget may be spent on, and the uniform plan that they are measured in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

from allocator.errors import BudgetInfeasible, BudgetNotNeeded
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan


@dataclass(frozen=True, slots=True)
class Menu:
    """The fidelities (ways to store a layer) that every layer may have.

    Attributes:
        fidelities: combinations of code widths, high-impact share and group size, in order of
            rising bits per weight.
        context: index of the fidelity that all other layers have while one layer is measured.
    """

    fidelities: tuple[Fidelity, ...]
    context: int


@dataclass(frozen=True, slots=True)
class _MenuRange:
    """The fidelities for a range of budgets.

    Attributes:
        contexts: uniform plans around which a profile of them may be measured, smallest first.
        fidelities: in order of rising bits per weight.
    """

    contexts: tuple[Fidelity, ...]
    fidelities: tuple[Fidelity, ...]


def _range(contexts: Sequence[str], fidelities: Sequence[str]) -> _MenuRange:
    return _MenuRange(
        tuple(Fidelity.parse(name) for name in contexts),
        tuple(Fidelity.parse(name) for name in fidelities),
    )


LOWEST = _range(
    contexts=("int2+3r0.0625g128s6",),
    fidelities=(
        "int2g128s6",
        "int2+3r0.0625g128s6",
        "int2+3r0.125g64s6",
        "int2+4r0.0625g64s6",
        "int2+3r0.25g64s6",
        "int2+3r0.5g64s6",
    ),
)
"""For budgets that nothing else fits: two bits without high-impact columns lose very much."""

COMMON = _range(
    contexts=("int2+3r0.375g64s6", "int3+4r0.25g64s6"),
    fidelities=(
        "int2+3r0.0625g128s6",
        "int2+3r0.125g64s6",
        "int2+4r0.0625g64s6",
        "int2+3r0.25g64s6",
        "int2+3r0.375g64s6",
        "int2+3r0.5g64s6",
        "int2+3r0.75g64s6",
        "int3g64s6",
        "int3+4r0.125g64s6",
        "int3+4r0.25g64s6",
        "int3+4r0.5g64s6",
        "int4g64s6",
        "int4+8r0.125g64s6",
    ),
)
"""For common budgets, up to 4 bits for all layers."""

HIGHEST = _range(
    contexts=("int4+8r0.125g64s6", "int4+8r0.5g64s6"),
    fidelities=(
        "int3g64s6",
        "int3+4r0.25g64s6",
        "int4g64s6",
        "int4+8r0.0625g64s6",
        "int4+8r0.125g64s6",
        "int4+8r0.25g64s6",
        "int4+8r0.5g64s6",
        "int4+8r0.75g64s6",
        "int8g64s6",
    ),
)
"""For high budgets, up to 8 bits."""

RANGES = (LOWEST, COMMON, HIGHEST)
"""All menus; tests/benchmarks/LOG.md lists what was compared."""

LOWEST_SPAN = 1.03
"""The lowest range serves budgets up to this multiple of the smallest plan of the common range."""


def choose_menu(
    layers: Sequence[LayerSpec],
    budget_bytes: int,
    group_size: int | None = None,
    reach: float | None = None,
) -> Menu:
    """Return the menu for a budget.

    All budgets of a wide range share one menu, and so one profile. The common range serves budgets
    from `LOWEST_SPAN` times its smallest uniform plan up to 4 bits for all layers. The context is
    the smallest one that reaches the budget or, if none does or `reach` is None, the nearest one
    by the ratio of their bytes.

    Args:
        layers: the layers of the model.
        budget_bytes: bytes of the quantized layers.
        group_size: columns that share a scale, for all fidelities; None keeps that of each.
        reach: how many times the size of its context a plan may have.

    Raises:
        BudgetInfeasible: the budget is below the smallest plan of the lowest range.
    """
    lowest = _regrouped(LOWEST, group_size)
    common = _regrouped(COMMON, group_size)
    highest = _regrouped(HIGHEST, group_size)
    smallest = uniform_bytes(layers, lowest.fidelities[0])
    if budget_bytes < smallest:
        largest = uniform_bytes(layers, highest.fidelities[-1])
        raise budget_infeasible(layers, budget_bytes, (smallest, largest), ("menu",))
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
    context = reaching[0] if reaching else min(chosen.contexts, key=distance)
    return Menu(chosen.fidelities, chosen.fidelities.index(context))


def _regrouped(span: _MenuRange, group_size: int | None) -> _MenuRange:
    """Return the range with one group size for all its fidelities, each of them once."""
    if group_size is None:
        return span
    contexts, fidelities = (
        tuple(dict.fromkeys(replace(fidelity, group_size=group_size) for fidelity in several))
        for several in (span.contexts, span.fidelities)
    )
    return _MenuRange(contexts, fidelities)


def check_budget(layers: Sequence[LayerSpec], budget_bytes: int, original_bytes: int) -> None:
    """Refuse a budget that the layers fit without quantization.

    Raises:
        BudgetNotNeeded: the budget is at least `original_bytes`.
    """
    if budget_bytes >= original_bytes:
        raise BudgetNotNeeded(
            f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.2f} bpw) holds the layers "
            f"without quantization ({original_bytes} bytes): use the original model; nothing was "
            "stored"
        )


def budget_infeasible(
    layers: Sequence[LayerSpec],
    budget_bytes: int,
    feasible_bytes: tuple[int, int],
    binding: tuple[str, ...],
) -> BudgetInfeasible:
    """Return the error for a budget below the smallest plan.

    Args:
        layers: the layers of the model.
        budget_bytes: what was asked for.
        feasible_bytes: sizes of the smallest and of the largest plan.
        binding: what keeps plans from being smaller, see `BudgetInfeasible`.
    """
    smallest, largest = feasible_bytes
    return BudgetInfeasible(
        f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.3f} bpw) is below the smallest "
        f"plan; feasible are {smallest} to {largest} bytes ({bpw(layers, smallest):.3f} to "
        f"{bpw(layers, largest):.3f} bpw); what binds: {', '.join(binding)}",
        budget_bytes=budget_bytes,
        nearest_bytes=smallest,
        largest_bytes=largest,
        binding=binding,
    )


def uniform_bytes(layers: Sequence[LayerSpec], fidelity: Fidelity) -> int:
    """Return the bytes of the plan that stores every layer at `fidelity`."""
    return Plan.uniform(layers, fidelity).weight_bytes


def bpw(layers: Sequence[LayerSpec], size_bytes: int) -> float:
    """Return a size in bytes as bits per weight of the layers."""
    return 8 * size_bytes / sum(layer.weights for layer in layers)
