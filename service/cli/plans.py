"""The commands that need a profile and no model: plan, frontier and diff.

They answer at once, or in seconds.
"""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from allocator.answers.answer import answer_budget, answer_loss
from allocator.answers.difference import compare_plans
from allocator.answers.frontier import budgets_between
from allocator.answers.frontier import frontier as solve
from allocator.answers.layer_budget import layer_bytes
from allocator.answers.pricing import price_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.budget import Budget
from quantizer.known_error import ExitCode
from service.cli.console import out, print_json, print_pairs
from service.cli.files import check_new, read_latency, read_plan, write_new
from service.cli.parameters import OPTIONS, AsJson, LatencyFile, ProfileFolder
from service.report.frontier_table import FrontierTable, frontier_span
from service.request.constraints import (
    CouplingOption,
    ExactQuestion,
    FrontierQuestion,
    PlanConstraints,
    PlanQuestion,
)
from service.storage.profile_store import read_profile


class AskOptions(PlanConstraints, CouplingOption):
    """What a profile is asked under."""

    def whatif(self, profile: Path, latency: Path | None) -> WhatIf:
        """Return the solver of a stored profile under the constraints.

        Raises:
            RequestError: a file cannot be read.
            ProfileError: the profile is damaged.
            RuleError, BudgetError: a constraint cannot be understood.
        """
        measured = read_profile(profile).with_coupling(self.coupling)
        return WhatIf(measured, self.constraints(read_latency(latency)))


QUESTION, FRONTIER, ASK = PlanQuestion(), FrontierQuestion(), AskOptions()


def plan(
    profile_folder: ProfileFolder,
    /,
    *,
    question: Annotated[PlanQuestion, OPTIONS] = QUESTION,
    ask: Annotated[AskOptions, OPTIONS] = ASK,
    latency: LatencyFile = None,
    check: Annotated[
        Path | None,
        Parameter(help="Price this plan, such as one edited by hand, instead of choosing one."),
    ] = None,
    out_file: Annotated[Path, Parameter(help="New file for the plan.")] = Path("plan.json"),
    as_json: AsJson = False,
) -> int | None:
    """Choose the fidelity of each layer for a budget, with a proof of how good the choice is."""
    whatif = ask.whatif(profile_folder, latency)
    if check is not None:
        return _check(whatif, check, question, as_json=as_json)
    exact = ExactQuestion.checked(**question.model_dump())
    check_new(out_file)
    if exact.budget is not None:
        answer = answer_budget(whatif, Budget.parse(exact.budget), exact.budget_of)
    else:
        answer = answer_loss(whatif, float(exact.max_kl or 0))
    document = answer.to_json()
    write_new(out_file, (json.dumps(document, indent=1) + "\n").encode())
    if as_json:
        print_json(document)
        return None
    summary = {key: row for key, row in document.items() if key not in ("layers", "decided_by")}
    print_pairs(summary, as_json=False)
    out.print(f"plan: {out_file.resolve()}", markup=False)
    return None


def frontier(
    profile_folder: ProfileFolder,
    /,
    *,
    question: Annotated[FrontierQuestion, OPTIONS] = FRONTIER,
    ask: Annotated[AskOptions, OPTIONS] = ASK,
    latency: LatencyFile = None,
    csv: Annotated[Path | None, Parameter(help="New CSV file of all points.")] = None,
    png: Annotated[Path | None, Parameter(help="New PNG picture.")] = None,
    html: Annotated[Path | None, Parameter(help="New page with picture and table.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the loss of the best plan of each budget, its bound, and the price of a byte."""
    whatif = ask.whatif(profile_folder, latency)
    profile = whatif.profile
    ends = [
        None if text is None else layer_bytes(profile, Budget.parse(text), question.budget_of)
        for text in (question.low, question.high)
    ]
    span = frontier_span(whatif, *ends)
    check_new(csv, png, html)
    budgets = budgets_between(*span, question.points)
    found = FrontierTable.of(profile, solve(whatif, budgets))
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
    before: Annotated[Path, Parameter(help="A plan.")],
    after: Annotated[Path, Parameter(help="Another plan for the same model.")],
    /,
    *,
    profile_folder: Annotated[
        Path | None, Parameter(help="Profile that predicts the loss of both.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how two plans differ: layers, bytes and, with a profile, predicted loss."""
    one, two = (read_plan(path).without_embeddings for path in (before, after))
    profile = None if profile_folder is None else read_profile(profile_folder)
    found = compare_plans(one, two, profile).to_json()
    if as_json:
        print_json(found)
        return
    table = Table("layer", "before", "after", "bytes")
    for change in found.pop("changes"):
        more = f"{change['bytes_more']:+,}"
        table.add_row(change["layer"], change["before"], change["after"], more)
    out.print(table)
    print_pairs(found, as_json=False)


def _check(whatif: WhatIf, path: Path, question: PlanQuestion, *, as_json: bool) -> int | None:
    """Print the price of a plan and what it breaks; return the exit code of a broken plan."""
    plan = read_plan(path)
    most = None
    if question.budget is not None:
        budget = Budget.parse(question.budget)
        most = layer_bytes(whatif.profile, budget, question.budget_of, plan)
    found = price_plan(whatif, plan.without_embeddings, most)
    print_pairs(found.to_json(), as_json=as_json)
    return None if found.sound else ExitCode.BAD_INPUT
