"""Which window: bounds, uniformity, symmetry."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from cmacc.clips.windows import covering_count, covering_starts, random_start, spread_starts

LENGTHS = st.floats(0.01, 100.0)


@given(LENGTHS, LENGTHS, st.integers(0, 1000))
def test_random_window_lies_inside_or_is_centred(duration: float, length: float, seed: int) -> None:
    start = random_start(duration, length, np.random.default_rng(seed))
    if duration > length:
        assert 0 <= start <= duration - length
    else:
        assert start + length / 2 == pytest.approx(duration / 2)


def test_random_starts_are_uniform() -> None:
    rng = np.random.default_rng(0)
    starts = [random_start(7.0, 2.0, rng) for _ in range(2000)]
    assert stats.kstest(starts, "uniform", args=(0, 5)).pvalue > 0.001
    assert stats.kstest(starts, "uniform", args=(0, 5.5)).pvalue < 1e-6


@pytest.mark.parametrize("duration", [1.0, 2.0, 9.0])
def test_exactly_one_number_is_drawn(duration: float) -> None:
    used, other = np.random.default_rng(3), np.random.default_rng(3)
    random_start(duration, 2.0, used)
    other.random()
    assert used.random() == other.random()


@given(LENGTHS, LENGTHS, st.integers(1, 20))
@example(duration=100.0, length=99.5, count=2)
@example(duration=100.0, length=99.0, count=2)
def test_spread_windows_mirror_each_other(duration: float, length: float, count: int) -> None:
    starts = spread_starts(duration, length, count)
    assert len(starts) == count
    assert starts == sorted(starts)
    mirrored = [duration - length - start for start in reversed(starts)]
    np.testing.assert_allclose(starts, mirrored, atol=1e-9)
    if duration > length:
        assert min(starts) >= 0
        assert max(starts) + length <= duration + 1e-9
    slack = duration - length
    if slack <= 0.01 * length:  # "5 s" that are a millisecond longer: not worth decoding the same window ten times
        assert len(set(starts)) == 1
    elif count > 1:
        assert (starts[0], starts[-1]) == (0.0, duration - length)
        np.testing.assert_allclose(np.diff(starts), (duration - length) / (count - 1), atol=1e-9)


@pytest.mark.parametrize("count", [0, -3])
def test_count_is_checked(count: int) -> None:
    with pytest.raises(ValueError, match=rf"spread_starts: count must be at least 1, got {count}"):
        spread_starts(10.0, 2.0, count)


@given(LENGTHS, LENGTHS, st.floats(0.05, 1.0))
@example(duration=4.5, length=2.0, share=0.5)
@example(duration=0.7, length=0.1, share=1.0)  # 0.7 - 0.1 is less than 6 * 0.1
@example(duration=2.02, length=2.0, share=0.5)
@example(duration=2.03, length=2.0, share=0.5)
def test_covering_windows_cover_the_file(duration: float, length: float, share: float) -> None:
    hop = share * length
    starts = covering_starts(duration, length, hop)
    assert len(starts) == covering_count(duration, length, hop)
    if duration - length <= 0.01 * length:
        assert starts == [(duration - length) / 2] == spread_starts(duration, length, 3)[:1]
        return
    steps = np.diff(starts)
    assert starts[0] == 0
    assert (steps > 0).all()
    assert (steps <= length * (1 + 1e-6)).all()  # no gap
    np.testing.assert_allclose(steps[:-1], hop, rtol=1e-6)  # only the last one may follow sooner
    assert steps[-1:].sum() <= hop * (1 + 1e-6)
    uncovered = duration - (starts[-1] + length)
    assert -1e-9 <= uncovered <= 0.01 * length + 1e-9
    # No window is there for nothing: without the last one, more than a percent of a window would be uncovered.
    assert duration - (starts[-2] + length) > 0.01 * length


@pytest.mark.parametrize(
    ("duration", "length", "hop", "message"),
    [
        (0.0, 2.0, 1.0, "duration_seconds must be positive and finite, got 0.0"),
        (float("nan"), 2.0, 1.0, "duration_seconds must be positive and finite, got nan"),
        (float("inf"), 2.0, 1.0, "duration_seconds must be positive and finite, got inf"),
        (9.0, -2.0, 1.0, "length_seconds must be positive and finite, got -2.0"),
        (9.0, 2.0, 0.0, "hop_seconds must be positive and at most length_seconds (2), .* got 0.0"),
        (9.0, 2.0, 2.5, "hop_seconds must be positive and at most length_seconds (2), .* got 2.5"),
    ],
)
def test_windows_that_cannot_cover_are_refused(duration: float, length: float, hop: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"covering_starts: {message}").replace(re.escape(".*"), ".*")):
        covering_starts(duration, length, hop)
