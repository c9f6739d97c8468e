"""Write the tables of the documents from the stored results.

python -m tests.benchmarks.tables
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks import family_table, quality_tables, speed_tables
from tests.benchmarks.stored import rows
from tests.support.paths import ROOT

DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "quantizer" / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
)
"""The documents that contain tables of results."""

TABLES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]] = {
    "summary": ("quantizers", quality_tables.summary_table),
    "quantizers": ("quantizers", quality_tables.quantizers_table),
    "results": ("runs", quality_tables.results_table),
    "plans": ("plans", quality_tables.plans_table),
    "stability": ("stability", quality_tables.stability_table),
    "commands": ("commands", speed_tables.commands_table),
    "whatif": ("whatif", speed_tables.whatif_table),
    "service": ("service", speed_tables.service_table),
    "inference": ("inference", speed_tables.inference_table),
    "kernels": ("kernels", speed_tables.kernels_table),
    "families": ("families", family_table.families_table),
    "compiled": ("compiled_kernels", speed_tables.compiled_table),
}
"""Each table by the name of its block: the file of stored rows, and what makes Markdown of them."""


def with_tables(text: str) -> str:
    """Return a document with the tables between its markers made anew from the stored rows.

    A block begins with `<!-- NAME: begin -->` and ends with `<!-- NAME: end -->`, where NAME is a
    key of `TABLES`; other blocks stay as they are.
    """
    for name in blocks_of(text):
        stored, table = TABLES[name]
        begin = f"<!-- {name}: begin -->"
        end = f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(rows(stored))}\n{end}{rest.split(end)[1]}"
    return text


def blocks_of(text: str) -> Iterable[str]:
    """Return the names of the tables that a document contains, in its order."""
    return [name for name in re.findall(r"<!-- (\w+): begin -->", text) if name in TABLES]


def main() -> None:
    """Write the tables."""
    for path in DOCUMENTS:
        _write(path)


def _write(path: Path) -> None:
    path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
