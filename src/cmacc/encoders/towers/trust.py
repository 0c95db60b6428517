"""Consent to run a user's own code: `python:` towers are imported only within `trusting_code`.

A name of a tower may come from someone else's config, checkpoint or export; opening that must not run code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_trusted = ContextVar("_is_trusted", default=False)


@contextmanager
def trusting_code() -> Iterator[None]:
    """Within it, `python:` towers may be imported."""
    token = _is_trusted.set(True)
    try:
        yield
    finally:
        _is_trusted.reset(token)


def is_trusting_code() -> bool:
    """Whether the caller is within `trusting_code`."""
    return _is_trusted.get()
