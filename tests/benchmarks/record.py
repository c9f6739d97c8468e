"""Append the report of a run to the stored results, with its circumstances.

python -m tests.benchmarks.record OUT/report.json --label "SmolLM2-135M, WikiText-2, 16 x 512"
"""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
COMMIT = "BITWRIGHT_COMMIT"
"""Environment variable that names the commit where there is no git."""


def circumstances() -> dict[str, Any]:
    """Return commit, processor and cores of this machine, and whether it multiplies bfloat16."""
    root, commit = ROOT, os.environ.get(COMMIT)
    if commit is None:
        commit = subprocess.check_output(
            ["git", "rev-parse", "--short=12", "HEAD"],  # noqa: S607
            cwd=root,
            text=True,
        )
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return {
        "commit": commit.strip(),
        "processor": found.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "bfloat16_products": bool(
            {"avx512_bf16", "amx_bf16"} & set(found.get("flags", "").split())
        ),
    }


def row_of(report: dict[str, Any], label: str) -> dict[str, Any]:
    """Return what is kept of a report."""
    kept = (
        "budget",
        "budget_bytes",
        "plan_bytes",
        "uniform_bytes",
        "bits_per_weight",
        "checkpoint_bytes",
        "original_bytes",
        "original_layer_bytes",
        "evaluation",
        "guard",
        "profile",
        "prediction",
        "checks",
        "seconds",
        "provenance",
    )
    return {
        "label": label,
        "circumstances": circumstances(),
        **{name: report[name] for name in kept},
    }


def main() -> None:
    """Append one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--label", required=True)
    arguments = parser.parse_args()
    row = row_of(json.loads(arguments.report.read_text()), arguments.label)
    for part in ("evaluation", "guard"):
        row[part]["text"] = Path(row[part]["text"]).name
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
