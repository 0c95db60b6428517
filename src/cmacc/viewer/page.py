"""The page's looks: one style sheet for light and dark, and the few pieces of HTML that sections are made of.

Nothing on the page comes from the network; the content security policy makes the browser hold us to it. Every string
that comes from a file goes through `escape`.
"""

import html
from collections.abc import Sequence
from importlib.resources import files
from string import Template

# Colours that figures use by name. SVG inside HTML understands CSS variables, so that one figure serves light and dark.
COLOURS = ("ink", "muted", "rule", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")

_STYLE = files("cmacc.viewer").joinpath("style.css").read_text(encoding="utf-8")

_PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title><style>$style</style></head><body><main>
$body
</main></body></html>
"""
)


def escape(value: object) -> str:
    """Any value as text that HTML takes for text, in elements and in quoted attributes."""
    return html.escape(str(value), quote=True)


def page(title: str, body: str, style: str = "") -> str:
    """A whole document. ``title`` is plain text, ``body`` is HTML, ``style`` holds CSS rules of this page alone."""
    return _PAGE.substitute(title=escape(title), style=_STYLE + style, body=body)


def section(anchor: str, heading: str, *parts: str) -> str:
    """A section with a heading of its own; ``parts`` are HTML."""
    return f'<section id="{anchor}"><h2>{heading}</h2>\n' + "\n".join(parts) + "\n</section>"


def note(text: str) -> str:
    """A remark that stands out; ``text`` is HTML."""
    return f'<p class="note">{text}</p>'


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it.

    Examples
    --------
    >>> duration(42.3), duration(754.0), duration(9000.0), duration(3599.9)
    ('42 s', '12.6 min', '2.5 h', '60.0 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def tiles(shown: Sequence[tuple[str, str, str]]) -> str:
    """The figures that matter most: (value, what it is, what to see beside it) each, as HTML."""
    cells = "".join(
        f'<div class="tile"><b>{value}</b>{what}<span>{beside}</span></div>' for value, what, beside in shown
    )
    return f'<div class="tiles">{cells}</div>'


def figure(title: str, svg: str, caption: str, legend: Sequence[tuple[str, str, str]] = (), kind: str = "") -> str:
    """A figure with its caption; ``legend`` holds (colour name, plain text, mark: line, dot, square or triangle)."""
    keys = "".join(
        f'<span><i class="{mark}" style="background:var(--{colour})"></i>{escape(text)}</span>'
        for colour, text, mark in legend
    )
    keys = f'<div class="legend">{keys}</div>' if keys else ""
    heading = f"<b>{title}</b>" if title else ""
    return f'<figure class="{kind}">{heading}{keys}{svg}<figcaption>{caption}</figcaption></figure>'
