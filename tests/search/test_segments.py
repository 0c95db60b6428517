"""Segments against planted events: scores are the share of a window that an event covers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmacc.search import segments

LENGTH, HOP = 2.0, 1.0


def _covered(starts: np.ndarray, begin: float, end: float) -> np.ndarray:
    """Share of each window that lies within the event."""
    return np.clip(np.minimum(starts + LENGTH, end) - np.maximum(starts, begin), 0, None) / LENGTH


@given(
    begin=st.floats(3, 20),
    seconds=st.floats(2, 12),
    noise=st.integers(0, 100),
)
def test_start_and_end_of_an_event_are_found_within_half_a_window(begin: float, seconds: float, noise: int) -> None:
    starts = np.arange(0.0, 38.0)
    scores = _covered(starts, begin, begin + seconds) + np.random.default_rng(noise).uniform(-0.05, 0.05, len(starts))
    (found,) = segments(scores, np.array([0, len(starts)]), starts, starts + LENGTH, 0.0, 0.6, count=5)
    assert found.start_seconds == pytest.approx(begin, abs=LENGTH / 2)
    assert found.end_seconds == pytest.approx(begin + seconds, abs=LENGTH / 2)


def test_events_of_different_files_and_far_apart_are_not_joined() -> None:
    starts = np.concatenate([np.arange(0.0, 20.0), np.arange(0.0, 10.0)])
    scores = np.concatenate(
        [_covered(starts[:20], 2, 5) + 0.9 * _covered(starts[:20], 12, 15), 0.8 * _covered(starts[20:], 0, 4)]
    )
    found = segments(scores, np.array([0, 20, 30]), starts, starts + LENGTH, 0.0, 0.5, count=5)
    assert [(one.start_seconds, one.end_seconds) for one in found] == [(2, 5), (12, 15), (0, 4)]
    assert [scores[one.row] for one in found] == sorted((scores[one.row] for one in found), reverse=True)


def test_only_peaks_above_the_least_score_count_and_only_so_many() -> None:
    starts = np.arange(0.0, 30.0)
    scores = sum(height * _covered(starts, at, at + 3) for height, at in ((1.0, 2), (0.7, 10), (0.4, 20)))
    ask = (scores, np.array([0, 30]), starts, starts + LENGTH, 0.0)
    assert [one.start_seconds for one in segments(*ask, least=0.5, count=9)] == [2, 10]
    assert [one.start_seconds for one in segments(*ask, least=0.5, count=1)] == [2]
    assert segments(*ask, least=1.1, count=9) == []


@given(st.integers(0, 10_000), st.floats(0, 1.5))
def test_segments_of_a_file_never_overlap_and_hold_their_peak(seed: int, joined: float) -> None:
    rng = np.random.default_rng(seed)
    starts = np.arange(0.0, 25.0)
    scores = rng.random(25)
    typical = float(np.median(scores))
    found = segments(scores, np.array([0, 25]), starts, starts + LENGTH, typical, 0.5, count=25, least_joined=joined)
    spans = sorted((one.start_seconds, one.end_seconds) for one in found)
    assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(spans))
    for one in found:
        assert one.start_seconds < starts[one.row] + LENGTH / 2 < one.end_seconds
        assert scores[one.row] >= 0.5
