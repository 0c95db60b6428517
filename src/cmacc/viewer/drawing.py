"""Common parts of all figures: matplotlib's settings, a figure with axes, and its conversion to SVG."""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Placeholder colours that matplotlib accepts, by their names in style.css. The SVG gets the CSS variables of the page
# instead, so that one figure works with the light and the dark theme.
COLOURS = ("ink", "muted", "rule", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
INK = {name: f"#0b{i:02x}fe" for i, name in enumerate(COLOURS)}

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cmacc",  # otherwise ids are random, and reports are not reproducible
    "font.size": 8.5,
    "axes.edgecolor": INK["rule"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK["rule"],
    "grid.linewidth": 0.5,
    "xtick.color": INK["rule"],
    "ytick.color": INK["rule"],
    "xtick.labelcolor": INK["muted"],
    "ytick.labelcolor": INK["muted"],
    "axes.labelcolor": INK["muted"],
    "axes.formatter.useoffset": False,
}
# matplotlib's settings are those of the whole process: whoever draws in one of several threads holds this lock.
DRAWING = threading.RLock()


@contextmanager
def sheet_of(width_inches: float, height_inches: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of that size with one set of axes. Draw and convert it within the ``with`` block."""
    with DRAWING, matplotlib.rc_context(_SETTINGS):
        sheet = Figure(figsize=(width_inches, height_inches), layout="constrained")
        yield sheet, sheet.add_subplot()


def number_axis(axes: Axes, label: str, *, whole: bool = False) -> None:
    """A horizontal axis of numbers (``whole``: integers only), with few ticks on both axes."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label)


def short_number(value: float, _: object = None) -> str:
    """A number in few characters; the second argument is for matplotlib's formatters.

    Examples
    --------
    >>> [short_number(v) for v in (0.0, 0.001, 2.5, 1200.0)]
    ['0', '0.001', '2.5', '1,200']
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def as_svg(sheet: Figure) -> Markup:
    """The figure as ``<svg>`` with the colours of the page. The same figure gives the same text."""
    file = io.StringIO()
    sheet.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # The metadata contains URLs, the style element would apply to the whole page, and group ids would clash.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # A hundredth of a point is finer than any screen. In tags only: tick labels are the text between them.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag[0]), svg)
    for name, stand_in in INK.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return Markup(re.sub(r"\n\s*", "\n", svg).strip())
