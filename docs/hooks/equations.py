"""Draws the equations of a page as SVG when the site is built, so that no script from a CDN has to.

Pages hold TeX between dollar signs, which GitHub shows as mathematics too. `pymdownx.arithmatex` marks it; this hook
sets it by matplotlib's mathtext, whose glyphs become paths in the colour of the text. Mathtext knows no environments
(``\\begin``): write one equation for a line.
"""

import html
import re
from typing import Any

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import text_to_path

_MARKED = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.DOTALL)
# Paths are set at this size and scaled to the text around them by units of em.
_FONT = FontProperties(math_fontfamily="stix", size=100)
# STIX has a smaller x-height than the sans-serif fonts of the pages.
_SCALE = 1.12
_LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return _MARKED.sub(lambda found: _svg(found["tex"], displayed=found["tag"] == "div"), html)


def _svg(escaped_tex: str, displayed: bool) -> str:
    tex = " ".join(html.unescape(escaped_tex).split())
    source = rf"${tex}$"
    width, height, descent = text_to_path.get_text_width_height_descent(source, _FONT, ismath=True)
    vertices, codes = text_to_path.get_text_path(_FONT, source, ismath=True)
    points = [f"{x:.1f} {height - descent - y:.1f}" for x, y in vertices]
    parts, position = [], 0
    while position < len(points):
        code = codes[position]
        count = {Path.CURVE3: 2, Path.CURVE4: 3}.get(code, 1)
        parts.append(_LETTERS[code] + ("" if code == Path.CLOSEPOLY else " ".join(points[position : position + count])))
        position += count
    # Glyphs reach a little over the box of their line.
    drawn = (
        f'<svg role="img" aria-label="{html.escape(tex)}" viewBox="-2 -6 {width + 4:.1f} {height + 12:.1f}" '
        f'style="width: {_SCALE * (width + 4) / 100:.3f}em; height: {_SCALE * (height + 12) / 100:.3f}em; '
        f'vertical-align: {-_SCALE * (descent + 6) / 100:.3f}em"><path d="{"".join(parts)}"/></svg>'
    )
    return f'<div class="equation">{drawn}</div>' if displayed else f'<span class="equation">{drawn}</span>'
