"""Rows of stored results."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def rows(name: str) -> list[dict[str, Any]]:
    """Return the stored rows of a file of results, such as `runs`."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def processor_of(row: dict[str, Any]) -> str:
    """Return the maker of the processor, and whether it multiplies bfloat16 where known."""
    found = row["circumstances"]
    maker = found["processor"].split()[0].removesuffix("(R)")
    return f"{maker}, bfloat16" if found.get("bfloat16_products") else maker
