"""The constraints of a plan, and the questions that a stored profile answers.

Defined once for the command line and for the REST interface.
"""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from allocator.demands.budget import BUDGET_OF
from allocator.demands.constraints import Constraints, LatencyTable, Pool
from allocator.demands.rules import Rule
from allocator.demands.ties import TARGETS
from allocator.profile import COUPLINGS
from service.validation import Checked, invalid, option

Pattern = Annotated[str, Field(max_length=300)]
Text = Annotated[str, Field(max_length=600)]

if TYPE_CHECKING:
    Coupling = str
    Target = str
    Counted = str
else:  # the names of a table are a type to pydantic, and not to type checkers
    Coupling = Literal[COUPLINGS]
    Target = Literal[TARGETS]
    Counted = Literal[BUDGET_OF]

Size = Annotated[
    str,
    option(values="2.5bpw, 1.2GiB, 900MB or 123456B", example="2.5bpw", max_length=40),
]
"""A budget, as `allocator.demands.budget.Budget.parse` reads it."""

CONSTRAINTS = "What the plan must respect beside the budget."
BUDGET = (
    "Size of the quantized model: bytes of the whole checkpoint (K, M, G are decimal, KiB, MiB, "
    "GiB "
    "binary), or bits per weight (bpw) of the quantized layers."
)

BudgetOf = Annotated[
    Counted | None,
    option(
        "What the budget counts: all weight files of the checkpoint, or its quantized layers only; "
        "by default the checkpoint for bytes, and the layers for bits per weight."
    ),
]
"""See `allocator.demands.budget.budget_of`."""


class LatencyRow(Checked):
    """Time of the layers that a pattern names, at one fidelity."""

    layer: Annotated[Pattern, option("Shell-style pattern of layer names.", example="*.q_proj")]
    fidelity: Annotated[str, option("Name of a fidelity.", example="int4g64s6", max_length=40)]
    latency_us: Annotated[float, option("Time of one layer.", unit="microseconds", ge=0)]


class PlanConstraints(Checked):
    """Constraints that are the same on the command line and over REST."""

    target: Annotated[
        Target,
        option(
            "Engine that will serve the model; layers that it fuses get the same fidelity.",
            example="vllm",
        ),
    ] = "transformers"
    ties: Annotated[
        list[Text],
        option(
            "Layers that must have the same fidelity within each block: patterns, separated by "
            "commas. May be given several times.",
            example=["*.q_proj,*.o_proj"],
            max_length=64,
        ),
    ] = []
    untied: Annotated[
        list[Pattern],
        option(
            "Layers that choose their fidelity alone although the target fuses them. May be given "
            "several times.",
            example=["*.k_proj"],
            max_length=64,
        ),
    ] = []
    rules: Annotated[
        list[Text],
        option(
            "Constraint on the layers that a pattern names: PATTERN=FIDELITY, PATTERN!=FIDELITY, "
            "or PATTERN>=BITS and PATTERN<=BITS for the average code width. Of several rules the "
            "last one wins.",
            example=["*.down_proj>=3"],
            max_length=512,
        ),
    ] = []
    pools: Annotated[
        list[Text],
        option(
            "Memory with its own limit, such as one of several devices: NAME:PATTERN=SIZE. May be "
            "given several times.",
            example=["gpu0:model.layers.[0-9].*=40MB"],
            max_length=64,
        ),
    ] = []
    max_latency_us: Annotated[
        float | None,
        option(
            "Largest sum of the latencies of all layers; needs a table of latencies.",
            unit="microseconds",
            example=900,
            gt=0,
        ),
    ] = None
    max_distinct: Annotated[
        int | None,
        option("Largest number of distinct fidelities in the plan.", example=4, ge=1, le=64),
    ] = None

    def constraints(self, table: LatencyTable | None = None) -> Constraints:
        """Return the constraints, with a table of latencies.

        Raises:
            RuleError, BudgetError: a text cannot be understood, or fields do not go together.
        """
        return Constraints(
            target=self.target,
            ties=tuple(self.ties),
            untied=tuple(self.untied),
            rules=tuple(Rule.parse(text) for text in self.rules),
            pools=tuple(Pool.parse(text) for text in self.pools),
            latency=table,
            most_latency_us=self.max_latency_us,
            most_distinct=self.max_distinct,
        )


class ConstraintsIn(PlanConstraints):
    """All constraints of a plan, as they go over the wire."""

    latency: Annotated[
        list[LatencyRow],
        option(
            "Measured latencies of layers; of several rows the last one counts.", max_length=20_000
        ),
    ] = []

    def constraints(self, table: LatencyTable | None = None) -> Constraints:
        """Return the constraints, with the latencies of `latency` unless a table is given.

        Raises:
            RuleError, BudgetError: a text cannot be understood, or fields do not go together.
        """
        rows = tuple((row.layer, row.fidelity, row.latency_us) for row in self.latency)
        return super().constraints(table or (LatencyTable(rows) if rows else None))


class CouplingOption(Checked):
    """Which part of the loss model a plan is chosen by."""

    coupling: Annotated[
        Coupling,
        option(
            "Pairs of layers whose joint damage the loss model counts: full (all pairs), block "
            "(pairs within a block) or none."
        ),
    ] = "full"


class PlanQuestion(Checked):
    """What a plan is asked for."""

    budget: Annotated[Size | None, option(BUDGET)] = None
    budget_of: BudgetOf = None
    max_kl: Annotated[
        float | None,
        option(
            "Largest predicted KL divergence, instead of a budget; the smallest plan within it is "
            "chosen.",
            unit="nats per token",
            example=0.7,
        ),
    ] = None


class ExactQuestion(PlanQuestion):
    """A budget or a KL divergence, and not both."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.budget is None) == (self.max_kl is None):
            raise invalid("give either budget or max kl")
        return self


class FrontierQuestion(Checked):
    """Between which budgets plans are compared."""

    points: Annotated[int, option("Number of budgets, evenly spaced in bytes.", ge=2, le=1000)] = (
        100
    )
    low: Annotated[
        Size | None,
        option("Smallest budget; by default the smallest that the profile is valid for."),
    ] = None
    high: Annotated[
        Size | None, option("Largest budget; by default the largest that the profile is valid for.")
    ] = None
    budget_of: BudgetOf = None
