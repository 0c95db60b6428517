"""Which window of a file becomes a clip: pure functions of numbers, which can be tested without files."""

import math

import numpy as np

_LEAST_SLACK = 0.01


def random_start(duration_seconds: float, length_seconds: float, rng: np.random.Generator) -> float:
    """Draw the start of a window uniformly among the windows within the file.

    For a file shorter than the window, the window is centred on it and extends over both ends.

    Parameters
    ----------
    duration_seconds
        Length of the file.
    length_seconds
        Length of the window.
    rng
        Source of randomness; exactly one number is drawn.

    Returns
    -------
    float
        ``start_seconds``; negative only for a file shorter than the window.
    """
    slack = duration_seconds - length_seconds
    draw = rng.random()
    return slack * draw if slack > 0 else slack / 2


def spread_starts(duration_seconds: float, length_seconds: float, count: int) -> list[float]:
    """Spread ``count`` windows evenly over the file; a single window is in the middle.

    All windows are in the middle if the file is less than one percent longer than a window: recordings of "5 s" are
    often a millisecond longer, and ten windows of 5 s would be one, decoded ten times.

    Raises
    ------
    ValueError
        ``count`` is below 1.

    Examples
    --------
    >>> spread_starts(10.0, 2.0, 1)
    [4.0]
    >>> spread_starts(10.0, 2.0, 3)
    [0.0, 4.0, 8.0]
    """
    if count < 1:
        raise ValueError(f"spread_starts: count must be at least 1, got {count}")
    slack = duration_seconds - length_seconds
    if slack <= _LEAST_SLACK * length_seconds or count == 1:
        return [slack / 2] * count
    return [float(start) for start in np.linspace(0.0, slack, count)]


def covering_starts(duration_seconds: float, length_seconds: float, hop_seconds: float) -> list[float]:
    """Windows that cover the file: one every ``hop_seconds``, and a last one that ends where the file ends.

    The last one is omitted if the others leave at most one percent of a window uncovered. A file less than one percent
    longer than a window has a single window, in the middle; its start is negative if the file is shorter.

    Parameters
    ----------
    duration_seconds
        Length of the file.
    length_seconds
        Length of a window.
    hop_seconds
        From the start of a window to that of the next; at most ``length_seconds``.

    Returns
    -------
    list of float
        Starts in seconds, ascending. No window of a longer file exceeds it.

    Raises
    ------
    ValueError
        A length is not positive and finite, or ``hop_seconds`` exceeds ``length_seconds``.

    Examples
    --------
    >>> covering_starts(4.5, 2.0, 1.0)
    [0.0, 1.0, 2.0, 2.5]
    >>> covering_starts(4.01, 2.0, 1.0)
    [0.0, 1.0, 2.0]
    >>> covering_starts(1.0, 2.0, 1.0)
    [-0.5]
    """
    count = covering_count(duration_seconds, length_seconds, hop_seconds)
    return [covering_start(duration_seconds, length_seconds, hop_seconds, number) for number in range(count)]


def covering_count(duration_seconds: float, length_seconds: float, hop_seconds: float) -> int:
    """Number of the windows of `covering_starts`, without a list of them; raises the same errors."""
    for name, value in (("duration_seconds", duration_seconds), ("length_seconds", length_seconds)):
        if not 0 < value < math.inf:
            raise ValueError(f"covering_starts: {name} must be positive and finite, got {value}")
    if not 0 < hop_seconds <= length_seconds:
        raise ValueError(
            f"covering_starts: hop_seconds must be positive and at most length_seconds ({length_seconds:g}), "
            f"or parts of the file are in no window, got {hop_seconds}"
        )
    slack, least = duration_seconds - length_seconds, _LEAST_SLACK * length_seconds
    if slack <= least:
        return 1
    hops = math.floor(slack / hop_seconds)
    return hops + 1 + (slack - hops * hop_seconds > least)


def covering_start(duration_seconds: float, length_seconds: float, hop_seconds: float, number: int) -> float:
    """Start of one window of `covering_starts`, counted from 0."""
    slack = duration_seconds - length_seconds
    return slack / 2 if slack <= _LEAST_SLACK * length_seconds else min(number * hop_seconds, slack)
