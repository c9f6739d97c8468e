"""The commands that need a profile only, no model: plan, frontier and diff.

They answer at once, or in seconds.
"""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantizer.known_error import ExitCode
from service.cli.console import out, print_json, print_pairs, told_errors
from service.cli.files import check_new, read_text_file, write_new
from service.errors import RequestError
from service.storage.profile_store import read_profile

if TYPE_CHECKING:
    from allocator.demands.constraints import Constraints

ProfileFolder = Annotated[
    Path, typer.Argument(metavar="PROFILE", help="Folder that `bitwright profile` wrote.")
]
Coupling = Annotated[
    str, typer.Option(help="Which pairs of layers the plan couples: full, block or none.")
]
Target = Annotated[
    str,
    typer.Option(
        help=(
            "Engine that will serve the model: transformers, vllm, sglang or llama.cpp; ties "
            "what it fuses."
        )
    ),
]
Ties = Annotated[
    list[str] | None,
    typer.Option(
        "--tie", help="Layers of a block that must agree: '*.q_proj,*.o_proj'. May be repeated."
    ),
]
Untied = Annotated[
    list[str] | None,
    typer.Option("--untie", help="Layers that choose alone although the target fuses them."),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help=(
            "'*.down_proj=int4g64s6', '*!=int2g128s6', '*.self_attn.*>=3' (bits); read in order, "
            "the last wins."
        ),
    ),
]
Pools = Annotated[
    list[str] | None,
    typer.Option("--pool", help="A device with its own limit: 'gpu0:model.layers.[0-9].*=40MB'."),
]
Latency = Annotated[
    Path | None, typer.Option(help="CSV of layer times: columns layer, fidelity, latency_us.")
]
MostLatency = Annotated[
    float | None,
    typer.Option("--max-latency-us", help="Most microseconds that all layers take together."),
]
Distinct = Annotated[
    int | None, typer.Option("--distinct", help="Most distinct fidelities in the plan.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def plan(
    profile_folder: ProfileFolder,
    budget: Annotated[
        str | None, typer.Option("--budget", help="2.5bpw, 1.2GiB, 900MB or 123456B.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl", help="Instead of a budget: the smallest plan predicted to lose no more."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", help="Price this plan, edited by hand, instead of making one."),
    ] = None,
    coupling: Coupling = "full",
    target: Target = "transformers",
    tie: Ties = None,
    untie: Untied = None,
    rule: Rules = None,
    pool: Pools = None,
    latency: Latency = None,
    max_latency_us: MostLatency = None,
    distinct: Distinct = None,
    out_file: Annotated[Path, typer.Option("--out", help="New file for the plan.")] = Path(
        "plan.json"
    ),
    as_json: AsJson = False,
) -> None:
    """Choose the fidelity of each layer for a budget, from a stored profile, with a proof of how good the choice is."""
    with told_errors(as_json=as_json):
        from allocator.answers.frontier import smallest_plan  # noqa: PLC0415
        from allocator.answers.whatif import WhatIf  # noqa: PLC0415
        from allocator.demands.budget import Budget  # noqa: PLC0415

        measured = read_profile(profile_folder).with_coupling(coupling)
        constraints = constraints_of(
            target, tie, untie, rule, pool, latency, max_latency_us, distinct
        )
        budget_bytes = (
            None if budget is None else Budget.parse(budget).weight_bytes(measured.layers)
        )
        if check is not None:
            _check(WhatIf(measured, constraints), check, budget_bytes, as_json=as_json)
            return
        if (budget_bytes is None) == (max_kl is None):
            raise RequestError("give either --budget or --max-kl")
        if max_kl is not None and not isfinite(max_kl):
            raise RequestError(
                f"a predicted KL of at most {max_kl}: give a number of nats per token"
            )
        check_new(out_file)
        whatif = WhatIf(measured, constraints)
        extra: dict[str, Any] = {}
        if budget_bytes is not None:
            allocation = whatif.plan(budget_bytes)
        else:
            smallest = smallest_plan(whatif, float(max_kl or 0))
            allocation, extra = smallest.allocation, {"bound_bytes": smallest.bound_bytes}
        document = allocation.to_json() | extra
        write_new(out_file, allocation.dumps().encode())
        if as_json:
            print_json(document)
            return
        print_pairs(
            {key: value for key, value in document.items() if key not in ("layers", "decided_by")},
            as_json=False,
        )
        out.print(f"plan: {out_file.resolve()}", markup=False)


def frontier(
    profile_folder: ProfileFolder,
    points: Annotated[int, typer.Option(help="Budgets, evenly spaced in bytes.")] = 100,
    low: Annotated[
        str | None,
        typer.Option("--from", help="Smallest budget; default: what the profile is trusted for."),
    ] = None,
    high: Annotated[
        str | None,
        typer.Option("--to", help="Largest budget; default: what the profile is trusted for."),
    ] = None,
    coupling: Coupling = "full",
    target: Target = "transformers",
    tie: Ties = None,
    untie: Untied = None,
    rule: Rules = None,
    pool: Pools = None,
    latency: Latency = None,
    max_latency_us: MostLatency = None,
    distinct: Distinct = None,
    csv: Annotated[Path | None, typer.Option(help="New CSV file of all points.")] = None,
    png: Annotated[Path | None, typer.Option(help="New PNG picture.")] = None,
    html: Annotated[Path | None, typer.Option(help="New page with picture and table.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what each budget buys.

    Predicted loss, its proven bound, the price of a byte, and where the curve bends.
    """
    with told_errors(as_json=as_json):
        from allocator.answers.frontier import budgets_between  # noqa: PLC0415
        from allocator.answers.frontier import frontier as solve  # noqa: PLC0415
        from allocator.answers.whatif import WhatIf  # noqa: PLC0415
        from allocator.demands.budget import Budget  # noqa: PLC0415
        from service.report.frontier_table import FrontierTable, frontier_span  # noqa: PLC0415

        if points < 2:  # noqa: PLR2004
            raise RequestError(f"{points} points are no frontier; give 2 or more")
        measured = read_profile(profile_folder).with_coupling(coupling)
        whatif = WhatIf(
            measured,
            constraints_of(target, tie, untie, rule, pool, latency, max_latency_us, distinct),
        )
        ends = [
            None if text is None else Budget.parse(text).weight_bytes(measured.layers)
            for text in (low, high)
        ]
        span = frontier_span(whatif, *ends)
        check_new(csv, png, html)
        found = FrontierTable.of(measured, solve(whatif, budgets_between(*span, points)))
        for path, render in ((csv, found.csv), (png, found.png), (html, found.html)):
            if path is not None:
                write_new(path, render())
        if as_json:
            print_json(found.to_json())
            return
        out.print(found.console_table())
        for path in (csv, png, html):
            if path is not None:
                out.print(f"written: {path.resolve()}", markup=False)


def diff(
    before: Annotated[Path, typer.Argument(help="A plan.")],
    after: Annotated[Path, typer.Argument(help="Another plan for the same model.")],
    profile_folder: Annotated[
        Path | None, typer.Option("--profile", help="Profile that prices both.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how two plans differ: layers, bytes and, with a profile, predicted loss."""
    with told_errors(as_json=as_json):
        from rich.table import Table  # noqa: PLC0415

        from allocator.answers.difference import compare_plans  # noqa: PLC0415
        from quantizer.plans.plan import Plan  # noqa: PLC0415

        one, two = (
            Plan.loads(read_text_file(path, "plan")).without_embeddings for path in (before, after)
        )
        found = compare_plans(
            one, two, None if profile_folder is None else read_profile(profile_folder)
        ).to_json()
        if as_json:
            print_json(found)
            return
        table = Table("layer", "before", "after", "bytes")
        for change in found.pop("changes"):
            table.add_row(
                change["layer"], change["before"], change["after"], f"{change['bytes_more']:+,}"
            )
        out.print(table)
        print_pairs(found, as_json=False)


def _check(whatif: Any, path: Path, budget_bytes: int | None, *, as_json: bool) -> None:
    """Print what a plan costs and breaks; a broken plan ends with exit code 2."""
    from allocator.answers.difference import price_plan  # noqa: PLC0415
    from quantizer.plans.plan import Plan  # noqa: PLC0415

    found = price_plan(
        whatif, Plan.loads(read_text_file(path, "plan")).without_embeddings, budget_bytes
    )
    print_pairs(found.to_json(), as_json=as_json)
    if not found.sound:
        raise typer.Exit(ExitCode.BAD_INPUT)


def constraints_of(
    target: str,
    ties: list[str] | None,
    untied: list[str] | None,
    rules: list[str] | None,
    pools: list[str] | None,
    latency: Path | None,
    most_latency_us: float | None,
    most_distinct: int | None,
) -> "Constraints":
    """Return the constraints that options state.

    Raises:
        RuleError, BudgetError: an option cannot be understood.
        RequestError: the table of times cannot be read.
    """
    import io  # noqa: PLC0415

    from allocator.demands.constraints import Constraints, LatencyTable, Pool  # noqa: PLC0415
    from allocator.demands.rules import Rule  # noqa: PLC0415

    return Constraints(
        target=target,
        ties=tuple(ties or ()),
        untied=tuple(untied or ()),
        rules=tuple(Rule.parse(text) for text in rules or ()),
        pools=tuple(Pool.parse(text) for text in pools or ()),
        latency=None
        if latency is None
        else LatencyTable.read(io.StringIO(read_text_file(latency, "latency table"))),
        most_latency_us=most_latency_us,
        most_distinct=most_distinct,
    )
