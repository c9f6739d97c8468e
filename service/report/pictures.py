"""Pictures of a report, as SVG text that goes into a page."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np

from quantizer.plans.plan import starred
from service.report.document import Report
from service.report.figure import INK, PLAN_COLOR, UNIFORM_COLOR, new_figure, svg
from service.report.layers import LayerInfo
from service.report.quality import RandomPlanChecks


def bits_heat_map(report: Report) -> str:
    """Return bits per weight by block and kind of layer."""
    layers = report.plan.layers
    bits = {name: 8 * layer.weight_bytes / layer.weights for name, layer in layers.items()}
    return _heat_map(layers, bits, "bits per weight", "viridis")


def damage_heat_map(report: Report) -> str:
    """Return the loss of storing one layer alone at the lowest fidelity, by block and kind.

    In nats per token.
    """
    damage = report.damage_nats_per_token
    lowest = {name: next(iter(damage[name].values())) for name in report.plan.layers}
    return _heat_map(report.plan.layers, lowest, "KL change [nats/token]", "magma_r")


def prediction_chart(report: Report) -> str:
    """Return predicted beside measured loss of the delivered and the uniform plan."""
    figure, axes = new_figure(5.2, 3.2)
    bars = (
        (report.prediction.plan, PLAN_COLOR),
        (report.prediction.uniform, UNIFORM_COLOR),
    )
    for at, (row, color) in enumerate(bars):
        axes.bar(at - 0.2, row.predicted_kl_nats_per_token, 0.38, color=color, alpha=0.45)
        axes.bar(
            at + 0.2,
            _finite(row.measured_kl_nats_per_token),
            0.38,
            yerr=_finite(row.measured_kl_stderr),
            capsize=4,
            color=color,
        )
    axes.set_xticks([0, 1], ["plan", "uniform, same bytes"])
    axes.set_ylabel("KL from the original [nats/token]")
    axes.set_title(
        "light: predicted on calibration text   dark: measured on held-out text",
        fontsize=8,
        color=INK,
    )
    return svg(figure)


def check_chart(checks: RandomPlanChecks) -> str:
    """Return measured against predicted loss of random plans, with the line of equality."""
    figure, axes = new_figure(5.2, 4.0)
    predicted = [row.predicted_kl_nats_per_token for row in checks.plans]
    measured = [row.measured_kl_nats_per_token for row in checks.plans]
    span = [min(predicted + measured), max(predicted + measured)]
    axes.plot(span, span, color=UNIFORM_COLOR, linewidth=1.2)
    axes.scatter(predicted, measured, s=18, color=PLAN_COLOR)
    axes.set_xlabel("predicted KL [nats/token]")
    axes.set_ylabel("measured KL [nats/token]")
    return svg(figure)


def block_chart(report: Report) -> str:
    """Return average bits of each block under the plan, and the average of the uniform plan."""
    layers = report.plan.layers.values()
    blocks = _blocks(report.plan.layers)
    sizes = dict.fromkeys(blocks, 0)
    weights = dict.fromkeys(blocks, 0)
    for layer in layers:
        sizes[layer.block] += layer.weight_bytes
        weights[layer.block] += layer.weights
    figure, axes = new_figure(7.2, 2.6)
    axes.bar(blocks, [8 * sizes[block] / weights[block] for block in blocks], color=PLAN_COLOR)
    uniform = report.bits_per_weight * report.uniform_bytes / report.plan_bytes
    axes.axhline(uniform, color=UNIFORM_COLOR, linewidth=1.2)
    axes.set_xlabel("block")
    axes.set_ylabel("bits per weight")
    axes.set_title("bars: plan   line: uniform", fontsize=8, color=INK)
    return svg(figure)


def _finite(value: float | None) -> float:
    return 0.0 if value is None or not isfinite(value) else value


def _blocks(layers: Mapping[str, LayerInfo]) -> list[int]:
    return sorted({layer.block for layer in layers.values()})


def _heat_map(
    layers: Mapping[str, LayerInfo], by_name: Mapping[str, float], label: str, colors: str
) -> str:
    """Return one number of each layer by block and kind, of experts their mean."""
    kinds = list(dict.fromkeys(starred(layer.kind) for layer in layers.values()))
    blocks = _blocks(layers)
    totals: Any = np.zeros((len(kinds), len(blocks)))
    counts: Any = np.zeros((len(kinds), len(blocks)))
    for name, layer in layers.items():
        place = kinds.index(starred(layer.kind)), blocks.index(layer.block)
        totals[place] += by_name[name]
        counts[place] += 1
    values = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    label_inches = 0.07 * max(map(len, kinds))
    figure, axes = new_figure(1.2 + label_inches + 0.24 * len(blocks), 0.8 + 0.3 * len(kinds))
    image = axes.imshow(values, aspect="auto", cmap=colors)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(blocks) // 15)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_xlabel("block", fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return svg(figure)
