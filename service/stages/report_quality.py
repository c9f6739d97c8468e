"""The parts of a report about quality."""

from collections.abc import Mapping
from math import isnan

from allocator.profile import shares_of
from allocator.profiling.prediction_check import summary
from quantizer.running.quality import Quality
from service.report.json_values import from_json
from service.report.quality import (
    Evaluation,
    PredictedLoss,
    Prediction,
    RandomPlanChecks,
    Scores,
    SelectionInfo,
)
from service.request.request import RunRequest
from service.stages.results import RunResults


def _scores(quality: Quality) -> Scores:
    return from_json(Scores, quality.to_json(), "the scores")


def evaluation_of(request: RunRequest, quality: Mapping[str, Quality]) -> Evaluation:
    """Return the scores on the evaluation text."""
    untuned = quality.get("untuned")
    return Evaluation(
        original=_scores(quality["original"]),
        plan=_scores(quality["plan"]),
        uniform=_scores(quality["uniform"]),
        untuned=None if untuned is None else _scores(untuned),
        text=request.amounts.evaluation.source,
    )


def selection_of(request: RunRequest, results: RunResults) -> SelectionInfo:
    """Return the comparison of candidate plans."""
    selection, training = results.delivery.selection, results.delivery.training
    return SelectionInfo(
        text=request.amounts.calibration.source,
        delivered=selection.delivered,
        uniform=selection.uniform,
        lead_over_uniform=selection.lead,
        candidates={name: _scores(quality) for name, quality in selection.candidates.items()},
        tuned=None if training is None else _scores(training.trained_quality),
    )


def prediction_of(results: RunResults) -> Prediction:
    """Return predicted and measured loss of both plans, before training."""
    profile, quality = results.profile, results.quality
    uniform_loss = profile.loss_of_shares(shares_of(profile, results.uniform))
    return Prediction(
        plan=_predicted(results.allocation.predicted_loss, quality.get("untuned", quality["plan"])),
        uniform=_predicted(uniform_loss, quality["uniform"]),
    )


def _predicted(loss: float, measured: Quality) -> PredictedLoss:
    error = measured.kl_stderr
    return PredictedLoss(loss, measured.kl_nats_per_token, None if isnan(error) else error)


def checks_of(results: RunResults) -> RandomPlanChecks | None:
    """Return predicted and measured loss of random plans; None where none were asked for."""
    if not results.checks:
        return None
    return from_json(RandomPlanChecks, summary(results.checks), "the checks")
