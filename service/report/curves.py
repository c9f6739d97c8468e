"""A frontier as a table, a CSV file, a picture and a page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from allocator.answers.frontier import Point
from allocator.answers.whatif import WhatIf
from allocator.demands.menu import bpw
from allocator.profile import Profile
from service.errors import RequestError
from service.report import pictures

ROWS = 24
"""Rows of the table on a terminal, besides the knees."""

COLUMNS = (
    *(
        "budget_bytes",
        "weight_bytes",
        "bits_per_weight",
        "predicted_kl_nats_per_token",
        "bound_nats_per_token",
        "gap",
    ),
    *("price_nats_per_token_per_byte", "on_hull", "knee"),
)


def span_of(whatif: WhatIf, low_bytes: int | None, high_bytes: int | None) -> tuple[int, int]:
    """Return the ends of a frontier.

    Those asked for, else where the profile is trusted and something fits.

    Raises:
        RequestError: the ends are the wrong way round.
    """
    smallest, largest = whatif.byte_range
    trusted_low, trusted_high = whatif.profile.budget_range
    low = max(smallest, trusted_low) if low_bytes is None else low_bytes
    high = (
        (min(largest, trusted_high) if trusted_high >= smallest else largest)
        if high_bytes is None
        else high_bytes
    )
    if high <= low:
        raise RequestError(
            f"a frontier from {low} to {high} bytes is empty; give --from below --to"
        )
    return low, high


@dataclass(frozen=True, slots=True)
class FrontierTable:
    """The points of a frontier, ready to be shown.

    Attributes:
        title: what is shown, in a few words.
        rows: one for each point, by rising size, with the names in `COLUMNS`.
    """

    title: str
    rows: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, profile: Profile, points: Sequence[Point]) -> "FrontierTable":
        """Return the table of a frontier."""
        rows = []
        for point in points:
            found = point.allocation
            values = (
                *(
                    found.budget_bytes,
                    found.weight_bytes,
                    bpw(profile.layers, found.weight_bytes),
                    found.predicted_loss,
                ),
                *(found.bound, found.gap, found.price, point.on_hull, point.knee),
            )
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        return cls(f"{len(profile.layers)} layers, signal {profile.signal}", tuple(rows))

    def to_json(self) -> dict[str, Any]:
        """Return the points as JSON values."""
        return {"title": self.title, "points": list(self.rows)}

    def csv(self) -> bytes:
        """Return the points as a CSV file."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue().encode()

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        return pictures.frontier_png(self.rows)

    def html(self) -> bytes:
        """Return picture and table as one page, with no script and nothing beside it."""
        environment = Environment(
            loader=PackageLoader("service.report", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
        )
        chart = Markup(pictures.frontier_chart(self.rows))  # noqa: S704  drawn here, from numbers
        return (
            environment.get_template("frontier.html.j2")
            .render(title=self.title, rows=self.rows, chart=chart)
            .encode()
        )

    def console_table(self) -> Table:
        """Return some of the points, the knees among them, for a terminal."""
        table = Table(
            "plan [bytes]",
            "bits",
            "KL",
            "bound",
            "gap",
            "KL per MB",
            "",
            title=escape("predicted KL [nats/token]"),
        )
        step = max(1, -(-len(self.rows) // ROWS))
        for at, row in enumerate(self.rows):
            if at % step and not row["knee"] and at != len(self.rows) - 1:
                continue
            table.add_row(
                f"{row['weight_bytes']:,}",
                f"{row['bits_per_weight']:.3f}",
                f"{row['predicted_kl_nats_per_token']:.4f}",
                f"{row['bound_nats_per_token']:.4f}",
                f"{row['gap']:.2%}",
                f"{row['price_nats_per_token_per_byte'] * 1e6:.4f}",
                "knee" if row["knee"] else "",
                style="bold" if row["knee"] else None,
            )
        return table
