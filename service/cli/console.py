"""Results on stdout: for people as lines and tables, for programs as one JSON document."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

WIDE = 160
"""Columns of a table that goes into a pipe or a file; names of layers fit."""

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def print_pairs(pairs: Mapping[str, Any], *, as_json: bool) -> None:
    """Print names and values on stdout, one a line or as JSON."""
    if as_json:
        print_json(pairs)
        return
    for key, value in pairs.items():
        out.print(f"{key}: {value}", markup=False)
