"""How long work tells how far it is: one kind of function for all of it, from scans to ablations."""

from collections.abc import Callable

# Takes what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def within(progress: Progress, where: str) -> Progress:
    """The same for a part of the work: ``what`` is told with ``where`` before it."""
    return lambda what, done, total: progress(f"{where}, {what}", done, total)
