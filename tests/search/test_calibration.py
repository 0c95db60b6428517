"""Calibration against brute force, and the rate of false alarms against its binomial interval."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom

from cmacc.search import Calibration, Rows
from cmacc.search.calibration import APART_SECONDS, calibrate, random_queries, stretch_count
from cmacc.search.table import FACT_TYPES


def make_rows(vectors: np.ndarray, windows: int, modality: str = "audio", first_file: int = 0) -> Rows:
    """Rows of files with so many windows each."""
    count = len(vectors)
    names = [f"{first_file + i // windows:06}.mp4" for i in range(count)]
    starts = np.arange(count) % windows * 1.0
    facts = {
        "path": names,
        "key": [None] * count,
        "sample_start_seconds": [0.0] * count,
        "sample_end_seconds": [windows + 1.0] * count,
        "start_seconds": starts,
        "end_seconds": starts + 2,
        "modality": [modality] * count,
        "label": [None] * count,
        "content_hash": names,
    }
    return Rows(pa.table(facts, schema=pa.schema(FACT_TYPES)), vectors.astype(np.float32))


def unit(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    rows = rng.standard_normal((count, size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_best_score_leaves_out_what_lies_around_the_query() -> None:
    rng = np.random.default_rng(0)
    queries, targets = make_rows(unit(rng, 60, 8), 30), make_rows(unit(rng, 60, 8), 30)
    drawn = random_queries(queries, count=40)
    best = []
    for vector, fact in zip(drawn.vectors, drawn.facts.to_pylist(), strict=True):
        others = [
            float(target.astype(np.float64) @ vector)
            for target, other in zip(targets.vectors, targets.facts.to_pylist(), strict=True)
            if other["path"] != fact["path"] or abs(other["start_seconds"] - fact["start_seconds"]) >= APART_SECONDS
        ]
        best.append(max(others))
    np.testing.assert_allclose(calibrate(drawn, 2, [targets]).best, np.sort(best), atol=1e-6)
    halves = [Rows(targets.facts.slice(a, 30), targets.vectors[a : a + 30]) for a in (0, 30)]
    np.testing.assert_allclose(calibrate(drawn, 2, halves).best, np.sort(best), atol=1e-6)


def test_random_queries_are_means_of_consecutive_windows_of_all_files_alike() -> None:
    rng = np.random.default_rng(0)
    rows = make_rows(unit(rng, 40, 8), 4)
    drawn = random_queries(rows.runs(3), count=4_000)
    files, counts = np.unique(drawn.facts.column("path").to_numpy(), return_counts=True)
    assert len(files) == 10
    assert binom.ppf(1e-6, 4_000, 0.1) < counts.min() <= counts.max() < binom.ppf(1 - 1e-6, 4_000, 0.1)
    means = [rows.vectors[4 * f + s : 4 * f + s + 3].mean(0) for f in range(10) for s in (0, 1)]
    means = np.stack(means) / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose((drawn.vectors @ means.T).max(1), 1, atol=1e-5)


@pytest.mark.parametrize("rate", [0.005, 0.01, 0.2, 1.0])
def test_a_score_is_found_where_its_chance_is_at_most_the_rate(rate: float) -> None:
    best = np.sort(np.random.default_rng(0).random(399).astype(np.float32))
    calibration = Calibration(best, best, 399)
    least = calibration.threshold(rate)
    for score in np.concatenate([best, np.linspace(0, 1.1, 200)]).tolist():
        assert (score >= least) == (calibration.chance(score) <= rate)


def test_few_videos_cannot_hold_a_low_rate() -> None:
    best = np.linspace(0, 1, 2_000, dtype=np.float32)  # many draws from few videos
    assert Calibration(best, best, 50).threshold(0.01) == np.inf
    assert Calibration(best, best, 50).threshold(0.02) > 1
    assert Calibration(best, best, 50).chance(2.0) == pytest.approx(1 / 51)
    assert Calibration(best[:0], best[:0], 0).chance(1.0) == 1


def test_a_long_film_has_many_stretches_and_a_short_clip_one() -> None:
    starts = np.concatenate([np.arange(0.0, 60.0), np.arange(0.0, 3.0), [0.0]])
    rows = make_rows(np.ones((64, 2)), 64)
    facts = rows.facts.set_column(4, "start_seconds", pa.array(starts))
    facts = facts.set_column(0, "path", pa.array(["film"] * 60 + ["clip"] * 3 + ["short"]))
    assert stretch_count(Rows(facts, rows.vectors)) == 6 + 1 + 1
    assert stretch_count(Rows(facts, rows.vectors), 30.0) == 2 + 1 + 1
    assert stretch_count(Rows(facts.slice(0, 0), rows.vectors[:0])) == 0


@pytest.mark.parametrize("count", [2, 3, 7])
def test_runs_are_means_of_consecutive_windows_of_a_sample(count: int) -> None:
    rng = np.random.default_rng(0)
    rows = make_rows(unit(rng, 15, 8), 5)
    runs = rows.runs(count)
    expected = [
        (file, s, rows.vectors[5 * file + s : 5 * file + min(5, s + count)].mean(0))
        for file in range(3)
        for s in range(max(1, 5 - count + 1))
    ]
    assert runs.facts.column("start_seconds").to_pylist() == [s for _, s, _ in expected]
    assert runs.facts.column("end_seconds").to_pylist() == [min(5, s + count) + 1 for _, s, _ in expected]
    assert runs.first.tolist() == [max(1, 5 - count + 1) * file for file in range(4)]
    for row, (_, _, mean) in zip(runs.vectors, expected, strict=True):
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize(("windows", "count", "rate"), [(1, 300, 0.01), (3, 300, 0.01), (1, 12, 0.1)])
def test_what_is_not_there_is_found_at_the_stated_rate(windows: int, count: int, rate: float) -> None:
    """20 worlds of so many files and 200 new queries each: within the 99.99 % interval of the rate.

    Files are mixtures (a scene of a kind), so that neighbouring windows and files of a kind are alike. Worlds differ in
    how well their thresholds are estimated, which widens the interval: by the standard error of the tail of as many
    independent queries as there are files.
    """
    found = 0
    for seed in range(20):
        rng = np.random.default_rng([seed, windows])
        kinds = unit(rng, 30, 16)

        def files(count: int, rng: np.random.Generator = rng, kinds: np.ndarray = kinds) -> np.ndarray:
            scenes = kinds[rng.integers(30, size=count)] + 0.5 * unit(rng, count, 16)
            rows = np.repeat(scenes, 5, axis=0) + 0.3 * unit(rng, 5 * count, 16)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        audio = make_rows(files(count), 5).runs(windows)
        video = make_rows(files(300), 5).runs(windows)  # pictures that have nothing to do with these sounds
        assert stretch_count(audio) == count
        calibration = calibrate(random_queries(audio, 2_000), count, [video])
        new = random_queries(make_rows(files(200), 5).runs(windows), 200, seed=1)
        scores = (new.vectors @ video.vectors.T).max(1)
        found += int((scores >= calibration.threshold(rate)).sum())
    total = 20 * 200
    spread = np.sqrt(rate * (1 - rate) * (1 / total + 1 / (20 * count)))
    assert abs(found / total - rate) < 3.9 * spread, f"{found} of {total}"
