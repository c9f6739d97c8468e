"""The report as one self-contained page: no script, no file beside it, nothing fetched."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from service.report import pictures
from service.report.document import Report, summary_rows


def render_page(report: Report) -> str:
    """Return the HTML page of a report."""
    environment = Environment(
        loader=PackageLoader("service.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    charts = {
        "bits": pictures.bits_heat_map(report),
        "damage": pictures.damage_heat_map(report),
        "prediction": pictures.prediction_chart(report),
        "blocks": pictures.block_chart(report),
    }
    if report["checks"]:
        charts["checks"] = pictures.check_chart(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        summary=summary_rows(report),
        charts={name: Markup(svg) for name, svg in charts.items()},  # noqa: S704  drawn here, from numbers and escaped names
        gain=_gain(report),
    )


def _gain(report: Report) -> float | None:
    """Return by which share the plan's KL is below the uniform plan's, or None where the latter is zero."""
    uniform = report["evaluation"]["uniform"]["kl_nats_per_token"]
    return 1 - report["evaluation"]["plan"]["kl_nats_per_token"] / uniform if uniform > 0 else None
