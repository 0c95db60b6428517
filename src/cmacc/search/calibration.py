"""Whether a score is high: by random pairs of the index, and by searches for what is not there.

Two distributions are drawn from the index itself, for queries of one modality against windows of another (or the same):

* Scores of random pairs of windows. A result's *percentile* is its place among them.
* The best score of random queries against all windows but those around the query itself (`APART_SECONDS`), which are
  searches for something that is not there. A query counts as found if its best score is above all but the share
  ``false_alarm_rate`` of these.

A new query of the same kind whose match is not in the index is as likely as any of these to have the highest score, so
the rate holds as far as queries resemble the videos of the index. With n independent stretches of video to draw from,
no rate below 1 / (n + 1) can be held (conformal p-values: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random
World, 2005). More draws than stretches do not help: windows of one stretch are alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from cmacc.search.table import Rows

# Windows of the same content that are nearer than this belong to the query. More would leave an index of one film
# without anything to compare with; a scene that goes on for longer makes the threshold stricter.
APART_SECONDS = 10.0
_PAIRS = 100_000
# Four searches that share a rate of 1 % need 400.
LEAST_QUERIES, MOST_QUERIES = 400, 2_000
# Limits the time of the matrix product to about a second: queries x rows x dimensions.
_MOST_PRODUCTS = 2e10
_SCORES_AT_ONCE = 20_000_000


@dataclass(frozen=True)
class Calibration:
    """Scores that mean nothing, of one kind of query.

    Attributes
    ----------
    pairs
        Scores of random pairs, ascending.
    best
        Best scores of searches for what is not there, ascending.
    stretches
        n, the number of independent stretches of video that these queries were drawn from, or of queries if that is
        less.
    """

    pairs: Float[np.ndarray, " pairs"]
    best: Float[np.ndarray, " queries"]
    stretches: int

    @property
    def least_rate(self) -> float:
        """Lowest rate of false alarms that can be held."""
        return 1 / (1 + self.stretches)

    def percentile(self, score: float) -> float:
        """Share of random pairs with a lower score, in percent."""
        return 100.0 * float(np.searchsorted(self.pairs, score)) / max(1, len(self.pairs))

    def score_at(self, percentile: float) -> float:
        """Score that this share of random pairs does not exceed, in percent."""
        return float(np.percentile(self.pairs, percentile)) if len(self.pairs) else -np.inf

    def chance(self, score: float) -> float:
        """Probability that the best score of a search for what is not there is as high, at least 1 / (n + 1)."""
        if len(self.best) == 0:
            return 1.0
        higher = len(self.best) - int(np.searchsorted(self.best, score))
        return (1 + self.stretches * higher / len(self.best)) / (1 + self.stretches)

    def margin(self, score: float) -> float:
        """How far the score lies above the best scores of searches for what is not there, in standard deviations."""
        if len(self.best) < 2:
            return score
        mean, deviation = self._spread
        return (score - mean) / max(deviation, 1e-6)

    @cached_property
    def _spread(self) -> tuple[float, float]:
        return float(np.mean(self.best)), float(np.std(self.best))

    def threshold(self, false_alarm_rate: float) -> float:
        """Least score whose `chance` is at most the rate; infinite if there is none."""
        if false_alarm_rate >= 1:
            return float("-inf")
        if false_alarm_rate < self.least_rate or len(self.best) == 0:
            return float("inf")
        share = (false_alarm_rate * (1 + self.stretches) - 1) / self.stretches  # of `best`, which may be higher
        allowed = int(np.floor(share * len(self.best) + 1e-9))
        return float(np.nextafter(self.best[-1 - allowed], np.inf))


def calibrate(
    drawn: Rows, stretches: int, targets: Iterable[Rows], apart_seconds: float = APART_SECONDS, seed: int = 0
) -> Calibration:
    """Both distributions by exact search.

    Parameters
    ----------
    drawn
        Random queries.
    stretches
        Number of independent stretches that they were drawn from (`stretch_count`).
    targets
        All windows that are searched, in parts; only the best scores and some pairs of a part are kept.
    apart_seconds
        Windows of the same content that begin nearer to the query than this are not compared with it.
    seed
        Seed of the random pairs.
    """
    rng = np.random.default_rng(seed)
    best = np.full(len(drawn), -np.inf, np.float32)
    pairs = [best[:0]]
    for part in targets:
        if len(part) and len(drawn):
            own, some = _best_and_pairs(drawn, part, apart_seconds, rng)
            best = np.maximum(best, own)
            pairs.append(some)
    chosen = np.concatenate(pairs)
    if len(chosen) > _PAIRS:
        chosen = rng.choice(chosen, _PAIRS, replace=False)
    best = np.sort(best[np.isfinite(best)])
    return Calibration(np.sort(chosen), best, min(stretches, len(best)))


def _best_and_pairs(
    drawn: Rows, targets: Rows, apart_seconds: float, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " queries"], Float[np.ndarray, " pairs"]]:
    """The best score of each query among windows apart from it, and scores of random pairs."""
    content, contents = _codes(drawn.facts, targets.facts)
    order = np.argsort(contents, kind="stable")
    first, last = (np.searchsorted(contents[order], content, side=side) for side in ("left", "right"))
    starts, query_starts = targets.seconds("start_seconds"), drawn.seconds("start_seconds")
    best = np.empty(len(drawn), np.float32)
    pairs: list[Float[np.ndarray, " some"]] = []
    at_once = max(1, _SCORES_AT_ONCE // len(targets))
    for begin in range(0, len(drawn), at_once):
        some = slice(begin, begin + at_once)
        scores = drawn.vectors[some] @ targets.vectors.T
        for place, query in enumerate(range(begin, begin + len(scores))):
            same = order[first[query] : last[query]]
            scores[place, same[np.abs(starts[same] - query_starts[query]) < apart_seconds]] = -np.inf
        chosen = scores.ravel()[rng.integers(scores.size, size=max(1, _PAIRS * len(scores) // len(drawn)))]
        pairs.append(chosen[np.isfinite(chosen)])
        best[some] = scores.max(axis=1)
    return best, np.concatenate(pairs)


def stretch_count(rows: Rows, apart_seconds: float = APART_SECONDS) -> int:
    """Number of stretches of that length, at least one for each sample."""
    if len(rows) == 0:
        return 0
    starts = rows.seconds("start_seconds")
    spans = starts[rows.first[1:] - 1] - starts[rows.first[:-1]]
    return int((np.floor(spans / apart_seconds) + 1).sum())


def query_count(rows: int, size: int) -> int:
    """Number of random queries whose exact search takes about a second."""
    return int(np.clip(_MOST_PRODUCTS / max(1, rows * size), LEAST_QUERIES, MOST_QUERIES))


def random_queries(rows: Rows, count: int, seed: int = 0) -> Rows:
    """Random windows of random samples, each sample as often as any other, in random order.

    Parameters
    ----------
    rows
        Windows of the query's modality, or `Rows.runs` of them.
    count
        Number of queries.
    seed
        Seed of the draws.

    Returns
    -------
    ``count`` rows.
    """
    rng = np.random.default_rng(seed)
    if len(rows) == 0:
        return rows
    samples = rng.integers(len(rows.first) - 1, size=count)
    chosen = rng.integers(rows.first[samples], rows.first[samples + 1])
    return Rows(rows.facts.take(pa.array(chosen)), rows.vectors[chosen])


def _codes(*tables: pa.Table) -> list[Int[np.ndarray, " rows"]]:
    """A number for each row that two rows share if they are of the same content."""
    names = [pc.coalesce(table.column("content_hash"), table.column("path")) for table in tables]
    codes = pa.chunked_array([chunk for name in names for chunk in name.chunks], pa.string()).combine_chunks()
    numbers = codes.dictionary_encode().indices.to_numpy()
    return np.split(numbers, np.cumsum([len(table) for table in tables])[:-1])
