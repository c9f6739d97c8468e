"""The picture of a frontier."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.report.figure import INK, PLAN_COLOR, UNIFORM_COLOR, new_figure
from service.report.frontier_row import FrontierRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def frontier_figure(rows: Sequence[FrontierRow]) -> "Figure":
    """Return predicted loss and its bound by size of the plan, with the hull and the knees."""
    figure, axes = new_figure(7.2, 4.0)
    axes.plot(
        _bits(rows),
        [row.bound_nats_per_token for row in rows],
        color=UNIFORM_COLOR,
        linewidth=1,
        label="proven bound",
    )
    axes.plot(_bits(rows), _losses(rows), color=PLAN_COLOR, linewidth=1.4, label="plan")
    hull = [row for row in rows if row.on_hull]
    axes.scatter(_bits(hull), _losses(hull), s=9, color=PLAN_COLOR, label="on the convex hull")
    knees = [row for row in rows if row.knee]
    axes.scatter(
        _bits(knees), _losses(knees), s=70, facecolors="none", edgecolors=INK, label="knee"
    )
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("predicted KL [nats/token]")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _bits(rows: Sequence[FrontierRow]) -> list[float]:
    return [row.bits_per_weight for row in rows]


def _losses(rows: Sequence[FrontierRow]) -> list[float]:
    return [row.predicted_kl_nats_per_token for row in rows]
