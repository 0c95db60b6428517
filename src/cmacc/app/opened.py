"""What the page shows: an index, a run, or an index with the run that made it."""

from dataclasses import dataclass
from pathlib import Path

from cmacc.app.library import Library
from cmacc.search import Index


class AppError(ValueError):
    """A page that cannot be opened; the message says why."""


@dataclass(frozen=True)
class Opened:
    """What was opened.

    Attributes
    ----------
    name
        Name for the title of the page.
    library
        The files that may be shown.
    index
        The index to search in; None if a run was opened.
    run_dir
        Run folder: the one that was opened, or the one whose encoder made the index; None if there is none.
    """

    name: str
    library: Library
    index: Index | None
    run_dir: Path | None


def open_target(address: str, *, encoder: str | None = None, download: bool = False) -> Opened:
    """Open an index (folder or URL) or a run folder.

    Raises
    ------
    AppError
        It is neither.
    """
    raise NotImplementedError
