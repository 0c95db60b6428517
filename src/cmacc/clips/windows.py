"""Which window of a file becomes a clip: pure functions of numbers, which can be tested without files."""

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
