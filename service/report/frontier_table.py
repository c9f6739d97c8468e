"""A frontier as a table, a CSV file, a picture and a page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from allocator.answers.frontier import Point
from allocator.answers.whatif import WhatIf
from allocator.profile import Profile
from service.errors import RequestError
from service.report.figure import png, svg
from service.report.frontier_picture import frontier_figure
from service.report.frontier_row import FrontierRow
from service.report.page_template import page_template

ROWS = 24
"""Rows of the table on a terminal, besides the knees."""

COLUMNS = tuple(field.name for field in fields(FrontierRow))


def frontier_span(whatif: WhatIf, low_bytes: int | None, high_bytes: int | None) -> tuple[int, int]:
    """Return the smallest and largest budget of a frontier.

    An end that is not given is where predictions of the profile still hold and a plan exists.

    Raises:
        RequestError: the smallest budget is not below the largest.
    """
    smallest, largest = whatif.byte_range
    trusted_low, trusted_high = whatif.profile.budget_range
    low = max(smallest, trusted_low) if low_bytes is None else low_bytes
    trusted_end = min(largest, trusted_high) if trusted_high >= smallest else largest
    high = trusted_end if high_bytes is None else high_bytes
    if high <= low:
        raise RequestError(
            f"a frontier from {low} to {high} bytes is empty; give a smallest budget below the "
            "largest"
        )
    return low, high


@dataclass(frozen=True, slots=True)
class FrontierTable:
    """The points of a frontier, ready to be shown.

    Attributes:
        title: what is shown, in a few words.
        rows: the points, by rising size.
    """

    title: str
    rows: tuple[FrontierRow, ...]

    @classmethod
    def of(cls, profile: Profile, points: Sequence[Point]) -> "FrontierTable":
        """Return the table of a frontier."""
        title = f"{len(profile.layers)} layers, signal {profile.signal}"
        return cls(title, tuple(FrontierRow.of(profile, point) for point in points))

    def to_json(self) -> dict[str, Any]:
        """Return the points as JSON values."""
        return {"title": self.title, "points": [asdict(row) for row in self.rows]}

    def csv(self) -> bytes:
        """Return the points as a CSV file."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue().encode()

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        return png(frontier_figure(self.rows))

    def html(self) -> bytes:
        """Return picture and table as one page without scripts or other files."""
        chart = Markup(svg(frontier_figure(self.rows)))  # noqa: S704  drawn here, from numbers
        page = page_template("frontier.html.j2").render(
            title=self.title, rows=self.rows, chart=chart
        )
        return page.encode()

    def console_table(self) -> Table:
        """Return some of the points, the knees among them, for a terminal."""
        heads = ("plan [bytes]", "bits", "KL", "bound", "gap", "KL per MB", "")
        table = Table(*heads, title=escape("predicted KL [nats/token]"))
        step = max(1, -(-len(self.rows) // ROWS))
        for at, row in enumerate(self.rows):
            if at % step and not row.knee and at != len(self.rows) - 1:
                continue
            table.add_row(
                f"{row.weight_bytes:,}",
                f"{row.bits_per_weight:.3f}",
                f"{row.predicted_kl_nats_per_token:.4f}",
                f"{row.bound_nats_per_token:.4f}",
                f"{row.gap:.2%}",
                f"{row.price_nats_per_token_per_byte * 1e6:.4f}",
                "knee" if row.knee else "",
                style="bold" if row.knee else None,
            )
        return table
