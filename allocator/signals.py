"""The signals: ways to measure what each layer costs at each fidelity.

A signal turns a model that is quantized near the budget into a model of the loss
(`allocator.profile`). This module says what is known of each signal without measuring anything.
`allocator.profiling.measures` has the function that measures it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from allocator.errors import SignalUnknown

UNIFORM = "uniform"
"""Context in which every layer is quantized at the same fidelity."""
ORIGINAL = "original"
"""Context in which no layer is quantized."""

INTEGRAL_NODES = 2
"""Gauss-Legendre nodes on the path of `integral`.

With 32 nodes, no share of SmolLM2 changes by more than 0.0016 nats/token: tests/benchmarks/LOG.md,
"shares of the damage instead of effects".
"""
NOISE_LEVELS = (0.05, 0.1, 0.2)
"""Relative sizes of the noise of `noise`. The source uses 15 levels; the fit has one parameter."""
SKETCH_WIDTH = 16
"""Numbers per token in a sketch of an output change (`output`, `noise`).

A larger width changes the coupling by less than other probe windows do.
"""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the bytes of a plan may be from those of the context for its loss to be predicted.

    Attributes:
        below: how much smaller a plan may be, as a share of the context's bytes.
        above: how much larger.
        prefers_smaller_context: whether the context is the smallest one whose reach covers the
            budget. Otherwise it is the one nearest to the budget.
    """

    below: float
    above: float
    prefers_smaller_context: bool = False

    @property
    def largest_plan(self) -> float | None:
        """Largest plan as a multiple of the context's bytes, or None to take the nearest context.

        This is the argument `reach` of `allocator.demands.menu.choose_menu`.
        """
        return 1 + self.above if self.prefers_smaller_context else None


NARROW = Reach(0.12, 0.12)
"""Reach of a signal that measures single changes of the context."""


@dataclass(frozen=True, slots=True)
class SignalCost:
    """Work and memory that measuring takes.

    A product is one multiplication of a probe token's states with weights: two floating-point
    operations for each weight. A backward pass counts as two forward passes.

    Attributes:
        layer_products: products with all layers, per probe token.
        products_per_layer: further products with all layers, per probe token and layer of the
            model; not 0 for a signal that runs the model again for each layer.
        other_products: products with all other weights (embedding, output head), per probe token.
        all_probes_at_once: whether the states and logits of all probe windows are held in memory,
            instead of those of one batch.
    """

    layer_products: float
    products_per_layer: float
    other_products: float
    all_probes_at_once: bool

    def products(self, layers: int) -> tuple[float, float]:
        """Return products per probe token of a model: (with all layers, with all other weights)."""
        return self.layer_products + self.products_per_layer * layers, self.other_products


@dataclass(frozen=True, slots=True)
class Signal:
    """One way to measure, as far as it is known without a model.

    Attributes:
        name: as users write it and as profiles store it.
        summary: what it measures, in one sentence.
        probe_windows: token windows that it is measured on by default.
        probe_tokens: tokens of each of these windows.
        reach: for which plans its profiles predict the loss.
        contexts: contexts in which it can be measured, of `UNIFORM` and `ORIGINAL`; its default
            first.
        coupled: whether its loss model has products between layers; otherwise damages add up.
        cost: work and memory of a measurement.
    """

    name: str
    summary: str
    probe_windows: int
    probe_tokens: int
    reach: Reach
    contexts: tuple[str, ...]
    coupled: bool
    cost: SignalCost

    def in_original(self, *, requested: bool) -> bool:
        """Return whether it is measured in the original model.

        Args:
            requested: whether the user asks for the original model as the context.
        """
        return requested or self.contexts == (ORIGINAL,)


_PER_CHANGE = 0.5
"""Products with all layers to run one changed layer's model.

Blocks before the changed layer are not run: half of them on average.
"""

INTEGRAL = Signal(
    "integral",
    "Each layer's share of the KL divergence of the context, by integrating its gradient along "
    "the path from the original to the quantized weights.",
    probe_windows=16,
    probe_tokens=512,
    reach=Reach(0.15, 0.45, prefers_smaller_context=True),
    contexts=(UNIFORM,),
    coupled=False,
    cost=SignalCost(3 * INTEGRAL_NODES + 1, 0, 4 * INTEGRAL_NODES + 2, all_probes_at_once=False),
)

OUTPUT = Signal(
    "output",
    "Change of the model's output when one layer at a time takes an end of the menu, and the "
    "coupling of these changes.",
    probe_windows=8,
    probe_tokens=128,
    reach=NARROW,
    contexts=(UNIFORM, ORIGINAL),
    coupled=True,
    cost=SignalCost(0, 2 * _PER_CHANGE, SKETCH_WIDTH + 3, all_probes_at_once=True),
)

GRADIENT = Signal(
    "gradient",
    "Inner products of the loss gradient of each probe window with the changes of the weights.",
    probe_windows=32,
    probe_tokens=128,
    reach=NARROW,
    contexts=(UNIFORM,),
    coupled=True,
    cost=SignalCost(5, 0, 6, all_probes_at_once=False),
)

NOISE = Signal(
    "noise",
    "KL divergence that relative Gaussian noise in one layer of the original model causes.",
    probe_windows=8,
    probe_tokens=128,
    reach=NARROW,
    contexts=(ORIGINAL,),
    coupled=False,
    cost=SignalCost(0, len(NOISE_LEVELS) * _PER_CHANGE, SKETCH_WIDTH + 3, all_probes_at_once=True),
)

HESSIAN = Signal(
    "hessian",
    "Mean squared error of each layer's own output, the objective of GPTQ.",
    probe_windows=8,
    probe_tokens=512,
    reach=NARROW,
    contexts=(UNIFORM,),
    coupled=False,
    cost=SignalCost(1, 0, 2, all_probes_at_once=False),
)

DEFAULT_SIGNAL = INTEGRAL
"""The signal that is measured unless the user chooses another.

Compared in tests/benchmarks/LOG.md, "signals compared, plans quantized in full".
"""

SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {signal.name: signal for signal in (INTEGRAL, OUTPUT, GRADIENT, NOISE, HESSIAN)}
)
"""All signals by name, the default first."""


def find_signal(name: str) -> Signal:
    """Return the signal called `name`.

    Raises:
        SignalUnknown: there is none.
    """
    if name not in SIGNALS:
        raise SignalUnknown(f"signal {name!r} does not exist; use one of {', '.join(SIGNALS)}")
    return SIGNALS[name]


def reach_of(name: str) -> Reach:
    """Return the reach of a profile's signal, `NARROW` for one that this version does not know."""
    return SIGNALS[name].reach if name in SIGNALS else NARROW
