"""The parts of a report about quality: scores, the comparison of candidates, predictions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.report.json_values import OMIT_IF_NONE


@dataclass(frozen=True, slots=True)
class Scores:
    """Quality of one model on one text. An unknown number is null.

    Attributes:
        perplexity: exp of the mean negative log-likelihood; `infinity` where that is beyond 709.
        perplexity_stderr: its standard error.
        nll_nats_per_token: mean negative log-likelihood of the next token [nats/token].
        nll_stderr: its standard error over windows.
        kl_nats_per_token: mean KL divergence from the original [nats/token].
        kl_stderr: its standard error over windows.
        windows: windows that were scored.
        tokens: next-token predictions that were scored.
    """

    perplexity: float | None
    perplexity_stderr: float | None
    nll_nats_per_token: float | None
    nll_stderr: float | None
    kl_nats_per_token: float | None
    kl_stderr: float | None
    windows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores on held-out text.

    Attributes:
        original: of the original model.
        plan: of the delivered checkpoint.
        uniform: of the best uniform plan of the same bytes.
        untuned: of the delivered plan before training; missing if it was not trained.
        text: the held-out text.
    """

    original: Scores
    plan: Scores
    uniform: Scores
    untuned: Scores | None = field(default=None, metadata=OMIT_IF_NONE)
    text: str


@dataclass(frozen=True, slots=True)
class SelectionInfo:
    """The comparison of candidate plans on held-out windows that no plan was fitted to.

    Attributes:
        text: the text that the windows come from.
        delivered: name of the delivered candidate: the nearest to the original of those that keep
            the constraints.
        uniform: name of the best uniform plan.
        lead_over_uniform: share of the best uniform plan's KL divergence that the delivered
            candidate saves.
        candidates: scores of all candidates by name.
        tuned: scores of the delivered candidate after training; null if it was not trained.
    """

    text: str
    delivered: str
    uniform: str
    lead_over_uniform: float
    candidates: Mapping[str, Scores]
    tuned: Scores | None


@dataclass(frozen=True, slots=True)
class PredictedLoss:
    """Predicted loss on calibration text beside measured loss on held-out text, before training.

    Attributes:
        predicted_kl_nats_per_token: by the profile [nats/token].
        measured_kl_nats_per_token: KL divergence from the original [nats/token].
        measured_kl_stderr: its standard error.
    """

    predicted_kl_nats_per_token: float
    measured_kl_nats_per_token: float | None
    measured_kl_stderr: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted and measured loss of two plans.

    Attributes:
        plan: of the delivered plan.
        uniform: of the best uniform plan.
    """

    plan: PredictedLoss
    uniform: PredictedLoss


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """A random plan, predicted and measured.

    Attributes:
        bits_per_weight: its size.
        predicted_kl_nats_per_token: by the profile [nats/token].
        measured_kl_nats_per_token: on held-out windows [nats/token].
    """

    bits_per_weight: float
    predicted_kl_nats_per_token: float
    measured_kl_nats_per_token: float


@dataclass(frozen=True, slots=True)
class RandomPlanChecks:
    """Predicted and measured loss of random plans that the profile was not measured on.

    Attributes:
        spearman: rank correlation of predicted and measured loss.
        slope: slope of measured on predicted loss.
        plans: the plans.
    """

    spearman: float
    slope: float
    plans: tuple[CheckedPlan, ...]
