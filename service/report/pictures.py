"""Pictures of a report, as SVG text that goes into a page."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from service.report.document import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#1f2933"
_PLAN, _UNIFORM = "#0b6e99", "#b4540a"
_NAMES = {"plan": "plan", "uniform": "uniform, same bytes"}


def bits_heat_map(report: Report) -> str:
    """Return bits per weight by block and kind of layer."""
    layers = report["plan"]["layers"]
    kinds, blocks = _axes_of(layers)
    values = np.full((len(kinds), len(blocks)), np.nan)
    for row in layers.values():
        bits = 8 * row["weight_bytes"] / (row["shape"][0] * row["shape"][1])
        values[kinds.index(row["kind"]), blocks.index(row["block"])] = bits
    return _heat_map(values, kinds, blocks, "bits per weight", "viridis")


def damage_heat_map(report: Report) -> str:
    """Return by block and kind what it would cost to store this layer alone at the lowest fidelity, in nats per token."""
    layers, damage = report["plan"]["layers"], report["damage_nats_per_token"]
    kinds, blocks = _axes_of(layers)
    values = np.full((len(kinds), len(blocks)), np.nan)
    for name, row in layers.items():
        values[kinds.index(row["kind"]), blocks.index(row["block"])] = next(
            iter(damage[name].values())
        )
    return _heat_map(values, kinds, blocks, "KL change [nats/token]", "magma_r")


def prediction_chart(report: Report) -> str:
    """Return predicted beside measured loss of both plans."""
    figure, axes = _figure(5.2, 3.2)
    prediction = report["prediction"]
    for at, (name, color) in enumerate((("plan", _PLAN), ("uniform", _UNIFORM))):
        row = prediction[name]
        axes.bar(at - 0.2, row["predicted_kl_nats_per_token"], 0.38, color=color, alpha=0.45)
        error = row["measured_kl_stderr"]
        error = 0 if error is None or error != error else error  # noqa: PLR0124  NaN is not equal to itself
        axes.bar(
            at + 0.2, row["measured_kl_nats_per_token"], 0.38, yerr=error, capsize=4, color=color
        )
    axes.set_xticks([0, 1], [_NAMES["plan"], _NAMES["uniform"]])
    axes.set_ylabel("KL from the original [nats/token]")
    axes.set_title(
        "light: predicted on calibration text   dark: measured on held-out text",
        fontsize=8,
        color=_INK,
    )
    return _svg(figure)


def check_chart(report: Report) -> str:
    """Return measured against predicted loss of the random plans, with the line on which both are equal."""
    figure, axes = _figure(5.2, 4.0)
    plans = report["checks"]["plans"]
    predicted = [row["predicted_kl_nats_per_token"] for row in plans]
    measured = [row["measured_kl_nats_per_token"] for row in plans]
    span = [min(predicted + measured), max(predicted + measured)]
    axes.plot(span, span, color=_UNIFORM, linewidth=1.2)
    axes.scatter(predicted, measured, s=18, color=_PLAN)
    axes.set_xlabel("predicted KL [nats/token]")
    axes.set_ylabel("measured KL [nats/token]")
    return _svg(figure)


def block_chart(report: Report) -> str:
    """Return average bits of each block under the plan and under the uniform plan's average."""
    layers = report["plan"]["layers"]
    _, blocks = _axes_of(layers)
    size, weights = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)
    for row in layers.values():
        size[row["block"]] += row["weight_bytes"]
        weights[row["block"]] += row["shape"][0] * row["shape"][1]
    figure, axes = _figure(7.2, 2.6)
    axes.bar(blocks, [8 * size[block] / weights[block] for block in blocks], color=_PLAN)
    axes.axhline(
        report["bits_per_weight"] * report["uniform_bytes"] / report["plan_bytes"],
        color=_UNIFORM,
        linewidth=1.2,
    )
    axes.set_xlabel("block")
    axes.set_ylabel("bits per weight")
    axes.set_title("bars: plan   line: uniform", fontsize=8, color=_INK)
    return _svg(figure)


def frontier_chart(rows: Sequence[dict[str, Any]]) -> str:
    """Return predicted loss and its bound over the size of the plan, with the hull and the knees."""
    return _svg(_frontier(rows))


def frontier_png(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return the same picture as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  slow to import

    figure, data = _frontier(rows), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=160, metadata={"Software": None})
    return data.getvalue()


def _frontier(rows: Sequence[dict[str, Any]]) -> "Figure":
    figure, axes = _figure(7.2, 4.0)

    def curve(name: str, chosen: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
        return [row["bits_per_weight"] for row in chosen], [row[name] for row in chosen]

    kl, knees = "predicted_kl_nats_per_token", [row for row in rows if row["knee"]]
    axes.plot(
        *curve("bound_nats_per_token", rows), color=_UNIFORM, linewidth=1, label="proven bound"
    )
    axes.plot(*curve(kl, rows), color=_PLAN, linewidth=1.4, label="plan")
    axes.scatter(
        *curve(kl, [row for row in rows if row["on_hull"]]),
        s=9,
        color=_PLAN,
        label="on the convex hull",
    )
    axes.scatter(*curve(kl, knees), s=70, facecolors="none", edgecolors=_INK, label="knee")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("predicted KL [nats/token]")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _axes_of(layers: dict[str, dict[str, Any]]) -> tuple[list[str], list[int]]:
    kinds = list(dict.fromkeys(row["kind"] for row in layers.values()))
    return kinds, sorted({row["block"] for row in layers.values()})


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415  slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _heat_map(values: Any, kinds: list[str], blocks: list[int], label: str, colors: str) -> str:
    figure, axes = _figure(1.8 + 0.24 * len(blocks), 0.8 + 0.3 * len(kinds))
    image = axes.imshow(values, aspect="auto", cmap=colors)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(blocks) // 15)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_xlabel("block", fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return _svg(figure)


def _svg(figure: "Figure") -> str:
    """Return a figure as an SVG element, the same for the same figure."""
    import matplotlib as mpl  # noqa: PLC0415

    text = io.StringIO()
    with mpl.rc_context(
        {"svg.hashsalt": "bitwright", "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
