"""What a user asks for, as one frozen value."""

from dataclasses import dataclass, replace

from allocator.demands.budget import Budget
from allocator.demands.constraints import UNCONSTRAINED, Constraints
from allocator.profile import COUPLINGS
from allocator.signals import DEFAULT, ORIGINAL, SIGNALS, find_signal
from quantizer.plans.fidelity import COLUMN_MULTIPLE
from quantizer.texts.text import BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION, TextSpec
from service.errors import RequestError
from service.request.effort import USUAL, Effort, find_effort

FEWEST_CHECKS = 3
"""Fewer points have no rank correlation to speak of."""

BATCH = 4
"""Calibration windows that are run at once."""

AUTO, KEEP, JOIN = "auto", "keep", "join"
EMBEDDINGS = (AUTO, KEEP, JOIN)
"""Embedding and head join what is quantized.

Where the budget for the whole file cannot be met otherwise; never; always.
"""


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much is measured.

    Attributes:
        calibration: text that layers are quantized on.
        evaluation: text that results are scored on; not the calibration text.
        probe_windows: windows that the effects of layers are measured on: further windows of the
            calibration text.
        probe_tokens: tokens that are used of each such window, from its start.
        check_plans: random plans that are measured to check the profile's predictions.
        guard_windows: still further windows of the calibration text, on which finished plans are
            compared.
        batch: calibration windows that are run at once.
    """

    calibration: TextSpec
    evaluation: TextSpec
    probe_windows: int
    probe_tokens: int
    check_plans: int
    guard_windows: int
    batch: int

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to measure.

        Raises:
            RequestError: a count is not positive.
        """
        counts = {
            "calibration windows": self.calibration.windows,
            "calibration tokens": self.calibration.tokens,
            "evaluation tokens": self.evaluation.tokens - 1,
            "probe windows": self.probe_windows,
            "probe tokens": self.probe_tokens,
            "guard windows": self.guard_windows,
            "batch": self.batch,
        }
        for name, count in counts.items():
            if count < 1:
                raise RequestError(f"{name} {count}: give a larger number")
        if self.check_plans and self.check_plans < FEWEST_CHECKS:
            raise RequestError(
                f"{self.check_plans} plans to check: give 0, or at least {FEWEST_CHECKS}"
            )
        if self.evaluation.windows < 0:
            raise RequestError(
                f"evaluation windows {self.evaluation.windows}: give a number, or 0 for the whole "
                "text"
            )
        if self.probe_tokens > self.calibration.tokens:
            raise RequestError(
                f"{self.probe_tokens} probe tokens of windows of {self.calibration.tokens}: probe "
                "fewer"
            )

    @property
    def probes(self) -> TextSpec:
        """The windows that effects are measured on.

        Drawn after the calibration windows, so none is in both.
        """
        return replace(self.calibration, windows=self.probe_windows, skip=self.calibration.windows)

    @property
    def guard(self) -> TextSpec:
        """The windows that finished plans are compared on: no plan was fitted to them."""
        return replace(
            self.calibration,
            windows=self.guard_windows,
            skip=self.calibration.windows + self.probe_windows,
        )


@dataclass(frozen=True, slots=True)
class Method:
    """How effects are measured and modelled.

    Attributes:
        signal: a name in `allocator.signals.SIGNALS`.
        coupling: one of `allocator.profile.COUPLINGS`.
        in_original: whether the signal is measured in the original model instead of in a uniform
            context.

    Raises:
        SignalUnknown: there is no signal of this name.
        RequestError: a field is out of range, or the signal cannot be measured in this context.
    """

    signal: str = DEFAULT.name
    coupling: str = "full"
    in_original: bool = False

    def __post_init__(self) -> None:
        """Refuse what no signal could do."""
        signal = find_signal(self.signal)
        if self.coupling not in COUPLINGS:
            raise RequestError(
                f"coupling {self.coupling!r} does not exist; use one of {', '.join(COUPLINGS)}"
            )
        if self.in_original and ORIGINAL not in signal.contexts:
            able = [each.name for each in SIGNALS.values() if ORIGINAL in each.contexts]
            raise RequestError(
                f"signal {self.signal!r} cannot be measured in the original model; use one of "
                f"{', '.join(able)}"
            )


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One run of the main job.

    Attributes:
        model: a folder, a GGUF file, or a Hugging Face id.
        budget: size of the quantized layers, or of the whole checkpoint.
        whole_file: whether the budget includes what is not quantized: embeddings, norms, head,
            biases.
        embeddings: whether embedding and head are quantized too, one of `EMBEDDINGS`.
        group_size: columns that share a scale, in all fidelities; None leaves the choice to the
            menu.
        amounts: how much is measured.
        method: how it is measured and modelled.
        effort: how much work goes into the layers that are delivered.
        seed: of everything random.
        device: `cpu`, `cuda`, or `auto`.
        constraints: what the plan must respect beside the budget.

    Raises:
        RequestError: a field is out of range.
    """

    model: str
    budget: Budget
    whole_file: bool
    embeddings: str
    group_size: int | None
    amounts: Amounts
    method: Method
    effort: Effort
    seed: int
    device: str
    constraints: Constraints = UNCONSTRAINED

    def __post_init__(self) -> None:
        """Refuse what no stage could use."""
        if self.group_size is not None and (
            self.group_size <= 0 or self.group_size % COLUMN_MULTIPLE
        ):
            raise RequestError(
                f"group size {self.group_size}: use a multiple of {COLUMN_MULTIPLE}, such as 64 or 128"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise RequestError(f"device {self.device!r}: use auto, cpu or cuda")
        if self.whole_file and self.budget.unit == "bpw":
            raise RequestError(
                f"budget {self.budget.text!r} counts quantized weights only; give bytes for the "
                "whole file"
            )
        if self.embeddings not in EMBEDDINGS:
            raise RequestError(
                f"embeddings {self.embeddings!r}: use one of {', '.join(EMBEDDINGS)}"
            )
        if self.embeddings == JOIN and not self.whole_file:
            raise RequestError(
                "embeddings join under a budget for the whole file only: give it in bytes, with "
                "--whole-file"
            )


def make_request(
    model: str,
    budget: str,
    *,
    calibration: str = BUILT_IN_CALIBRATION,
    evaluation: str = BUILT_IN_EVALUATION,
    calibration_windows: int = 8,
    evaluation_windows: int = 16,
    tokens: int = 512,
    probe_windows: int | None = None,
    probe_tokens: int | None = None,
    check_plans: int = 0,
    guard_windows: int = 8,
    group_size: int | None = None,
    signal: str = DEFAULT.name,
    coupling: str = "full",
    context: str = "uniform",
    effort: str = USUAL,
    seed: int = 0,
    device: str = "auto",
    whole_file: bool = False,
    embeddings: str = AUTO,
    constraints: Constraints = UNCONSTRAINED,
) -> RunRequest:
    """Return a request from the options that the command line and the job service both have.

    Theirs mean the same.

    Raises:
        RequestError: an option is out of range.
        BudgetError: the budget cannot be understood.
    """
    if context not in ("uniform", "original"):
        raise RequestError(f"context {context!r}: use uniform or original")
    method = Method(signal, coupling, context == "original")
    chosen_signal = find_signal(signal)
    amounts = Amounts(
        calibration=TextSpec(calibration, calibration_windows, tokens, seed),
        evaluation=TextSpec(evaluation, evaluation_windows, tokens, None),
        probe_windows=chosen_signal.probe_windows if probe_windows is None else probe_windows,
        probe_tokens=(
            min(chosen_signal.probe_tokens, tokens) if probe_tokens is None else probe_tokens
        ),
        check_plans=check_plans,
        guard_windows=guard_windows,
        batch=BATCH,
    )
    parsed, chosen = Budget.parse(budget), find_effort(effort)
    return RunRequest(
        model,
        parsed,
        whole_file,
        embeddings,
        group_size,
        amounts,
        method,
        chosen,
        seed,
        device,
        constraints,
    )
