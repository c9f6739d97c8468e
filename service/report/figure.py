"""Empty figures, and figures as SVG text."""

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
PLAN_COLOR = "#0b6e99"
UNIFORM_COLOR = "#b4540a"


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """Return a figure of a size in inches, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415  slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def svg(figure: "Figure") -> str:
    """Return a figure as an SVG element, the same for the same figure."""
    import matplotlib as mpl  # noqa: PLC0415  slow to import

    text = io.StringIO()
    style: Any = {
        "svg.hashsalt": "bitwright",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    with mpl.rc_context(style):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  slow to import

    data = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=160, metadata={"Software": None})
    return data.getvalue()
