"""The report as one self-contained page, without scripts, other files or downloads."""

from markupsafe import Markup

from service.report import pictures
from service.report.document import Report
from service.report.json_values import to_json
from service.report.page_template import page_template
from service.report.summary import summary_rows


def render_page(report: Report) -> str:
    """Return the HTML page of a report."""
    charts = {
        "bits": pictures.bits_heat_map(report),
        "damage": pictures.damage_heat_map(report),
        "prediction": pictures.prediction_chart(report),
        "blocks": pictures.block_chart(report),
    }
    if report.checks is not None:
        charts["checks"] = pictures.check_chart(report.checks)
    return page_template("report.html.j2").render(
        report=report,
        provenance=to_json(report.provenance),
        summary=summary_rows(report),
        charts={name: _safe(svg) for name, svg in charts.items()},
        gain=_gain(report),
    )


def _safe(svg: str) -> Markup:
    """Return a picture of `service.report.pictures`, whose texts are escaped already."""
    return Markup(svg)  # noqa: S704  see above


def _gain(report: Report) -> float | None:
    """Return the share of the uniform plan's KL that the plan saves, or None if there is none."""
    uniform = report.evaluation.uniform.kl_nats_per_token
    plan = report.evaluation.plan.kl_nats_per_token
    if plan is None or uniform is None or uniform <= 0:
        return None
    return 1 - plan / uniform
