"""The rim of the command line.

Progress and messages on stderr, data on stdout, errors as exit codes.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from quantizer.durable import Progress as OnProgress
from quantizer.known_error import ExitCode, KnownError
from service.logs import err
from service.process import keep_freed_memory
from service.report.document import Report
from service.report.summary import summary_rows
from service.stages.progress import Reporter

LINE_SECONDS = 15
"""Shortest time between two lines of progress of one step."""

WIDE = 160
"""Columns of a table that goes into a pipe or a file, where nobody resizes the window.

Names of layers fit.
"""

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)


class Bars:
    """A reporter that draws one bar for each step, with the time left."""

    def __init__(self, progress: Progress) -> None:
        """Draw on `progress`."""
        self._progress = progress

    def step(self, label: str) -> OnProgress:
        """Start a bar."""
        task = self._progress.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        return update


class Lines:
    """A reporter for logs: one line of progress now and then, with the time left."""

    def __init__(self) -> None:
        """Start the clock."""
        self._heard = time.monotonic()

    def step(self, label: str) -> OnProgress:
        """Announce a step; it starts when the step before it ends."""
        start = last = 0.0

        def update(done: int, total: int) -> None:
            nonlocal start, last
            now = time.monotonic()
            start = start or self._heard
            self._heard = now
            if done < total and now - last < LINE_SECONDS:
                return
            last = now
            left = (now - start) * (total - done) / done
            err.print(
                f"{label}: {done}/{total}, {now - start:.0f} s, {left:.0f} s left", highlight=False
            )

        return update


@contextmanager
def reporting() -> Iterator[Reporter]:
    """Show progress on stderr while a command works, and then ends.

    Bars on a terminal, lines elsewhere.
    """
    keep_freed_memory()
    if not err.is_terminal:
        yield Lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield Bars(progress)


@contextmanager
def told_errors(*, as_json: bool) -> Iterator[None]:
    """Turn known errors into one sentence and an exit code; bugs keep their traceback."""
    try:
        yield
    except KnownError as error:
        tell_error(error, as_json=as_json)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        err.print(
            "stopped; run the same command again to go on from the last finished block",
            style="yellow",
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from error


def tell_error(error: KnownError, *, as_json: bool) -> None:
    """Say what is wrong: as a sentence on stderr, and with --json also as a document on stdout."""
    err.print(f"[bold red]error[/] {type(error).__name__}: ", end="")
    err.print(str(error), markup=False, highlight=False)
    if as_json:
        document: dict[str, Any] = {
            "error": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
        }
        print_json(document | error.details)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def print_pairs(pairs: dict[str, Any], *, as_json: bool) -> None:
    """Print names and values on stdout, one a line or as JSON."""
    if as_json:
        print_json(pairs)
        return
    for key, value in pairs.items():
        out.print(f"{key}: {value}", markup=False)


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
