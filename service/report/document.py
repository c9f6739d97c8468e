"""The result of a run as a stable document, and how it is read."""

from typing import Any

SCHEMA = "bitwright.report/1"

Report = dict[str, Any]
"""JSON values. Fields are added, never renamed or removed, within a schema version."""


_SHOWN = {"untuned": "plan, before training"}


def summary_rows(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Return the table that people look at first.

    Model, bits per weight, layer bytes, perplexity, KL.
    """
    evaluation = report["evaluation"]
    sizes = {"original": report["original_layer_bytes"], "uniform": report["uniform_bytes"]}
    sizes |= {name: report["plan_bytes"] for name in ("untuned", "plan") if name in evaluation}
    bits_per_byte = report["bits_per_weight"] / report["plan_bytes"]
    return [
        (
            _SHOWN.get(name, name),
            f"{size * bits_per_byte:.3f}",
            f"{size:,}",
            _with_error(evaluation[name]["perplexity"], evaluation[name]["perplexity_stderr"], 2),
            _with_error(evaluation[name]["kl_nats_per_token"], evaluation[name]["kl_stderr"], 4),
        )
        for name, size in sizes.items()
    ]


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"
