"""What a user asks for, as one frozen value."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from allocator.demands.budget import LAYERS, Budget
from allocator.demands.constraints import UNCONSTRAINED, Constraints
from allocator.signals import ORIGINAL, SIGNALS, find_signal
from quantizer.texts.text import TextSpec
from service.errors import RequestError
from service.request.effort import Effort

FEWEST_CHECKS = 3
"""Fewer random plans have no rank correlation to speak of."""

BATCH = 4
"""Calibration windows that the model is run on at once."""

Embeddings = Literal["auto", "keep", "join"]
AUTO, KEEP, JOIN = get_args(Embeddings)
"""When embedding and head are quantized too.

`auto`: where a budget of the whole checkpoint cannot be met otherwise. `keep`: never. `join`:
always.
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
        """Refuse probes that are longer than the windows they are taken from.

        Raises:
            RequestError: they are.
        """
        if self.probe_tokens > self.calibration.tokens:
            raise RequestError(
                f"probe tokens {self.probe_tokens}: a window has {self.calibration.tokens} tokens; "
                "give fewer"
            )

    @property
    def probes(self) -> TextSpec:
        """The windows that effects are measured on.

        Drawn after the calibration windows, so none is in both.
        """
        return replace(self.calibration, windows=self.probe_windows, skip=self.calibration.windows)

    @property
    def guard(self) -> TextSpec:
        """The windows that candidate plans are compared on; none was fitted to them."""
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
        RequestError: the signal cannot be measured in the original model.
    """

    signal: str
    coupling: str
    in_original: bool = False

    def __post_init__(self) -> None:
        """Refuse a context that the signal cannot be measured in."""
        signal = find_signal(self.signal)
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
        budget: size of the whole checkpoint, or of its quantized layers.
        budget_of: what the budget counts, see `allocator.demands.budget.budget_of`.
        embeddings: whether embedding and head are quantized too, see `AUTO`.
        group_size: columns that share a scale, in all fidelities; None leaves the choice to the
            menu.
        amounts: how much is measured.
        method: how it is measured and modelled.
        effort: how much work goes into the layers that are delivered.
        seed: of everything random.
        device: `cpu`, `cuda`, or `auto`.
        constraints: what the plan must respect beside the budget.

    Raises:
        RequestError: fields contradict each other.
    """

    model: str
    budget: Budget
    budget_of: str
    embeddings: Embeddings
    group_size: int | None
    amounts: Amounts
    method: Method
    effort: Effort
    seed: int
    device: str
    constraints: Constraints = UNCONSTRAINED

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.embeddings == JOIN and self.budget_of == LAYERS:
            raise RequestError(
                "embeddings join: they count in a budget of the whole checkpoint only; give the "
                "budget in bytes, such as 900MB"
            )
