"""Links from pages to files of the repository outside of ``docs/``, which GitHub follows and the site does not have.

``[step.py](../src/cmacc/pretraining/step.py)`` becomes the name of the file; a path that is not there is an error.
"""

import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>(?:\.\./)+[^)#]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the source of each page."""
    here = (_ROOT / "docs" / page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        target = (here / link["target"]).resolve()
        if target.is_relative_to(_ROOT / "docs"):
            return link[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: there is no {link['target']}")
        return link["text"]

    return _LINK.sub(plain, markdown)
