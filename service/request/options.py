"""The options of a job as they go over the wire."""

from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from allocator.demands.constraints import Constraints, LatencyTable, Pool
from allocator.demands.rules import Rule
from allocator.signals import DEFAULT
from service.request.request import RunRequest, make_request

Pattern = Annotated[str, Field(max_length=300)]

Text = Annotated[str, Field(max_length=600)]


Name = Annotated[str, Field(max_length=1000)]

Count = Annotated[int, Field(ge=0, le=1_000_000)]


class Strict(BaseModel):
    """A body whose fields are all known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LatencyRow(Strict):
    """Time of the layers that a pattern names, at one fidelity."""

    layer: Pattern
    fidelity: Annotated[str, Field(max_length=40)]
    latency_us: Annotated[float, Field(ge=0)]


class ConstraintsIn(Strict):
    """Demands on a plan, as the command line takes them."""

    target: Annotated[str, Field(max_length=40, examples=["vllm"])] = "transformers"
    ties: Annotated[list[Text], Field(max_length=64)] = []
    untied: Annotated[list[Pattern], Field(max_length=64)] = []
    rules: Annotated[
        list[Text],
        Field(max_length=512, examples=[["*.down_proj>=3", "model.layers.0.*=int4g64s6"]]),
    ] = []
    pools: Annotated[
        list[Text], Field(max_length=64, examples=[["gpu0:model.layers.[0-9].*=12MB"]])
    ] = []
    latency: Annotated[list[LatencyRow], Field(max_length=20_000)] = []
    max_latency_us: Annotated[float, Field(gt=0)] | None = None
    max_distinct: Annotated[int, Field(ge=1, le=64)] | None = None

    def constraints(self) -> Constraints:
        """Return the constraints.

        Raises:
            RuleError, BudgetError: a text cannot be understood, or fields do not go together.
        """
        rows = tuple((row.layer, row.fidelity, row.latency_us) for row in self.latency)
        return Constraints(
            target=self.target,
            ties=tuple(self.ties),
            untied=tuple(self.untied),
            rules=tuple(Rule.parse(text) for text in self.rules),
            pools=tuple(Pool.parse(text) for text in self.pools),
            latency=LatencyTable(rows) if rows else None,
            most_latency_us=self.max_latency_us,
            most_distinct=self.max_distinct,
        )


class JobOptions(Strict):
    """What a job does: the options of `bitwright run`, by the same names and with the same defaults."""

    model: Annotated[
        str,
        Field(
            max_length=1000, min_length=1, examples=["demo/model/SmolLM2-135M-Instruct.Q4_1.gguf"]
        ),
    ]
    budget: Annotated[str, Field(max_length=40, examples=["2.5bpw"])]
    whole_file: bool = False
    embeddings: Annotated[str, Field(max_length=40)] = "auto"
    calibration: Name = "builtin:calibration"
    evaluation: Name = "builtin:evaluation"
    calibration_windows: Count = 8
    evaluation_windows: Count = 16
    tokens: Count = 512
    probe_windows: Count | None = None
    probe_tokens: Count | None = None
    check_plans: Count = 0
    guard_windows: Count = 8
    group_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    signal: Annotated[str, Field(max_length=40)] = DEFAULT.name
    coupling: Annotated[str, Field(max_length=40)] = "full"
    context: Annotated[str, Field(max_length=40)] = "uniform"
    effort: Annotated[str, Field(max_length=40)] = "balanced"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Annotated[str, Field(max_length=40)] = "auto"
    constraints: ConstraintsIn = ConstraintsIn()

    def request(self, model: Callable[[str], str], text: Callable[[str], str]) -> RunRequest:
        """Return the request, with names of models and texts replaced by what `model` and `text` say.

        Raises:
            ServiceError, AllocatorError: an option is out of range, or a name is refused.
        """
        values = self.model_dump(
            exclude={"model", "budget", "calibration", "evaluation", "constraints"}
        )
        return make_request(
            model(self.model),
            self.budget,
            calibration=text(self.calibration),
            evaluation=text(self.evaluation),
            constraints=self.constraints.constraints(),
            **values,
        )
