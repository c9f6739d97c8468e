"""The table of model types in quantizer/README.md, from the stored walks through all of them."""

from typing import Any

from tests.support.families.decoders import left_out

_GOOD, _FAIR = 0.95, 0.9


def families_table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: how many types work, which, and why the others are refused."""
    works = [row for row in rows if row["works"]]
    refused = [row for row in rows if row["sentence"]]
    summary = (
        f"transformers {rows[0]['transformers']}: {len(works)} of {len(rows)} decoder types work "
        f"({len(works) / len(rows):.0%}), {len(refused)} are refused."
    )
    lines = [summary, "", "| weights of the blocks that are reached | types |", "|---|---|"]
    good = [row["model_type"] for row in works if row["share"] >= _GOOD]
    fair = [row for row in works if _FAIR <= row["share"] < _GOOD]
    poor = sorted((row for row in works if row["share"] < _FAIR), key=lambda row: row["share"])
    lines += [
        f"| at least {_GOOD:.0%} | {', '.join(good)} |",
        f"| {_FAIR:.0%} to {_GOOD:.0%} | {', '.join(_with_share(row) for row in fair)} |",
    ]
    lines += [
        f"| {row['share']:.0%} | {row['model_type']}: {_part(row['stays'])} |" for row in poor
    ]
    lines += ["", "| refused | why |", "|---|---|"]
    lines += [f"| {row['model_type']} | {row['sentence']} |" for row in refused]
    by_reason: dict[str, list[str]] = {}
    for model_type, reason in left_out().items():
        by_reason.setdefault(reason, []).append(model_type)
    lines += ["", "| no decoder-only language model | types |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(types)} |" for reason, types in by_reason.items()]
    return "\n".join(lines)


def _with_share(row: dict[str, Any]) -> str:
    return f"{row['model_type']} {row['share']:.0%}"


def _part(warning: str) -> str:
    return warning.partition("; ")[2]
