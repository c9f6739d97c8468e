"""Tables of time and memory, in Markdown."""

from typing import Any

from tests.benchmarks.stored import processor_of


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
        (row["command"], processor_of(row)): row for row in commands
    }.items():
        memory = row["peak_memory_bytes"]
        gigabytes = f"{memory / 1e9:.1f} GB" if memory else ""
        cores, minutes = row["circumstances"]["cores"], row["wall_seconds"] / 60
        lines.append(f"| `{command}` | {cores} | {processor} | {minutes:.1f} | {gigabytes} |")
    return "\n".join(lines)


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
        (row["label"], processor_of(row), row["prompt_tokens"]): row for row in rows
    }.values():
        cells = [row["label"], processor_of(row), f"{row['prompt_tokens']} tokens"]
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
    """Return the table of the speed of packed layers, in Markdown.

    A figure is how many times faster than bfloat16 the four layers of a block are together.
    """
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
        machine = row["gpu"] or f"{processor_of(row)}, {row['circumstances']['cores']} cores"
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
    """Return the table of registers, shared memory and stack of compiled kernels, in Markdown."""
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
