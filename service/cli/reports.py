"""The command `report`, and the summary of a report that `run` prints too."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from service.cli.console import out, print_json
from service.cli.files import read_text_file
from service.cli.parameters import AsJson
from service.errors import RequestError
from service.report.document import Report
from service.report.summary import summary_rows


def report(
    folder: Annotated[Path, Parameter(help="Output folder of `bitwright run`.")],
    /,
    *,
    as_json: AsJson = False,
) -> None:
    """Show the report of a finished run.

    Raises:
        RequestError: there is none that can be read.
    """
    file = folder / "report.json"
    if not file.exists():
        raise RequestError(
            f"folder {str(folder)!r} has no report.json; give the output folder of `bitwright run`"
        )
    try:
        document = json.loads(read_text_file(file, "report"))
    except ValueError as error:
        raise RequestError(f"report in {str(folder)!r} is not JSON: {error}") from error
    if as_json:
        print_json(document)
    else:
        print_report(Report.from_json(document))


def print_report(report: Report) -> None:
    """Print the summary of a report on stdout."""
    table = Table(
        "model",
        "bits per weight",
        "layer bytes",
        "perplexity",
        escape("KL [nats/token]"),
        title=report.model.name,
    )
    for row in summary_rows(report):
        table.add_row(*row)
    out.print(table)
    used = report.plan_bytes / report.budget_bytes
    out.print(
        f"budget {report.budget} = {report.budget_bytes:,} bytes, plan "
        f"{report.plan_bytes:,} bytes ({used:.2%}), "
        f"weight files {report.checkpoint_bytes:,} bytes (original {report.original_bytes:,})"
    )
    for note in report.notes:
        out.print(f"note: {note}", markup=False)
