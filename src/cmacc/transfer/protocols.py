"""Protocols of the field on frozen features: features and labels in, metrics out.

Nothing here knows of files or encoders. Every protocol is a pure function without settings: what it does is fixed
(`cmacc.transfer.recipes`), and its randomness (inner folds, solver) has fixed seeds: the same features give the same
numbers.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.transfer.metrics import Metric, ProtocolError

_SEED = 0
_LINEAR_CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # strongest regularisation first: ties go to it
_LINEAR_C_UNTESTED = 0.01
_LINEAR_ITERATIONS = 1000
_SMALL_PRODUCT = 5e7  # multiplications
_SVM_C = 0.01
_SVM_ITERATIONS = 10_000
_KNN_NEIGHBOURS = 20
_KNN_TEMPERATURE = 0.07
_CLASS_RECALLS = (1, 5, 10, 20, 50)
_PAIR_RECALLS = (1, 5, 10)
_QUERIES_AT_ONCE = 1024  # bounds the memory of cosines: 80 MB for 10,000 training files


@dataclass(frozen=True, eq=False)
class Rows:
    """One side, training or test, of one split.

    Attributes
    ----------
    features
        Shape (n, windows, width), n, windows and width at least 1, finite.
    labels
        Shape (n,): class index, from 0.
    groups
        Shape (n,): rows of equal group (cut from one scene or recording) are never parted in inner validation; a
        number of its own for each row where nothing is known.

    Raises
    ------
    ProtocolError
        If any of it is not as said here.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.features.shape
        if len(shape) != 3 or 0 in shape:
            raise ProtocolError(f"features: must have shape (n, windows, width), none of them 0, got {shape}")
        _check_finite("features", self.features)
        for name, values in (("labels", self.labels), ("groups", self.groups)):
            if values.shape != shape[:1]:
                raise ProtocolError(f"{name}: must have shape ({shape[0]},) as the features, got {values.shape}")
        _check_labels("labels", self.labels)


def linear(train: Rows, test: Rows) -> list[Metric]:
    """Accuracy of a multinomial logistic regression on features averaged over windows.

    Features are standardised by the training rows. The regularisation strength C comes from `chosen_c`, which
    never sees ``test``.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": L-BFGS, at most 1,000
    iterations, C by a sweep on validation data.
    """
    _check_sides(train, test)
    (predicted,) = _logistic(averaged(train.features), train.labels, averaged(test.features), [chosen_c(train)])
    return [_accuracy(predicted, train.labels, test.labels)]


def chosen_c(train: Rows) -> float:
    """C of `linear`: out of 1e-4, 1e-3, ..., 10, the one with most rows right in cross-validation inside ``train``.

    Three folds (two where three cannot be had) are stratified by class and part no group; each is standardised by its
    own training part. A tie goes to the smaller C, the stronger regularisation. Where groups or classes are too few
    for two folds whose training parts hold at least 2 classes, C is 0.01.
    """
    features = averaged(train.features)
    folds = _inner_folds(train)
    if not folds:
        return _LINEAR_C_UNTESTED
    right = np.zeros(len(_LINEAR_CS), np.int64)
    for fitted, held_out in folds:
        answers = _logistic(features[fitted], train.labels[fitted], features[held_out], _LINEAR_CS)
        right += [int((predicted == train.labels[held_out]).sum()) for predicted in answers]
    return _LINEAR_CS[int(right.argmax())]


def svm(train: Rows, test: Rows) -> list[Metric]:
    """Accuracy of a one-vs-rest linear SVM (C = 0.01) on windows, decision values averaged over a test file's windows.

    Every window of a training file is an example of its own, standardised by all of them; a file's examples weigh as
    much as one together, and equal windows of it (it is no longer than a window) are one. Equal averages go to the
    lower class.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Alwassel et al. 2020, "Self-Supervised Learning by Cross-Modal Audio-Video Clustering" (XDC), and Morgado et al.
    2021, "Audio-Visual Instance Discrimination with Cross-Modal Agreement" (AVID-CMA): ten equally spaced sub-clips of
    each recording of ESC-50.
    """
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    _check_sides(train, test)
    distinct = [np.unique(windows, axis=0) for windows in train.features]
    counts = [len(windows) for windows in distinct]
    examples = np.concatenate(distinct).astype(np.float64)
    # C weighs errors against the penalty by their sum: with ten windows a file it would otherwise be ten times as weak.
    weights = np.repeat([1 / count for count in counts], counts)
    scaler = StandardScaler().fit(examples, sample_weight=weights)
    # The dual solver was 1.6 times (12,800 x 512, 50 classes) to 3.6 times (6,000 x 1,536) as fast as the primal one.
    model = LinearSVC(C=_SVM_C, dual=True, random_state=_SEED, max_iter=_SVM_ITERATIONS)
    with _convergence_ignored():
        model.fit(scaler.transform(examples), np.repeat(train.labels, counts), sample_weight=weights)
    count, windows_per_file, width = test.features.shape
    windows = scaler.transform(test.features.reshape(-1, width).astype(np.float64))
    scores = model.decision_function(windows).reshape(count, windows_per_file, -1).mean(axis=1)
    if scores.shape[1] == 1:  # of two classes scikit-learn gives the second's values only
        scores = np.concatenate([-scores, scores], axis=1)
    return [_accuracy(np.asarray(model.classes_[scores.argmax(axis=1)], np.int64), train.labels, test.labels)]


def knn(train: Rows, test: Rows) -> list[Metric]:
    """Accuracy of the vote of the 20 nearest training rows (all, if fewer) by cosine of window-averaged features.

    A vote weighs exp(cosine / 0.07). Of equally near rows the earlier one is taken; equal votes go to the lower class.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"; k and temperature as in
    Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (DINO).
    """
    _check_sides(train, test)
    votes = np.zeros((len(test.labels), int(train.labels.max()) + 1))
    for queries, cosines in _cosines(test, train):
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :_KNN_NEIGHBOURS]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / _KNN_TEMPERATURE)
        np.add.at(votes, (queries[:, None], train.labels[nearest]), weights)
    return [_accuracy(votes.argmax(axis=1), train.labels, test.labels)]


def class_retrieval(train: Rows, test: Rows) -> list[Metric]:
    """R@1, 5, 10, 20 and 50: share of test rows with a training row of their class among the k nearest.

    By cosine of window-averaged features. An equal cosine of a row of another class counts as ahead, so that a
    collapsed encoder does not score best. Chance is that of k training rows drawn without replacement, averaged over
    the queries.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Xu et al. 2019, "Self-Supervised Spatiotemporal Learning via Video Clip Order Prediction"; Han et al. 2020,
    "Self-supervised Co-training for Video Representation Learning" (CoCLR): ten windows averaged.
    """
    _check_sides(train, test)
    wrong_ahead = np.zeros(len(test.labels), np.int64)
    for queries, cosines in _cosines(test, train):
        same = train.labels == test.labels[queries, None]
        best = np.where(same, cosines, -np.inf).max(axis=1, keepdims=True)
        wrong_ahead[queries] = (~same & (cosines >= best)).sum(axis=1)
    members = np.bincount(train.labels)[test.labels]
    return [
        Metric(f"R@{k}", (wrong_ahead < k).astype(np.float64), _drawn_by_chance(members, len(train.labels), k))
        for k in _CLASS_RECALLS
    ]


def pair_retrieval(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> list[Metric]:
    """R@1, R@5, R@10 and median rank of finding row i of the gallery by row i of the queries (`ranks`).

    Chance is that of ranks drawn evenly from 1..n.
    """
    found = ranks(queries, gallery)
    count = len(found)
    recalls = [Metric(f"R@{k}", (found <= k).astype(np.float64), min(1.0, k / count)) for k in _PAIR_RECALLS]
    return [*recalls, Metric("median_rank", found.astype(np.float64), (count + 1) / 2)]


def ranks(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank, 1 to n, of the right gallery row for every query, by inner product of the rows as they are given.

    An equal score of another row counts as ahead, so that a collapsed encoder scores worst and not best. Memory grows
    as n squared (800 MB of scores for 10,000 rows).

    Parameters
    ----------
    queries, gallery
        Shape (n, width); row i of one belongs to row i of the other. For cosines, make them `unit_rows` first.

    Raises
    ------
    ProtocolError
        If the shapes are not alike, or there are NaN or infinities.
    """
    if queries.ndim != 2 or queries.shape != gallery.shape or 0 in queries.shape:
        shapes = f"{queries.shape} and {gallery.shape}"
        raise ProtocolError(f"queries, gallery: must both have shape (n, width), neither of them 0, got {shapes}")
    _check_finite("queries", queries)
    _check_finite("gallery", gallery)
    exact_queries, exact_gallery = queries.astype(np.float64), gallery.astype(np.float64)
    scores = exact_queries @ exact_gallery.T
    # BLAS may sum the last columns in another order, so copies of a row differ by rounding: they must count as equal.
    rounding = 1e-12 * np.linalg.norm(exact_queries, axis=1) * np.linalg.norm(exact_gallery, axis=1).max()
    return np.asarray((scores >= (np.diagonal(scores) - rounding)[:, None]).sum(axis=1), np.int64)


def scores_accuracy(
    scores: NDArray[np.floating[Any]], labels: NDArray[np.int64], train_labels: NDArray[np.int64]
) -> list[Metric]:
    """Accuracy of the highest class score, for fine-tuned networks; equal scores go to the lower class.

    Parameters
    ----------
    scores
        Shape (n, classes), finite: of each test item, averaged over its windows and crops.
    labels
        Shape (n,): the right classes.
    train_labels
        Shape (rows,): of the training part, for chance.

    Raises
    ------
    ProtocolError
        If shapes do not fit, scores are not finite, or a label has no column or no training row.
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise ProtocolError(f"scores: must have shape (n, classes), neither of them 0, got {scores.shape}")
    _check_finite("scores", scores)
    if labels.shape != scores.shape[:1]:
        raise ProtocolError(f"labels: must have shape ({len(scores)},) as the scores, got {labels.shape}")
    if train_labels.ndim != 1:
        raise ProtocolError(f"train_labels: must have shape (rows,), got {train_labels.shape}")
    for name, classes in (("labels", labels), ("train_labels", train_labels)):
        _check_labels(name, classes)
        if classes.size and classes.max() >= scores.shape[1]:
            raise ProtocolError(f"{name}: must be below the {scores.shape[1]} classes scored, got {classes.max()}")
    _check_classes(train_labels, labels)
    return [_accuracy(scores.argmax(axis=1), train_labels, labels)]


def averaged(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over windows: (n, windows, width) to (n, width)."""
    return np.asarray(features.mean(axis=1, dtype=np.float64), np.float32)


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows made of length one, shape (n, width); a row of zeros stays so."""
    return _unit(rows).astype(np.float32)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = rows.astype(np.float64)
    return np.asarray(exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12), np.float64)


def _check_finite(name: str, rows: NDArray[np.floating[Any]]) -> None:
    if not np.issubdtype(rows.dtype, np.floating):
        raise ProtocolError(f"{name}: must be floating-point numbers, got {rows.dtype}")
    bad = int((~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))).sum())
    if bad:
        raise ProtocolError(f"{name}: must be finite, got NaN or infinity in {bad} of {len(rows)} rows")


def _check_labels(name: str, labels: NDArray[np.int64]) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ProtocolError(f"{name}: must be integers, got {labels.dtype}")
    if labels.size and labels.min() < 0:
        raise ProtocolError(f"{name}: must be class indices from 0, got {labels.min()}")


def _check_classes(train_labels: NDArray[np.int64], test_labels: NDArray[np.int64]) -> None:
    known = np.unique(train_labels)
    if len(known) < 2:
        raise ProtocolError(f"train labels: must hold at least 2 classes, got {len(known)}")
    unknown = np.setdiff1d(test_labels, known)
    if len(unknown):
        raise ProtocolError(f"test labels: must be classes with training rows, got {', '.join(map(str, unknown))}")


def _check_sides(train: Rows, test: Rows) -> None:
    widths = train.features.shape[2], test.features.shape[2]
    if widths[0] != widths[1]:
        raise ProtocolError(f"test features: must have the training features' width {widths[0]}, got {widths[1]}")
    _check_classes(train.labels, test.labels)


def _inner_folds(train: Rows) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Row numbers of the training and held-out part of each fold; empty where no inner validation is possible."""
    from sklearn.model_selection import StratifiedGroupKFold

    for count in (3, 2):
        if len(np.unique(train.groups)) < count or np.bincount(train.labels).max() < count:
            continue
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=_SEED)
        with warnings.catch_warnings():
            # It warns of classes with fewer rows than folds: held out, such rows are wrong for every C alike.
            warnings.simplefilter("ignore", UserWarning)
            folds = list(splitter.split(train.labels, train.labels, train.groups))
        if all(len(held_out) and len(np.unique(train.labels[fitted])) > 1 for fitted, held_out in folds):
            return folds
    return []


def _logistic(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], cs: Sequence[float]
) -> list[NDArray[np.int64]]:
    """Classes that logistic regressions of each C give ``test``; (n, width) features, standardised here."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(train.astype(np.float64))
    fitted, asked = scaler.transform(train.astype(np.float64)), scaler.transform(test.astype(np.float64))
    if len(fitted) < fitted.shape[1]:
        # The solution lies in the span of the training rows, and an L2 penalty knows no direction: rotated
        # into that span it is the same, and 400 rows of width 1,536 are fitted about four times as fast.
        basis = np.linalg.qr(fitted.T)[0]
        fitted, asked = fitted @ basis, asked @ basis
    # L-BFGS makes hundreds of products of this size. Where they are small, waking BLAS threads for each costs more than
    # the product: 7 times as long for 480 rows and 8 classes on two busy cores.
    small = fitted.size * len(np.unique(labels)) < _SMALL_PRODUCT
    with _convergence_ignored(), threadpool_limits(1 if small else None):
        models = [LogisticRegression(C=c, max_iter=_LINEAR_ITERATIONS).fit(fitted, labels) for c in cs]
    return [np.asarray(model.predict(asked), np.int64) for model in models]


@contextmanager
def _convergence_ignored() -> Iterator[None]:
    """Without the warning that iterations ran out: a weakly regularised fit is right on separable rows long before."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        yield


def _cosines(test: Rows, train: Rows) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Blocks of test row numbers (b,) and their cosines with every training row (b, n), of window-averaged features.

    Rounded to 12 decimals, so that copies of a row tie in whichever order BLAS sums.
    """
    queries, gallery = _unit(averaged(test.features)), _unit(averaged(train.features))
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        rows = np.arange(start, min(start + _QUERIES_AT_ONCE, len(queries)))
        yield rows, np.round(queries[rows] @ gallery.T, 12)


def _drawn_by_chance(members: NDArray[np.int64], total: int, k: int) -> float:
    """Mean over queries of the chance that k of ``total`` rows, drawn without replacement, hold one of ``members``."""
    drawn = np.arange(min(k, total))
    missed = np.maximum(total - members[:, None] - drawn, 0) / (total - drawn)
    return float(1 - missed.prod(axis=1).mean())


def _accuracy(predicted: NDArray[np.int64], train_labels: NDArray[np.int64], test_labels: NDArray[np.int64]) -> Metric:
    """Chance is the accuracy of always naming the most frequent training class."""
    most_frequent = np.bincount(train_labels).argmax()
    right = (predicted == test_labels).astype(np.float64)
    return Metric("accuracy", right, float((test_labels == most_frequent).mean()))
