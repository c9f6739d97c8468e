"""Write the tables of the README from the stored results.

python -m tests.benchmarks.tables
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def rows() -> list[dict[str, Any]]:
    """Return all stored runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def results_table(runs: list[dict[str, Any]]) -> str:
    """Return the table of quality at equal bytes, in Markdown."""
    heads = ("run", "model", "bits per weight", "layer bytes", "perplexity", "KL [nats/token]")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|"]
    for run in runs:
        sizes = {"original": run["original_layer_bytes"], "uniform": run["uniform_bytes"], "plan": run["plan_bytes"]}
        for name, size in sizes.items():
            bits = run["bits_per_weight"] * size / run["plan_bytes"]
            quality = run["evaluation"][name]
            perplexity = _pair(quality, "perplexity", "perplexity_stderr", 2)
            kl = _pair(quality, "kl_nats_per_token", "kl_stderr", 3)
            label = run["label"] if name == "original" else ""
            lines.append(f"| {label} | {name} | {bits:.3f} | {size:,} | {perplexity} | {kl} |")
    return "\n".join(lines)


def _pair(quality: dict[str, Any], value: str, error: str, digits: int) -> str:
    return f"{quality[value]:.{digits}f} ± {quality[error]:.{digits}f}"


def with_tables(readme: str, runs: list[dict[str, Any]]) -> str:
    """Return the README with its table made anew."""
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{results_table(runs)}\n{END}{tail}"


def main() -> None:
    """Rewrite the README."""
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), rows()))


if __name__ == "__main__":
    main()
