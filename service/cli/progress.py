"""Progress on stderr: bars on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantizer.durable import Progress as OnProgress
from service.logs import err
from service.process import keep_freed_memory
from service.stages.progress import Reporter

LINE_SECONDS = 15
"""Shortest time between two lines of progress of one step."""


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
