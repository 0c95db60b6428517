"""Nearest rows by cosine: a vote of neighbours, and ranks of pairs. Online evaluation and `cmacc.transfer` use them."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cmacc.pretraining.features import unit_rows

_NEIGHBOURS = 20
_TEMPERATURE = 0.07
_QUERIES_AT_ONCE = 1024  # limits the memory for cosines: 80 MB for 10,000 rows


def neighbour_classes(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The class of every query by a vote of its 20 nearest rows in the gallery (or all, if fewer) by cosine.

    A vote has weight exp(cosine / 0.07). Ties in distance go to the earlier row, ties in votes to the lower class.

    Parameters
    ----------
    queries, gallery
        Shape (m, width) and (n, width), n at least 1; finite.
    labels
        Shape (n,): class of every row of the gallery, from 0.

    References
    ----------
    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"; k and temperature as in
    Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (DINO).
    """
    votes = np.zeros((len(queries), int(labels.max()) + 1))
    for rows, similarity in cosines(queries, gallery):
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :_NEIGHBOURS]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / _TEMPERATURE)
        np.add.at(votes, (rows[:, None], labels[nearest]), weights)
    return np.asarray(votes.argmax(axis=1), np.int64)


def cosines(
    queries: NDArray[np.float32], gallery: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Blocks of query row numbers (b,) and their cosines with all rows of the gallery (b, n).

    Cosines are rounded to 12 decimals, so that identical rows tie in whichever order BLAS sums.
    """
    asked, among = unit_rows(queries), unit_rows(gallery)
    for start in range(0, len(asked), _QUERIES_AT_ONCE):
        rows = np.arange(start, min(start + _QUERIES_AT_ONCE, len(asked)))
        yield rows, np.round(asked[rows] @ among.T, 12)


def pair_ranks(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank, 1 to n, of row i of the gallery for every query i, by inner product of the rows as they are.

    In a tie, the other row ranks first, so that a collapsed encoder scores worst and not best. Memory is quadratic in n
    (800 MB of scores for 10,000 rows).

    Parameters
    ----------
    queries, gallery
        Shape (n, width), n at least 1; finite.
    """
    exact_queries, exact_gallery = queries.astype(np.float64), gallery.astype(np.float64)
    scores = exact_queries @ exact_gallery.T
    # BLAS may sum the last columns in another order, so scores of identical rows differ by rounding but must tie.
    rounding = 1e-12 * np.linalg.norm(exact_queries, axis=1) * np.linalg.norm(exact_gallery, axis=1).max()
    return np.asarray((scores >= (np.diagonal(scores) - rounding)[:, None]).sum(axis=1), np.int64)
