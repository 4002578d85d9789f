"""Figures as SVG to stand inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Stands for the text's colour until the page decides; nothing else has it.
_INK = "#010203"


@contextmanager
def ink() -> Iterator[None]:
    """Draw what is drawn within in the colour of the surrounding text, on no background."""
    import matplotlib

    with matplotlib.rc_context(
        {
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "legend.facecolor": "none",
        }
    ):
        yield


def inline_svg(plot: Callable[[], Figure], name: str) -> str:
    """A figure as an ``<svg>`` element in the text's colour, light or dark.

    Args:
        plot: Draws the figure.
        name: Begins the element's ids, so that several figures can stand in one page.

    Returns:
        The element; it refers to nothing outside.

    Example:
        >>> from matplotlib.figure import Figure
        >>> inline_svg(lambda: Figure(), "empty")[:4]
        '<svg'
    """
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    buffer = io.StringIO()
    with ink():
        plot().savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return re.sub(r"url\(#", f"url(#{name}-", text)
