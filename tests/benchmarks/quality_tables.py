"""Tables of quality, in Markdown: perplexity and KL divergence at equal bytes."""

from itertools import combinations
from typing import Any

import numpy as np

from tests.benchmarks.stored import processor_of

LARGE = 1000
"""From here on digits after the point say nothing."""


def results_table(runs: list[dict[str, Any]]) -> str:
    """Return the table of quality at equal bytes, in Markdown."""
    heads = ("run", "model", "bits per weight", "layer bytes", "perplexity", "KL [nats/token]")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|"]
    for run in {run["label"]: run for run in runs}.values():  # later rows replace earlier ones
        sizes = {
            "original": run["original_layer_bytes"],
            "uniform": run["uniform_bytes"],
            "plan": run["plan_bytes"],
        }
        for name, size in sizes.items():
            bits = run["bits_per_weight"] * size / run["plan_bytes"]
            quality = run["evaluation"][name]
            perplexity = _pair(quality, "perplexity", "perplexity_stderr", 2)
            kl = _pair(quality, "kl_nats_per_token", "kl_stderr", 3)
            label = run["label"] if name == "original" else ""
            lines.append(f"| {label} | {name} | {bits:.3f} | {size:,} | {perplexity} | {kl} |")
    return "\n".join(lines)


def plans_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of ways to plan, one row for each model and method, in Markdown.

    Later rows replace earlier ones.
    """
    latest = {
        (
            row["model"],
            row["method"].partition(" ")[0] if _is_uniform(row) else row["method"],
            row["budget_bpw"],
        ): row
        for row in rows
    }
    budgets = sorted({budget for _, _, budget in latest})
    head = " | ".join(f"{budget} bpw" for budget in budgets)
    lines = [f"| model | plan | {head} | profile [s] |", "|---|---|" + "---:|" * (len(budgets) + 1)]
    for model, method in dict.fromkeys((model, method) for model, method, _ in latest):
        found = [latest.get((model, method, budget)) for budget in budgets]
        seconds = [
            row["profile_seconds"] for row in found if row and (row["profile_seconds"] or 0) > 1
        ]
        cells = [_cell(row) if row else "" for row in found]
        lines.append(
            f"| {model} | {method} | {' | '.join(cells)} | {max(seconds):.0f} |"
            if seconds
            else f"| {model} | {method} | {' | '.join(cells)} | |"
        )
    return "\n".join(lines)


def quantizers_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of quantizers at equal bytes, in Markdown.

    Later rows replace earlier ones, those of a GPU only its own; rows of the whole text add a score
    to the row before them; rows that say why a result is withdrawn take it out.
    """
    heads = (
        *(
            "bits per weight",
            "method",
            "perplexity",
            "KL [nats/token]",
            "whole text",
            "other text",
            "its KL",
        ),
        *("minutes", "core minutes", "processor", "peak memory"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---:|---|" + "---:|" * (len(heads) - 4) + "---|---:|"]
    latest = _latest(rows)
    for budget in sorted({budget for budget, *_ in latest}):
        found = [row for (at, *_), row in latest.items() if at == budget]
        lines += [
            f"| {' | '.join(_quantizer_cells(row))} |"
            for row in sorted(
                found, key=lambda row: -row["quality"]["held out"]["kl_nats_per_token"]
            )
        ]
    return "\n".join(lines)


def stability_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of how much plans depend on the calibration text, in Markdown.

    Later rows replace earlier ones.
    """
    latest = {(row["model"], row["budget_bpw"], row["corpus"], row["seed"]): row for row in rows}
    lines = [
        (
            "| calibration text | KL of each seed's plan | same fidelity, two seeds | bits "
            "correlate, "
            "two seeds |"
        ),
        "|---|---|---:|---:|",
    ]
    for group in dict.fromkeys(key[:3] for key in latest):
        found = [row for key, row in latest.items() if key[:3] == group]
        quality = ", ".join(
            f"{row['quality']['kl_nats_per_token']:.3f} ± {row['quality']['kl_stderr']:.3f}"
            for row in found
        )
        agreed = agreement(found)
        lines.append(
            f"| {group[2]} | {quality} | {agreed['same_fidelity']:.0%} | "
            f"{agreed['bits_correlation']:.2f} |"
        )
    across = agreement(list(latest.values()))
    lines.append(
        f"| all pairs | | {across['same_fidelity']:.0%} | {across['bits_correlation']:.2f} |"
    )
    return "\n".join(lines)


def agreement(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return over all pairs of rows.

    The share of layers with the same fidelity, and the correlation of bits per weight.
    """
    pairs = list(combinations(rows, 2))
    same = [
        np.mean([a == b for a, b in zip(one["fidelities"], two["fidelities"], strict=True)])
        for one, two in pairs
    ]
    bits = [np.corrcoef(one["layer_bits"], two["layer_bits"])[0, 1] for one, two in pairs]
    return {"same_fidelity": float(np.mean(same)), "bits_correlation": float(np.mean(bits))}


def _pair(quality: dict[str, Any], value: str, error: str, digits: int) -> str:
    form = f".{digits}f" if quality[value] < LARGE else ",.0f"
    return f"{quality[value]:{form}} ± {quality[error]:{form}}"


def _is_uniform(row: dict[str, Any]) -> bool:
    return str(row["method"]).startswith("uniform")


def _cell(row: dict[str, Any]) -> str:
    quality = row["quality"]
    ratio = "" if _is_uniform(row) else f"; x {row['kl_to_uniform']:.2f}"
    return (
        f"{quality['kl_nats_per_token']:.3f} ± {quality['kl_stderr']:.3f} "
        f"({quality['perplexity']:.1f}{ratio})"
    )


def _latest(
    rows: list[dict[str, Any]],
) -> dict[tuple[float, str, str | None], dict[str, Any]]:
    """Return the row that counts for each budget, method and GPU: see `quantizers_table`."""
    latest: dict[tuple[float, str, str | None], dict[str, Any]] = {}
    for row in rows:
        key = row["budget_bpw"], row["method"], row.get("gpu")
        quality = row.get("quality", {})
        if "withdrawn" in row:
            del latest[key]
        elif "whole" in quality:
            latest[key] = latest[key] | {"quality": latest[key]["quality"] | quality}
        else:
            latest[key] = row
    return latest


SUMMARY_BUDGETS = (2.5, 3.0, 4.25)
"""Budgets of the summary, in bits per weight."""

SUMMARY = {
    "GPTQ": "GPTQ on the uniform plan",
    "fast": "`--effort fast`",
    "SGR-Q, scales of knee": "SGR-Q on the uniform plan, trained",
    "balanced": "`--effort balanced`, trained",
}
"""Methods of the summary, and what the summary calls them: a rival before each effort level."""


def summary_table(rows: list[dict[str, Any]]) -> str:
    """Return the short table of the main README, in Markdown: effort levels beside their rivals."""
    heads = ("bits per weight", "method", "layer bytes", "perplexity", "KL [nats/token]")
    lines = [
        f"| {' | '.join((*heads, 'other text: perplexity', 'KL'))} |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    latest = _latest(rows)
    for budget in SUMMARY_BUDGETS:
        for method, label in SUMMARY.items():
            if row := latest.get((budget, method, None)):
                lines.append(f"| {' | '.join(_summary_cells(row, label))} |")
    return "\n".join(lines)


def _summary_cells(row: dict[str, Any], label: str) -> tuple[str, ...]:
    here = row["quality"]["held out"]
    other = row["quality"]["other"]
    return (
        f"{row['bits_per_weight']:.2f}",
        label,
        f"{row['plan_bytes']:,}",
        f"{row['quality']['whole']['perplexity']:.1f}",
        f"{here['kl_nats_per_token']:.3f}",
        f"{other['perplexity']:.1f}",
        f"{other['kl_nats_per_token']:.3f}",
    )


def _quantizer_cells(row: dict[str, Any]) -> tuple[str, ...]:
    here, other, whole = (row["quality"].get(name) for name in ("held out", "other", "whole"))
    peak_bytes = row.get("gpu_peak_bytes", row.get("peak_memory_bytes"))
    return (
        f"{row['bits_per_weight']:.3f}",
        row["method"],
        _pair(here, "perplexity", "perplexity_stderr", 1),
        _pair(here, "kl_nats_per_token", "kl_stderr", 3),
        _pair(whole, "perplexity", "perplexity_stderr", 1) if whole else "",
        _pair(other, "perplexity", "perplexity_stderr", 1),
        _pair(other, "kl_nats_per_token", "kl_stderr", 3),
        _minutes(row["seconds"], row.get("paused_seconds", 0)),
        _minutes(row.get("processor_seconds", {})),
        row.get("gpu") or processor_of(row),
        f"{peak_bytes / 1e9:.1f} GB" if peak_bytes else "",
    )


def _minutes(seconds: dict[str, float | None], paused: float = 0) -> str:
    """Return what all stages but the profile took without the time it was paused.

    Nothing where one was found ready.
    """
    own = [spent for stage, spent in seconds.items() if stage != "profile"]
    known = [spent for spent in own if spent is not None]
    return f"{(sum(known) - paused) / 60:.1f}" if known and len(known) == len(own) else ""
