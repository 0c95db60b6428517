"""Pages in frames: those that are made or left by a command, and what protects from them."""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from starlette.responses import HTMLResponse, Response

from cmacc.app.rendering import render
from cmacc.clips.progress import Progress

# A page from a run folder may have been changed by anyone who can write there. It runs no script and fetches nothing.
STORED_PAGE_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; frame-ancestors 'self'"
)
_MOST_BYTES = 64 * 2**20


class PageError(ValueError):
    """A page that cannot be shown; the message says why."""


class StoppedError(Exception):
    """Someone stopped the making of a page."""


class MadePage:
    """A page that takes long to make. It is kept in memory, for all visitors.

    Parameters
    ----------
    make
        Makes the page, and tells its progress.
    left
        The page that a command left in a file, if there is one.

    Attributes
    ----------
    text
        The page that was made; None before.
    times_made
        How often one was made.
    is_being_made
        Whether it is being made now.
    """

    def __init__(self, make: Callable[[Progress], str], left: Callable[[], Path | None]) -> None:
        self._make = make
        self._stop = threading.Event()
        self.left = left
        self.text: str | None = None
        self.times_made = 0
        self.is_being_made = False

    def make(self, progress: Progress) -> None:
        """Make it, again if it is there already.

        Raises
        ------
        StoppedError
            `stop` was called meanwhile.
        ValueError, OSError
            It cannot be made.
        """
        self._stop.clear()

        def told(what: str, done: int, total: int) -> None:
            if self._stop.is_set():
                raise StoppedError
            progress(what, done, total)

        self.is_being_made = True
        try:
            self.text = self._make(told)
            self.times_made += 1
        finally:
            self.is_being_made = False

    def stop(self) -> None:
        """Stop making it, at the next step."""
        self._stop.set()


def frame(address: str, title: str, wait: str, *, scripts: bool = False) -> str:
    """A frame that fills the view with one of our pages.

    Parameters
    ----------
    address
        Its route.
    title
        What it shows, for screen readers.
    wait
        What is said until the page is there.
    scripts
        Whether the page is ours and may run scripts.
    """
    return render("frame.html.j2", address=address, title=title, wait=wait, scripts=scripts)


def stored_page(text: str | bytes, status: int = 200) -> Response:
    """The response with a page of results."""
    headers = {
        "Content-Security-Policy": STORED_PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(text, status, headers=headers)


def read_page(path: Path) -> bytes:
    """A page that a command left. Not through a link: it could lead to any file.

    Raises
    ------
    PageError
        It is gone, no ordinary file, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise PageError(f"{path.name}: cannot be read ({error.strerror})") from error
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_BYTES:
            raise PageError(f"{path.name}: must be a file of at most {_MOST_BYTES >> 20} MB, got another thing")
        return file.read(_MOST_BYTES)


def stamp_of(folder: Path, *names: str) -> tuple[tuple[int, int] | None, ...]:
    """Size and time of change of files; None for those that are not there."""
    stamps: list[tuple[int, int] | None] = []
    for name in names:
        try:
            facts = (folder / name).stat()
            stamps.append((facts.st_size, facts.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return tuple(stamps)
