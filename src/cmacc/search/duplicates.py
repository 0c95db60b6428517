"""Find duplicates among the samples of an index by their embeddings.

Near-duplicates (`near_duplicates`): the same recording again, re-encoded, scaled or cut.

1. Whiten the vectors of each modality (`whitened`), and compare every window with every other one. Two are alike if
   their cosine is at least the threshold in each modality that both have.
2. Windows that are alike at one distance in time form a stretch, with a start and an end in both samples.
3. Samples are duplicates if their stretches cover most of the shorter one. They form groups (connected components), of
   which the longest sample is kept. A jingle that two films share is a stretch, but makes no duplicates of them.

Semantic duplicates (`semantic_duplicates`): other recordings of the same. SemDeDup (Abbas et al., 2023, arXiv
2303.09540): cluster the samples' mean vectors by k-means; within a cluster, sort them by their cosine with the
centroid, lowest first, and remove each whose cosine with an earlier one is above 1 - epsilon. So the sample that is
farthest from the centroid stays, as in the paper. Unlike there, the vectors are whitened too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cmacc.clips.progress import Progress, silent
from cmacc.encoders import MODALITIES
from cmacc.pretraining.features import unit_rows
from cmacc.search.calibration import APART_SECONDS
from cmacc.search.samples import Samples
from cmacc.search.table import SearchError

THRESHOLD = 0.9
_COVERED = 0.8
_LEAST_SHRINKAGE = 0.02
# Hours of a black picture are alike a million times: of each window, only the most similar partners are kept, so many
# that there are at most this many pairs in all, or at least this many partners.
_MOST_PAIRS, _LEAST_PARTNERS = 10_000_000, 16
_SCORES_AT_ONCE = 20_000_000
_CLUSTER_SIZE = 1000
_PLACES_BITS = 40


@dataclass(frozen=True)
class Stretch:
    """Two stretches that are alike, of two samples or of one.

    Attributes
    ----------
    first, second
        Numbers of the samples.
    first_seconds, second_seconds
        Start and end, on the clocks of their files.
    score
        Mean cosine of the windows, of the modality with the lower one.
    """

    first: int
    second: int
    first_seconds: tuple[float, float]
    second_seconds: tuple[float, float]
    score: float


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes
    ----------
    groups
        Numbers of the samples in every group of duplicates, the one to keep first.
    stretches
        What is alike, highest score first; also stretches of samples that are no duplicates.
    removed
        Numbers of the samples not to keep.
    """

    groups: tuple[tuple[int, ...], ...]
    stretches: tuple[Stretch, ...]

    @property
    def removed(self) -> frozenset[int]:
        return frozenset(number for group in self.groups for number in group[1:])

    def kept(self, samples: Samples) -> list[int]:
        """Numbers of the samples to keep, ascending."""
        removed = self.removed
        return [number for number in range(len(samples)) if number not in removed]


def near_duplicates(samples: Samples, *, threshold: float = THRESHOLD, progress: Progress = silent) -> Duplicates:
    """Find recordings that are in the index more than once.

    Compares all windows, n² / 2 pairs by matrix products: for 100,000 windows of 128 numbers in both modalities, about
    a minute on one core. Memory grows with n alone.

    Parameters
    ----------
    samples
        All samples of an index.
    threshold
        Least cosine of windows that are alike, in (0, 1].
    progress
        Called with ("windows", windows compared, all windows).

    Raises
    ------
    SearchError
        The threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise SearchError(f"--threshold: must be in (0, 1], got {threshold:g}")
    windows = _Windows.of(samples)
    found = _stretches(windows, *_alike(windows, threshold, progress), samples)
    groups = _groups(samples, found)
    return Duplicates(groups, tuple(sorted(found, key=lambda one: -one.score)))


def semantic_duplicates(samples: Samples, epsilon: float, *, seed: int = 0, progress: Progress = silent) -> Duplicates:
    """Find samples that show and sound nearly the same, by SemDeDup.

    Parameters
    ----------
    samples
        All samples of an index.
    epsilon
        Samples with a cosine above 1 - epsilon are duplicates, in (0, 1). With both modalities, it is the mean of
        both cosines.
    seed
        Seed of k-means.
    progress
        Called with ("clusters", clusters done, all clusters).

    Raises
    ------
    SearchError
        ``epsilon`` is out of range.
    """
    if not 0 < epsilon < 1:
        raise SearchError(f"--semantic: must be in (0, 1), got {epsilon:g}")
    rows = _sample_rows(samples)
    clusters, centroids = _clusters(rows, seed)
    starts, ends = samples.start_seconds, samples.end_seconds
    stretches: list[Stretch] = []
    earlier_of: dict[int, int] = {}
    for done, centroid in enumerate(centroids):
        members = np.flatnonzero(clusters == done)
        members = members[np.argsort(rows[members] @ centroid, kind="stable")]
        for place, (earlier, score) in _nearest_earlier(rows[members]):
            if score > 1 - epsilon:
                first, second = int(members[earlier]), int(members[place])
                earlier_of[second] = first
                spans = [(float(starts[number]), float(ends[number])) for number in (first, second)]
                stretches.append(Stretch(first, second, spans[0], spans[1], score))
        progress("clusters", done + 1, len(centroids))
    groups: dict[int, list[int]] = {}
    for number in earlier_of:
        kept = number
        while kept in earlier_of:
            kept = earlier_of[kept]
        groups.setdefault(kept, [kept]).append(number)
    return Duplicates(
        tuple(tuple(group) for group in groups.values()), tuple(sorted(stretches, key=lambda one: -one.score))
    )


# ---- windows that are alike -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Windows:
    """All windows, sorted by sample and time: vectors of unit length, zero where a window lacks the modality."""

    place: Int[np.ndarray, " windows"]
    start: Float[np.ndarray, " windows"]
    end: Float[np.ndarray, " windows"]
    vectors: list[Float[torch.Tensor, "windows dim"]]

    @classmethod
    def of(cls, samples: Samples) -> "_Windows":
        starts = [samples.rows[m].seconds("start_seconds") for m in MODALITIES]
        ends = [samples.rows[m].seconds("end_seconds") for m in MODALITIES]
        places = [_place(samples.of_row[m], start) for m, start in zip(MODALITIES, starts, strict=True)]
        place, rows, window = np.unique(np.concatenate(places), return_index=True, return_inverse=True)
        vectors = []
        for modality, own in zip(MODALITIES, np.split(window, [len(places[0])]), strict=True):
            rows_white = whitened(samples.rows[modality].vectors)
            vectors.append(
                torch.zeros(len(place), rows_white.shape[1]).index_copy_(0, torch.from_numpy(own), rows_white)
            )
        return cls(place, np.concatenate(starts)[rows], np.concatenate(ends)[rows], vectors)

    def __len__(self) -> int:
        return len(self.place)

    @property
    def sample(self) -> Int[np.ndarray, " windows"]:
        """The sample of every window."""
        return self.place >> _PLACES_BITS


def _place(sample: Int[np.ndarray, " rows"], start_seconds: Float[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Sample and time, in milliseconds, as one number. A window that begins before its file gets 0."""
    return (sample << _PLACES_BITS) + np.maximum(0, np.round(1000 * start_seconds)).astype(np.int64)


def whitened(rows: Float[np.ndarray, "rows dim"]) -> Float[torch.Tensor, "rows dim"]:
    """The rows less their mean, with a like spread in all directions, of unit length.

    What all videos of an index have in common, which is most of a vector, says nothing about copies. Few rows do not
    determine the spread, and directions of hardly any spread are noise: the covariance is shrunk towards a multiple of
    the identity.
    """
    if len(rows) == 0:
        return torch.from_numpy(rows)
    count, size = rows.shape
    centred = rows - rows.mean(axis=0)
    covariance = (centred.T @ centred).astype(np.float64) / count
    spread = max(float(np.trace(covariance)) / size, 1e-12)
    shrinkage = max(_LEAST_SHRINKAGE, size / (size + count))
    variances, axes = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * spread * np.eye(size))
    return torch.from_numpy(unit_rows(centred @ (axes / np.sqrt(variances))).astype(np.float32))


def _alike(
    windows: _Windows, threshold: float, progress: Progress
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
    """Pairs of windows that are alike, the earlier one first, with the lower cosine of both modalities."""
    count = len(windows)
    # Where the windows begin that may be like each: those of later samples, and later ones of its own.
    later = np.minimum(windows.place + round(1000 * APART_SECONDS), (windows.sample + 1) << _PLACES_BITS)
    begin = torch.from_numpy(np.searchsorted(windows.place, later))
    present = [vectors.any(dim=1) for vectors in windows.vectors]
    all_have_both = all(bool(has.all()) for has in present)
    most = max(_LEAST_PARTNERS, _MOST_PAIRS // max(1, count))
    pairs = []
    row = 0
    while row < count:  # every pass over the scores costs as much as a product, so there are few
        some = slice(row, row + max(1, _SCORES_AT_ONCE // (count - row)))
        scores = None
        for vectors, has in zip(windows.vectors, present, strict=True):
            product = vectors[some] @ vectors[row:].T
            if not all_have_both:
                product.masked_fill_(~(has[some, None] & has[row:]), torch.inf)
            scores = product if scores is None else torch.minimum(scores, product, out=scores)
        assert scores is not None
        if not all_have_both:
            scores.masked_fill_(scores.isinf(), -1.0)
        edge = int(begin[some].max())
        scores[:, : edge - row].masked_fill_(torch.arange(row, edge) < begin[some, None], -1.0)
        ones, others = (scores >= threshold).nonzero(as_tuple=True)
        crowded = ones.bincount(minlength=len(scores)) > most
        if bool(crowded.any()):
            best = scores[crowded].topk(most, dim=1).indices
            of_best = crowded.nonzero()[:, 0].repeat_interleave(most)
            others = torch.cat([others[~crowded[ones]], best.flatten()])
            ones = torch.cat([ones[~crowded[ones]], of_best])
        pairs.append((ones + row, others + row, scores[ones, others]))
        row += len(scores)
        progress("windows", row, count)
    first, second, score = (torch.cat(column).numpy() for column in zip(*pairs, strict=True))
    return first, second, score


# ---- from windows to stretches, and from stretches to groups --------------------------------------------------------


def _stretches(
    windows: _Windows,
    first: Int[np.ndarray, " pairs"],
    second: Int[np.ndarray, " pairs"],
    scores: Float[np.ndarray, " pairs"],
    samples: Samples,
) -> list[Stretch]:
    """Runs of window pairs at one distance in time; of runs that overlap in both samples, the longest."""
    hop_seconds = samples.hop_seconds
    distance = np.round((windows.start[second] - windows.start[first]) / hop_seconds).astype(np.int64)
    keys = [windows.sample[first], windows.sample[second], distance, windows.start[first]]
    order = np.lexsort(keys[::-1])
    first, second, scores = first[order], second[order], scores[order]
    one, other, distance, start = (key[order] for key in keys)
    is_next = (np.diff(one) == 0) & (np.diff(other) == 0) & (np.diff(distance) == 0)
    # One window of a run may be missing.
    begins = np.concatenate([[True], ~(is_next & (np.diff(start) < 2.5 * hop_seconds))])[: len(one)].nonzero()[0]
    if len(begins) == 0:
        return []
    last = np.concatenate([begins[1:], [len(one)]]) - 1
    means = np.add.reduceat(scores.astype(np.float64), begins) / (last - begins + 1)
    spans = [
        np.stack(
            [
                np.maximum(windows.start[rows[begins]], samples.start_seconds[of]),
                np.minimum(windows.end[rows[last]], samples.end_seconds[of]),
            ],
            axis=1,
        )
        for rows, of in ((first, one[begins]), (second, other[begins]))
    ]
    found = []
    for runs in _by_pair(one[begins], other[begins]):
        for run in _longest(spans[0][runs], spans[1][runs], means[runs]):
            at = int(runs[run])
            begin = begins[at]
            first_seconds, second_seconds = ((float(span[at, 0]), float(span[at, 1])) for span in spans)
            found.append(Stretch(int(one[begin]), int(other[begin]), first_seconds, second_seconds, float(means[at])))
    return found


def _by_pair(one: Int[np.ndarray, " runs"], other: Int[np.ndarray, " runs"]) -> Iterator[Int[np.ndarray, " some"]]:
    """The runs of each pair of samples; those of a pair stand together."""
    changes = np.flatnonzero((np.diff(one) != 0) | (np.diff(other) != 0)) + 1
    yield from np.split(np.arange(len(one)), changes)


def _longest(
    first: Float[np.ndarray, "runs 2"], second: Float[np.ndarray, "runs 2"], scores: Float[np.ndarray, " runs"]
) -> list[int]:
    """Of runs between two samples, the longest, then the longest of those that mostly lie outside of it, and so on."""
    left = np.lexsort([-scores, first[:, 0] - first[:, 1]])
    taken = []
    while len(left):
        best, left = int(left[0]), left[1:]
        taken.append(best)
        left = left[~(_mostly_within(first[left], first[best]) & _mostly_within(second[left], second[best]))]
    return taken


def _mostly_within(spans: Float[np.ndarray, "runs 2"], other: Float[np.ndarray, "2"]) -> Bool[np.ndarray, " runs"]:
    shared = np.minimum(spans[:, 1], other[1]) - np.maximum(spans[:, 0], other[0])
    return np.asarray(2 * shared >= spans[:, 1] - spans[:, 0])


def _groups(samples: Samples, stretches: list[Stretch]) -> tuple[tuple[int, ...], ...]:
    """Samples whose stretches cover most of the shorter one, joined; the longest first."""
    seconds = samples.end_seconds - samples.start_seconds
    spans: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for one in stretches:
        if one.first != one.second:
            is_first = seconds[one.first] <= seconds[one.second]
            shorter = one.first_seconds if is_first else one.second_seconds
            spans.setdefault((one.first, one.second), []).append(shorter)
    alike = [pair for pair, found in spans.items() if _covered(found) >= _COVERED * seconds[list(pair)].min()]
    if not alike:
        return ()
    first, second = np.array(alike).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(samples), len(samples)))
    of_sample = connected_components(graph, directed=False)[1]
    members: dict[int, list[int]] = {}
    for number in sorted({*first.tolist(), *second.tolist()}, key=lambda number: (-seconds[number], number)):
        members.setdefault(int(of_sample[number]), []).append(number)
    return tuple(tuple(group) for group in members.values())


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of some spans."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# ---- SemDeDup -------------------------------------------------------------------------------------------------------


def _sample_rows(samples: Samples) -> Float[np.ndarray, "samples dims"]:
    """Whitened mean vectors of both modalities side by side, of unit length."""
    parts = []
    for modality in MODALITIES:
        means, has = samples.means(modality), samples.has(modality)
        means[has] = whitened(means[has]).numpy()
        parts.append(means)
    return unit_rows(np.concatenate(parts, axis=1)).astype(np.float32)


def _clusters(
    rows: Float[np.ndarray, "samples dim"], seed: int
) -> tuple[Int[np.ndarray, " samples"], Float[np.ndarray, "clusters dim"]]:
    """Cluster of every row, and the centroids."""
    from sklearn.cluster import MiniBatchKMeans  # takes a second

    count = math.ceil(len(rows) / _CLUSTER_SIZE)
    if count == 1:
        return np.zeros(len(rows), np.int64), rows.mean(axis=0, keepdims=True)
    fitted = MiniBatchKMeans(count, random_state=seed, n_init=1).fit(rows)
    return np.asarray(fitted.labels_, np.int64), np.asarray(fitted.cluster_centers_, np.float32)


def _nearest_earlier(rows: Float[np.ndarray, "members dim"]) -> Iterator[tuple[int, tuple[int, float]]]:
    """For every row but the first, the nearest of the rows before it, and their cosine."""
    at_once = max(1, _SCORES_AT_ONCE // max(1, len(rows)))
    for begin in range(0, len(rows), at_once):
        scores = rows[begin : begin + at_once] @ rows.T
        scores[np.arange(len(rows)) >= np.arange(begin, begin + len(scores))[:, None]] = -np.inf
        nearest = scores.argmax(axis=1)
        for place, earlier in enumerate(nearest.tolist(), start=begin):
            if place:
                yield place, (earlier, float(scores[place - begin, earlier]))
