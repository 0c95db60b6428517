"""From scores of overlapping windows to segments with a start and an end.

A window that covers half of an event scores about half as high as one that lies in it. So a segment extends around a
peak as far as the score, linear between the centres of neighbouring windows, stays above half-way between the typical
score of the query and the peak: its full width at half maximum. For windows of length L and an event of at least L, the
crossing is where the window's centre passes the border of the event. An event shorter than a window gets about L.

What stands next to an event may be a little like it. So windows also have to score above nearly all random pairs
(``least_joined``). Where that is higher than half-way, the segment ends sooner, by less than half a window.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Segment(NamedTuple):
    """A stretch of one sample: its peak row, start and end in seconds on the file's clock."""

    row: int
    start_seconds: float
    end_seconds: float


def segments(
    scores: Float[np.ndarray, " rows"],
    first: Int[np.ndarray, " samples"],
    start_seconds: Float[np.ndarray, " rows"],
    end_seconds: Float[np.ndarray, " rows"],
    typical: float,
    least: float,
    count: int,
    least_joined: float = -np.inf,
) -> list[Segment]:
    """The best segments, best first; those of a sample do not overlap.

    Parameters
    ----------
    scores
        Score of every window. Windows of a sample stand together, in order of time.
    first
        ``(m + 1,)``: first row of every sample, and the number of rows.
    start_seconds, end_seconds
        Of every window.
    typical
        Typical score of the query: the median over the index.
    least
        Least score of a peak.
    count
        Most segments.
    least_joined
        Score that windows must have to join a peak, if that is higher than half-way to it.

    Examples
    --------
    >>> import numpy as np
    >>> scores = np.array([0.0, 0.0, 0.5, 1.0, 1.0, 0.5, 0.0])
    >>> starts = np.arange(7.0)
    >>> segments(scores, np.array([0, 7]), starts, starts + 2, typical=0.0, least=0.9, count=5)
    [Segment(row=3, start_seconds=3.0, end_seconds=6.0)]
    """
    found: list[Segment] = []
    own: dict[int, list[tuple[float, float]]] = {}
    taken = np.zeros(len(scores), bool)
    centres = (start_seconds + end_seconds) / 2
    # A maximum for each segment takes a hundredth of the time of sorting all rows, of which few become peaks.
    peaks = np.where(scores >= least, scores, -np.inf)
    while len(found) < count and len(peaks) > 0:
        row = int(np.argmax(peaks))
        if peaks[row] == -np.inf:
            break
        sample = int(np.searchsorted(first, row, side="right")) - 1
        begin, end = int(first[sample]), int(first[sample + 1])
        level = (float(scores[row]) + typical) / 2
        if level < least_joined < scores[row]:
            level = least_joined
        left = row
        while left > begin and scores[left - 1] >= level and not taken[left - 1]:
            left -= 1
        right = row
        while right + 1 < end and scores[right + 1] >= level and not taken[right + 1]:
            right += 1
        taken[left : right + 1] = True
        # A run that reaches the first or last window of the sample extends to its border.
        if scores[row] <= typical:  # no peak: half-way to its neighbours
            level = -np.inf
        start = start_seconds[left] if left == begin else _crossing(scores, centres, left - 1, left, level)
        stop = end_seconds[right] if right + 1 == end else _crossing(scores, centres, right + 1, right, level)
        # The border with a better segment is where that one ends.
        spans = own.setdefault(sample, [])
        start = max([start, *(other for _, other in spans if other <= centres[row])])
        stop = min([stop, *(other for other, _ in spans if other >= centres[row])])
        spans.append((start, stop))
        # A window that overlaps a segment scores high because of it, and is no peak of its own.
        peaks[begin:end][(end_seconds[begin:end] > start) & (start_seconds[begin:end] < stop)] = -np.inf
        found.append(Segment(row, float(start), float(stop)))
    return found


def _crossing(
    scores: Float[np.ndarray, " rows"],
    centres: Float[np.ndarray, " rows"],
    outside: int,
    inside: int,
    level: float,
) -> float:
    """Time between two neighbouring windows at which the score passes the level."""
    rise = scores[inside] - scores[outside]
    # A window of another segment may lie above the level; the border is then half-way.
    share = (scores[inside] - level) / rise if scores[outside] < level else 0.5
    return float(centres[inside] + (centres[outside] - centres[inside]) * share)
