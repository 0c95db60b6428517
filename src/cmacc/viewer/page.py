"""Render pages from the templates in this folder: Python computes values, templates hold the markup.

Every value in a template is escaped unless it is `Markup`, which only drawings are. Nothing on a page comes from the
network; the content security policy makes the browser enforce this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cmacc.clips.storage import written_aside

Legend = Sequence[tuple[str, str, str]]
"""(colour name, text, mark) of each entry; marks are line, dot, square, diamond or triangle."""


class ReportError(ValueError):
    """A page that cannot be made or written; the message says why, and how to proceed."""


@dataclass(frozen=True)
class Figure:
    """A drawing (an ``<svg>``, or the URL of an image) with its title, caption and legend as plain text."""

    title: str
    drawing: Markup | str
    caption: str
    legend: Legend = ()


def render(template: str, **values: object) -> str:
    """Render a template. A missing value is an error."""
    return _TEMPLATES.get_template(template).render(values)


def check_out(what: str, out: Path, overwrite: bool) -> None:
    """Check the path of a page before the work for it is done.

    Raises
    ------
    ReportError
        The path is a folder, or a file that may not be replaced.
    """
    if out.is_dir():
        raise ReportError(f"{what} {out}: must be a file, got a folder; name a file in it, as {out / f'{what}.html'}")
    if out.exists() and not overwrite:
        raise ReportError(f"{what} {out}: exists already; give --overwrite to replace it, or choose another --out")


def write_page(out: Path, text: str) -> Path:
    """Write a page atomically."""
    with written_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return out


def duration(seconds: float) -> str:
    """A duration in a suitable unit.

    Examples
    --------
    >>> duration(42.3), duration(754.0), duration(9000.0), duration(3599.9)
    ('42 s', '12.6 min', '2.5 h', '60.0 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def counted(count: int, what: str, plural: str = "") -> str:
    """
    >>> counted(1, "seed"), counted(1200, "step"), counted(2, "class", "classes")
    ('1 seed', '1,200 steps', '2 classes')
    """
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def listed(names: Sequence[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cmacc.viewer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["commas"] = lambda number: f"{number:,}"
    environment.filters["counted"] = counted
    return environment


_TEMPLATES = _environment()
