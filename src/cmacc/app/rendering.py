"""What all parts of the page say things with: templates, messages, and errors in words for visitors."""

import re

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z][\w+.-]*:/)?/(?:[^/:,]+/)+")


def render(template: str, **values: object) -> str:
    """Render a template of the app; every value is escaped."""
    return _TEMPLATES.get_template(template).render(values)


def message(text: str, *, is_fault: bool = False) -> str:
    """A sentence in the place of results or of a page."""
    return render("message.html.j2", text=text, is_fault=is_fault)


def without_paths(error: Exception) -> str:
    """The message of an error in one line, without the folders of the server.

    Examples
    --------
    >>> without_paths(ValueError("query /home/ann/my films/a.mp4: must have a sound"))
    'query a.mp4: must have a sound'
    >>> without_paths(ValueError("got 1/2 and 3/4"))
    'got 1/2 and 3/4'
    """
    return _FOLDERS.sub("", " ".join(str(error).split()))


_TEMPLATES = Environment(
    loader=ChoiceLoader([PackageLoader("cmacc.app"), PackageLoader("cmacc.viewer")]),  # the style is the reports'
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
