"""Write the tables of the README from the stored results.

python -m tests.benchmarks.tables
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.paths import ROOT

RESULTS = Path(__file__).parent / "results"
LARGE = 1000
"""From here on digits after the point say nothing."""


def rows(name: str) -> list[dict[str, Any]]:
    """Return the stored rows of a file of results, such as `runs`."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def commands_table(commands: list[dict[str, Any]]) -> str:
    """Return the table of what commands take, one row for each kind of processor, in Markdown.

    Later rows replace earlier ones.
    """
    heads = (
        "command",
        "cores",
        "processor",
        "minutes (`make`: environment included)",
        "peak memory",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|---:|---:|"]
    for (command, processor), row in {
        (row["command"], _processor(row)): row for row in commands
    }.items():
        memory = row["peak_memory_bytes"]
        gigabytes = f"{memory / 1e9:.1f} GB" if memory else ""
        cores, minutes = row["circumstances"]["cores"], row["wall_seconds"] / 60
        lines.append(f"| `{command}` | {cores} | {processor} | {minutes:.1f} | {gigabytes} |")
    return "\n".join(lines)


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


def _pair(quality: dict[str, Any], value: str, error: str, digits: int) -> str:
    form = f".{digits}f" if quality[value] < LARGE else ",.0f"
    return f"{quality[value]:{form}} ± {quality[error]:{form}}"


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


def _is_uniform(row: dict[str, Any]) -> bool:
    return str(row["method"]).startswith("uniform")


def _cell(row: dict[str, Any]) -> str:
    quality = row["quality"]
    ratio = "" if _is_uniform(row) else f"; x {row['kl_to_uniform']:.2f}"
    return (
        f"{quality['kl_nats_per_token']:.3f} ± {quality['kl_stderr']:.3f} "
        f"({quality['perplexity']:.1f}{ratio})"
    )


def whatif_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of what-ifs, in Markdown; later rows replace earlier ones."""
    heads = (
        *(
            "profile",
            "groups x fidelities, rank",
            "p50 [ms]",
            "p99 [ms]",
            "gap p50",
            "gap p99",
            "first [ms]",
            "ready [s]",
        ),
        *("frontier of 100 [s]", "CVXPY anew [ms]"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in {row["problem"]: row for row in rows}.values():
        cells = (
            row["problem"],
            f"{row['groups']} x {row['fidelities']}, {row['rank']}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['gap_p50']:.2%}",
            f"{row['gap_p99']:.2%}",
            f"{row['first_ms']:.0f}",
            f"{row['prepare_seconds']:.1f}",
            f"{row['frontier_seconds']:.2f}",
            f"{row['cvxpy_anew_ms']:.0f} (x {row['cvxpy_anew_ms'] / row['p50_ms']:.0f})",
        )
        lines.append(f"| {' | '.join(cells)} |")
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


def stability_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of how much plans depend on the calibration text, in Markdown.

    Later rows replace earlier ones.
    """
    latest = {(row["model"], row["budget_bpw"], row["corpus"], row["seed"]): row for row in rows}
    lines = [
        (
            "| calibration text | KL of each seed's plan | same fidelity, two seeds | bits correlate, "
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


def service_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the job service under kills and under load, in Markdown.

    Later rows replace earlier ones.
    """
    lines = ["| what | how | found |", "|---|---|---|"]
    latest = {(row["benchmark"], row.get("database")): row for row in rows}.values()
    lines += [f"| {' | '.join(_SERVICE[row['benchmark']](row))} |" for row in latest]
    return "\n".join(lines)


def _kills(row: dict[str, Any]) -> tuple[str, str, str]:
    killed = ", ".join(f"{count} x {what}" for what, count in row["kills"].items())
    how = f"{row['jobs']} jobs; killed at random: {killed}"
    again = row["stage_starts"] - row["stages"]
    found = (
        f"{row['lost']} lost, {row['different']} different or half-written; {again} of "
        f"{row['stages']} stages begun again"
    )
    name = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[row["database"]]
    return f"kills, {name} (`python -m tests.benchmarks.kills`)", how, found


def _what_ifs(row: dict[str, Any]) -> tuple[str, str, str]:
    how = (
        f"real SmolLM2 profile, {row['requests_per_second']} requests a second over loopback, "
        "two cores that a job keeps busy"
    )
    found = f"p50 {row['what_if_p50_ms']:.1f} ms, p99 {row['what_if_p99_ms']:.0f} ms"
    return "what-ifs (`python -m tests.benchmarks.load`)", how, found


def _queue(row: dict[str, Any]) -> tuple[str, str, str]:
    how = f"1,000 queued jobs beside 10; {row['submissions_per_second']:.0f} submissions a second"
    parts = [
        f"{kind} p50 {row[f'{kind}_1000_p50_ms']:.1f} ms (10 jobs: {row[f'{kind}_10_p50_ms']:.1f})"
        for kind in ("list", "poll", "unchanged")
    ]
    return "lists and polls", how, ", ".join(parts)


_SERVICE = {"kills": _kills, "what-ifs while a job runs": _what_ifs, "list and poll": _queue}


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
    latest: dict[tuple[float, str, str | None], dict[str, Any]] = {}
    for row in rows:
        key, quality = (row["budget_bpw"], row["method"], row.get("gpu")), row.get("quality", {})
        if "withdrawn" in row:
            del latest[key]
        elif "whole" in quality:
            latest[key] = latest[key] | {"quality": latest[key]["quality"] | quality}
        else:
            latest[key] = row
    for budget in sorted({budget for budget, *_ in latest}):
        found = [row for (at, *_), row in latest.items() if at == budget]
        lines += [
            f"| {' | '.join(_quantizer_cells(row))} |"
            for row in sorted(
                found, key=lambda row: -row["quality"]["held out"]["kl_nats_per_token"]
            )
        ]
    return "\n".join(lines)


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
        row.get("gpu") or _processor(row),
        f"{peak_bytes / 1e9:.1f} GB" if peak_bytes else "",
    )


def _processor(row: dict[str, Any]) -> str:
    """Return whose processor it was, and whether it multiplies bfloat16 itself, where that is known."""
    found = row["circumstances"]
    maker = found["processor"].split()[0].removesuffix("(R)")
    return f"{maker}, bfloat16" if found.get("bfloat16_products") else maker


def _minutes(seconds: dict[str, float | None], paused: float = 0) -> str:
    """Return what all stages but the profile took without the time it was paused.

    Nothing where one was found ready.
    """
    own = [spent for stage, spent in seconds.items() if stage != "profile"]
    known = [spent for spent in own if spent is not None]
    return f"{(sum(known) - paused) / 60:.1f}" if known and len(known) == len(own) else ""


def inference_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of packed models against their originals in bfloat16, in Markdown.

    Later rows replace earlier ones.
    """
    share = "of the original"
    heads = (
        "model",
        "processor",
        "prompt",
        "a token",
        share,
        "a prompt",
        share,
        "memory",
        share,
        "of the file",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in {
        (row["label"], _processor(row), row["prompt_tokens"]): row for row in rows
    }.values():
        cells = [row["label"], _processor(row), f"{row['prompt_tokens']} tokens"]
        for what in ("token", "prompt"):
            packed, original = row[f"{what}_packed_seconds"], row[f"{what}_original_seconds"]
            cells += [f"{packed * 1e3:.0f} ms", f"x {packed / original:.2f}"]
        if packed := row.get("packed_generating_bytes"):  # older rows counted memory otherwise
            original, file = row["original_generating_bytes"], row["packed_file_bytes"]
            cells += [
                f"{packed / 1e6:.0f} MB",
                f"x {packed / original:.2f}",
                f"x {packed / file:.2f}",
            ]
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of how many times faster than bfloat16 the four layers of a block are together, in Markdown."""
    counts = sorted({row["rows"] for row in rows})
    lines = [
        (
            "| machine | model | fidelity | bits per weight | "
            f"{' | '.join(_rows(count) for count in counts)} |"
        )
    ]
    lines.append("|---|---|---|---:|" + "---:|" * len(counts))
    blocks: dict[tuple[str, str, str], dict[tuple[int, tuple[int, ...]], dict[str, Any]]] = {}
    for row in rows:  # later rows replace earlier ones
        machine = row["gpu"] or f"{_processor(row)}, {row['circumstances']['cores']} cores"
        blocks.setdefault((machine, row["model"], row["fidelity"]), {})[
            row["rows"], tuple(row["shape"])
        ] = row
    for (machine, model, fidelity), found in blocks.items():
        packed = {shape: row["packed_bytes"] for (_, shape), row in found.items()}
        bits = 8 * sum(packed.values()) / sum(shape[0] * shape[1] for shape in packed)
        cells = []
        for count in counts:
            some = [row for (each, _), row in found.items() if each == count]
            times = [sum(row[f"{way}_seconds"] for row in some) for way in ("bfloat16", "packed")]
            cells.append(f"x {times[0] / times[1]:.2f}" if len(some) == len(packed) else "")
        lines.append(f"| {machine} | {model} | `{fidelity}` | {bits:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of registers and shared memory of compiled kernels, and what they keep on the stack, in Markdown."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [f"| kernel | format | {' | '.join(targets)} |", "|---|---|" + "---:|" * len(targets)]
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        stack = f" + {row['stack_bytes']} B" if row["stack_bytes"] else ""
        cells.setdefault((row["kernel"], row["format"]), []).append(
            f"{row['registers']}, {row['shared_bytes'] / 1024:.1f} KiB{stack}"
        )
    lines += [
        f"| {kernel} | `{name}` | {' | '.join(found)} |" for (kernel, name), found in cells.items()
    ]
    return "\n".join(lines)


def with_tables(readme: str) -> str:
    """Return the README with its tables made anew from the stored rows."""
    tables = {
        "commands": commands_table(rows("commands")),
        "results": results_table(rows("runs")),
        "plans": plans_table(rows("plans")),
        "whatif": whatif_table(rows("whatif")),
        "stability": stability_table(rows("stability")),
        "service": service_table(rows("service")),
        "quantizers": quantizers_table(rows("quantizers")),
        "inference": inference_table(rows("inference")),
        "kernels": kernels_table(rows("kernels")),
        "compiled": compiled_table(rows("compiled_kernels")),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, rest = readme.split(begin)
        readme = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return readme


def main() -> None:
    """Rewrite the README."""
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
