"""The options of a run: name, type, default, range and help of each, written once.

The command line, the REST body, the OpenAPI document and the tables of `service/README.md` come
from these models. A command that needs some of the options takes the groups that hold them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from allocator.demands.budget import CHECKPOINT, LAYERS, Budget, budget_of
from allocator.demands.constraints import UNCONSTRAINED, Constraints
from allocator.signals import DEFAULT_SIGNAL, ORIGINAL, SIGNALS, UNIFORM, find_signal
from quantizer.plans.fidelity import COLUMN_MULTIPLE
from quantizer.texts.text import BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION, TextSpec
from service.request.constraints import (
    BUDGET,
    CONSTRAINTS,
    BudgetOf,
    ConstraintsIn,
    CouplingOption,
    Size,
)
from service.request.effort import EffortName, find_effort
from service.request.request import (
    BATCH,
    FEWEST_CHECKS,
    Amounts,
    Embeddings,
    Method,
    RunRequest,
)
from service.validation import Checked, option

MOST = 1_000_000
"""Largest number of windows, tokens or plans that an option takes."""

Named = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=1, le=MOST)]

WHOLE_FILE = "Deprecated: true means the budget of the checkpoint, false that of the layers."
_TEXTS = "a text file, a JSONL file, or a Hugging Face data set as ID[:CONFIG[:SPLIT]]"

if TYPE_CHECKING:
    SignalName = str
    Context = str
else:  # the names of a table are a type to pydantic, and not to type checkers
    SignalName = Literal[tuple(SIGNALS)]
    Context = Literal[UNIFORM, ORIGINAL]

RecipeName = Literal["usual", "rtn", "requant", "blockwise", "sgr-q", "apiq", "signiq"]
"""Names in `service.stages.recipe.RECIPES`."""


class ModelOption(Checked):
    """The model."""

    model: Annotated[
        Named,
        option(
            "A folder, a GGUF file, or the id of a model on the Hugging Face hub, with @ and a "
            "branch, tag or commit for a certain revision.",
            values="a folder, a GGUF file, or a Hugging Face id as ORG/NAME[@REVISION]",
            example="demo/model/SmolLM2-135M-Instruct.Q4_1.gguf",
            min_length=1,
        ),
    ]


class BudgetOption(Checked):
    """The size of the quantized model."""

    budget: Annotated[Size, option(BUDGET)]


class CheckpointOptions(Checked):
    """What the budget counts."""

    budget_of: BudgetOf = None
    embeddings: Annotated[
        Embeddings,
        option(
            "Whether embedding and head are quantized too, within a budget of the whole "
            "checkpoint: "
            "auto (where nothing else fits), keep (never) or join (always)."
        ),
    ] = "auto"


class WindowOptions(Checked):
    """Windows: pieces of text of equal length."""

    tokens: Annotated[int, option("Length of a window.", unit="tokens", ge=2, le=MOST)] = 512


class CalibrationOptions(WindowOptions):
    """The text that layers are quantized on."""

    calibration: Annotated[
        Named,
        option(
            "Calibration text, on which layers are quantized and trained: a text file, a JSONL "
            "file, or a Hugging Face data set as ID[:CONFIG[:SPLIT]].",
            values=_TEXTS,
            example="calibration.txt",
        ),
    ] = BUILT_IN_CALIBRATION
    calibration_windows: Annotated[
        Count,
        option("Windows of the calibration text that layers are quantized on.", unit="windows"),
    ] = 8
    seed: Annotated[int, option("Seed of every random choice.", ge=0, lt=2**63)] = 0


class EvaluationOptions(WindowOptions):
    """The text that results are measured on."""

    evaluation: Annotated[
        Named,
        option(
            "Held-out text, on which perplexity and KL divergence are measured; given like the "
            "calibration text.",
            values=_TEXTS,
            example="held-out.txt",
        ),
    ] = BUILT_IN_EVALUATION
    evaluation_windows: Annotated[
        int,
        option(
            "Windows that are measured, from the start of the held-out text; 0 for all.",
            unit="windows",
            ge=0,
            le=MOST,
        ),
    ] = 16


class ProfileOptions(Checked):
    """How a profile is measured: what each layer costs at each fidelity."""

    probe_windows: Annotated[
        int | None,
        option(
            "Further windows of the calibration text that the effects of layers are measured on; "
            "by default as many as the signal needs.",
            unit="windows",
            ge=1,
            le=MOST,
        ),
    ] = None
    probe_tokens: Annotated[
        int | None,
        option(
            "Tokens that are used of each probe window, from its start; by default as many as the "
            "signal needs.",
            unit="tokens",
            ge=1,
            le=MOST,
        ),
    ] = None
    group_size: Annotated[
        int | None,
        option(
            "Columns that share a scale, in all fidelities; by default each fidelity has its own.",
            unit="columns",
            example=64,
            multiple_of=COLUMN_MULTIPLE,
            ge=COLUMN_MULTIPLE,
            le=65536,
        ),
    ] = None
    signal: Annotated[
        SignalName, option("Signal: how the cost of quantizing each layer is measured.")
    ] = DEFAULT_SIGNAL.name
    context: Annotated[
        Context,
        option(
            "State of the other layers while one is measured: all quantized at one fidelity "
            "(uniform), or not quantized (original; for some signals only)."
        ),
    ] = UNIFORM


class PlanOptions(CouplingOption):
    """How plans are checked."""

    check_plans: Annotated[
        int,
        option(
            "Random plans that are measured to check the predictions of the profile; 0 for none.",
            unit="plans",
            values=f"0, or a whole number from {FEWEST_CHECKS} to {MOST}",
            ge=0,
            le=MOST,
        ),
    ] = 0

    @field_validator("check_plans")
    @classmethod
    def _enough(cls, plans: int) -> int:
        if 0 < plans < FEWEST_CHECKS:
            raise ValueError("too few plans to compute a rank correlation")
        return plans


class TrainingOptions(Checked):
    """How much work goes into the delivered checkpoint."""

    guard_windows: Annotated[
        Count,
        option(
            "Further windows of the calibration text, held out, on which the quantized candidates "
            "are compared before one is delivered.",
            unit="windows",
        ),
    ] = 8
    effort: Annotated[
        EffortName,
        option(
            "fast (no training), balanced, or best (four times the training steps of balanced)."
        ),
    ] = "balanced"


class RecipeOption(Checked):
    """How a checkpoint is made of a plan."""

    recipe: Annotated[
        RecipeName,
        option(
            "Quantization method: usual (GPTQ, then training), or one method by itself: rtn "
            "(rounding to nearest), requant, blockwise, sgr-q, apiq or signiq."
        ),
    ] = "usual"


class DeviceOption(Checked):
    """Where it runs."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        option("Device: cpu, cuda, or auto (cuda where there is one)."),
    ] = "auto"


class ProfileSettings(
    DeviceOption, ProfileOptions, CalibrationOptions, CheckpointOptions, BudgetOption
):
    """The options of `bitwright profile`."""


class QuantizeSettings(DeviceOption, RecipeOption, TrainingOptions, CalibrationOptions):
    """The options of `bitwright quantize`."""


class EvaluateSettings(DeviceOption, EvaluationOptions):
    """The options of `bitwright evaluate`."""


class RunSettings(
    DeviceOption,
    TrainingOptions,
    PlanOptions,
    ProfileOptions,
    EvaluationOptions,
    CalibrationOptions,
    CheckpointOptions,
    BudgetOption,
):
    """The options of a run beside its model and its constraints."""

    def request(
        self, model: str, constraints: Constraints = UNCONSTRAINED, text: Callable[[str], str] = str
    ) -> RunRequest:
        """Return the request of a run.

        Args:
            model: a folder, a GGUF file, or a Hugging Face id, perhaps with a revision.
            constraints: what the plan must respect beside the budget.
            text: returns what is read for the name of a text.

        Raises:
            RequestError: options contradict each other.
            BudgetError: the budget cannot be understood.
        """
        budget = Budget.parse(self.budget)
        method = Method(self.signal, self.coupling, in_original=self.context == ORIGINAL)
        return RunRequest(
            model=model,
            budget=budget,
            budget_of=budget_of(budget, self.budget_of),
            embeddings=self.embeddings,
            group_size=self.group_size,
            amounts=self._amounts(text),
            method=method,
            effort=find_effort(self.effort),
            seed=self.seed,
            device=self.device,
            constraints=constraints,
        )

    def _amounts(self, text: Callable[[str], str]) -> Amounts:
        signal = find_signal(self.signal)
        return Amounts(
            calibration=TextSpec(
                text(self.calibration), self.calibration_windows, self.tokens, self.seed
            ),
            evaluation=TextSpec(text(self.evaluation), self.evaluation_windows, self.tokens, None),
            probe_windows=self.probe_windows or signal.probe_windows,
            probe_tokens=self.probe_tokens or min(signal.probe_tokens, self.tokens),
            check_plans=self.check_plans,
            guard_windows=self.guard_windows,
            batch=BATCH,
        )


class RunOptions(RunSettings, ModelOption):
    """All options of a run, by the names that they have on the command line and over REST."""

    constraints: Annotated[ConstraintsIn, option(CONSTRAINTS)] = ConstraintsIn()
    whole_file: Annotated[
        bool | None,
        option(
            WHOLE_FILE,
            deprecated=True,
        ),
    ] = None

    def budget_counts(self) -> str | None:
        """Return what the budget counts, where `budget_of` or the deprecated `whole_file` says it.

        Jobs of earlier versions are stored with `whole_file` alone, and keep their meaning.
        """
        if self.budget_of is not None or self.whole_file is None:
            return self.budget_of
        return CHECKPOINT if self.whole_file else LAYERS

    def to_request(
        self, model: Callable[[str], str] = str, text: Callable[[str], str] = str
    ) -> RunRequest:
        """Return the request of the run.

        Args:
            model: returns what is loaded for the name of a model.
            text: returns what is read for the name of a text.

        Raises:
            ServiceError, AllocatorError: options contradict each other, or a name is refused.
        """
        settled = self.model_copy(update={"budget_of": self.budget_counts()})
        return settled.request(model(self.model), self.constraints.constraints(), text)
