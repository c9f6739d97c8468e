"""The figures of a report that people look at first."""

from math import inf, isfinite
from typing import Any, NamedTuple

from service.report.document import Report
from service.report.quality import Scores

_HEADLINE = (
    "budget_bytes",
    "plan_bytes",
    "bits_per_weight",
    "checkpoint_bytes",
    "original_bytes",
    "uniform_bytes",
    "notes",
    "evaluation",
)


class SummaryRow(NamedTuple):
    """One model in the summary, as text.

    Attributes:
        model: which one.
        bits_per_weight: average size of a weight of the layers.
        layer_bytes: size of the layers.
        perplexity: with its standard error.
        kl: KL divergence from the original with its standard error [nats/token].
    """

    model: str
    bits_per_weight: str
    layer_bytes: str
    perplexity: str
    kl: str


def summary_rows(report: Report) -> list[SummaryRow]:
    """Return one row for the original, the uniform plan and the delivered one, in this order.

    The delivered plan before training comes before it, if it was trained.
    """
    evaluation = report.evaluation
    rows = [
        _row(report, "original", report.original_layer_bytes, evaluation.original),
        _row(report, "uniform", report.uniform_bytes, evaluation.uniform),
    ]
    if evaluation.untuned is not None:
        rows.append(_row(report, "plan, before training", report.plan_bytes, evaluation.untuned))
    return [*rows, _row(report, "plan", report.plan_bytes, evaluation.plan)]


def headline(report: Report) -> dict[str, Any]:
    """Return the figures of a report that a job's result holds, as JSON values."""
    document = report.to_json()
    return {name: document[name] for name in _HEADLINE}


def figure(value: float | None, digits: int) -> str:
    """Return a number as text; one that is null in the report is not known."""
    if value == inf:
        return "infinite"
    return "not finite" if value is None or not isfinite(value) else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """Return a number with its standard error, where there is one, as text."""
    if value is None or error is None or not isfinite(value + error):
        return figure(value, digits)
    return f"{figure(value, digits)} ± {error:.{digits}f}"


def _row(report: Report, name: str, layer_bytes: int, scores: Scores) -> SummaryRow:
    bits_per_byte = report.bits_per_weight / report.plan_bytes
    return SummaryRow(
        model=name,
        bits_per_weight=f"{layer_bytes * bits_per_byte:.3f}",
        layer_bytes=f"{layer_bytes:,}",
        perplexity=with_error(scores.perplexity, scores.perplexity_stderr, 2),
        kl=with_error(scores.kl_nats_per_token, scores.kl_stderr, 4),
    )
