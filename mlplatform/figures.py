"""From a matplotlib figure to a picture an analyst sees in the UI.

Belongs here: a blank figure, PNG bytes, Markdown with the picture inside it, the colours all plots share.
Does not belong here: any particular plot; those live in the rooms whose numbers they show.
"""

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart with every common kind of colour blindness.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"

# The metadata of an event is stored with it and sent to the browser on every look: plots above this have gone wrong.
MAX_MARKDOWN_BYTES = 200_000


def blank(width_in: float = 6.4, height_in: float = 3.6) -> "tuple[Figure, Axes]":
    """One set of axes on a figure of its own. Never pyplot: its figures are global, and plots are drawn in threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def png(figure: "Figure") -> bytes:
    """The figure as PNG bytes (about 10 to 40 kB). No time stamp inside: the same numbers give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def markdown(picture: bytes, title: str) -> str:
    """Markdown showing the PNG `picture` without any file or server behind it.

    Raises ValueError above MAX_MARKDOWN_BYTES.
    """
    text = f"![{title}](data:image/png;base64,{base64.b64encode(picture).decode()})"
    if len(text) > MAX_MARKDOWN_BYTES:
        raise ValueError(f"plot '{title}' takes {len(text)} bytes as Markdown, more than {MAX_MARKDOWN_BYTES}: draw fewer points")
    return text
