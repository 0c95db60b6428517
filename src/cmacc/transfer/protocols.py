"""Standard evaluation protocols on frozen features: features and labels in, metrics out.

This module is independent of files and encoders. Every protocol is a pure function without settings: its recipe is
fixed (`cmacc.transfer.recipes`), and its randomness (inner folds, solver) has fixed seeds. The same features give the
same numbers.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.pretraining.neighbours import cosines, neighbour_classes, pair_ranks
from cmacc.transfer.metrics import Metric, ProtocolError

_SEED = 0
_LINEAR_CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # strongest regularisation first: it wins ties
_LINEAR_C_UNTESTED = 0.01
_LINEAR_ITERATIONS = 1000
_SMALL_PRODUCT = 5e7  # multiplications
_SVM_C = 0.01
_SVM_ITERATIONS = 10_000
_CLASS_RECALLS = (1, 5, 10, 20, 50)
_PAIR_RECALLS = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class Rows:
    """The training or test rows of one split.

    Attributes
    ----------
    features
        Shape (n, windows, width), all at least 1; finite.
    labels
        Shape (n,): class index, from 0.
    groups
        Shape (n,): inner validation never separates rows of one group (cut from one scene or recording). If groups are
        unknown, each row has its own number.

    Raises
    ------
    ProtocolError
        If the shapes or values are not as described above.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.features.shape
        if len(shape) != 3 or 0 in shape:
            raise ProtocolError(f"features: must have shape (n, windows, width), none of them 0, got {shape}")
        check_finite("features", self.features)
        for name, values in (("labels", self.labels), ("groups", self.groups)):
            if values.shape != shape[:1]:
                raise ProtocolError(f"{name}: must have shape ({shape[0]},) as the features, got {values.shape}")
        _check_labels("labels", self.labels)


def linear(train: Rows, test: Rows) -> list[Metric]:
    """Accuracy of a multinomial logistic regression on features averaged over windows.

    Features are standardised with statistics of the training rows. `chosen_c` selects the regularisation strength C
    without access to ``test``.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": L-BFGS, at most 1,000
    iterations, C selected by a sweep on validation data.
    """
    check_sides(train, test)
    (predicted,) = _logistic(averaged(train.features), train.labels, averaged(test.features), [chosen_c(train)])
    return [_accuracy(predicted, train.labels, test.labels)]


def chosen_c(train: Rows) -> float:
    """C of `linear`: the best of 1e-4, 1e-3, ..., 10 by number of correct rows in cross-validation within ``train``.

    There are three folds (two if three are not possible), stratified by class and without splitting groups. Each is
    standardised with its own training part. Ties go to the smaller C, which is the stronger regularisation. If there
    are too few groups or classes for two folds whose training parts have at least 2 classes, C is 0.01.
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

    Every window of a training file is a separate example, and all examples are standardised together. The examples of
    a file have a total weight of one. Equal windows of a file (which is no longer than a window) count as one. Ties go
    to the lower class.

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

    check_sides(train, test)
    distinct = [_distinct(windows) for windows in train.features]
    counts = [len(windows) for windows in distinct]
    examples = np.concatenate(distinct).astype(np.float64)
    # C multiplies the sum of errors: with ten windows per file, regularisation would otherwise be ten times as weak.
    weights = np.repeat([1 / count for count in counts], counts)
    with np.errstate(invalid="ignore"):
        # Of a constant feature, rounding can make the weighted variance negative; scikit-learn then leaves it unscaled.
        scaler = StandardScaler().fit(examples, sample_weight=weights)
    # The dual solver was 1.6 times (12,800 x 512, 50 classes) to 3.6 times (6,000 x 1,536) as fast as the primal one.
    model = LinearSVC(C=_SVM_C, dual=True, random_state=_SEED, max_iter=_SVM_ITERATIONS)
    count, windows_per_file, width = test.features.shape
    windows = scaler.transform(test.features.reshape(-1, width).astype(np.float64))
    fitted, asked = _in_span(scaler.transform(examples), windows)
    with _convergence_ignored():
        model.fit(fitted, np.repeat(train.labels, counts), sample_weight=weights)
    scores = model.decision_function(asked).reshape(count, windows_per_file, -1).mean(axis=1)
    if scores.shape[1] == 1:  # for two classes, scikit-learn only returns the values of the second
        scores = np.concatenate([-scores, scores], axis=1)
    return [_accuracy(np.asarray(model.classes_[scores.argmax(axis=1)], np.int64), train.labels, test.labels)]


def knn(train: Rows, test: Rows) -> list[Metric]:
    """Accuracy of a vote of the 20 nearest training rows (or all, if fewer) by cosine of window-averaged features.

    A vote has weight exp(cosine / 0.07). Ties in distance go to the earlier row, ties in votes to the lower class.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"; k and temperature as in
    Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (DINO).
    """
    check_sides(train, test)
    predicted = neighbour_classes(averaged(test.features), averaged(train.features), train.labels)
    return [_accuracy(predicted, train.labels, test.labels)]


def class_retrieval(train: Rows, test: Rows) -> list[Metric]:
    """R@1, 5, 10, 20 and 50: share of test rows with a training row of their class among the k nearest.

    Rows are ranked by cosine of window-averaged features. In a tie, a row of another class ranks first, so that a
    collapsed encoder does not score best. Chance assumes k training rows drawn without replacement, averaged over the
    queries.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Xu et al. 2019, "Self-Supervised Spatiotemporal Learning via Video Clip Order Prediction"; Han et al. 2020,
    "Self-supervised Co-training for Video Representation Learning" (CoCLR): ten windows averaged.
    """
    check_sides(train, test)
    wrong_ahead = np.zeros(len(test.labels), np.int64)
    for queries, similarity in cosines(averaged(test.features), averaged(train.features)):
        same = train.labels == test.labels[queries, None]
        best = np.where(same, similarity, -np.inf).max(axis=1, keepdims=True)
        wrong_ahead[queries] = (~same & (similarity >= best)).sum(axis=1)
    members = np.bincount(train.labels)[test.labels]
    return [
        Metric(f"R@{k}", (wrong_ahead < k).astype(np.float64), _drawn_by_chance(members, len(train.labels), k))
        for k in _CLASS_RECALLS
    ]


def pair_retrieval(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> list[Metric]:
    """R@1, R@5, R@10 and median rank of gallery row i for query row i (`ranks`).

    Chance assumes ranks drawn uniformly from 1..n.
    """
    found = ranks(queries, gallery)
    count = len(found)
    recalls = [Metric(f"R@{k}", (found <= k).astype(np.float64), min(1.0, k / count)) for k in _PAIR_RECALLS]
    return [*recalls, Metric("median_rank", found.astype(np.float64), (count + 1) / 2)]


def ranks(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank, 1 to n, of the correct gallery row for every query, by inner product of the unnormalised rows.

    In a tie, the other row ranks first, so that a collapsed encoder scores worst and not best. Memory is quadratic in n
    (800 MB of scores for 10,000 rows).

    Parameters
    ----------
    queries, gallery
        Shape (n, width); row i of one belongs to row i of the other. For cosines, apply `unit_rows` first.

    Raises
    ------
    ProtocolError
        If the shapes differ, or there are NaN or infinities.
    """
    if queries.ndim != 2 or queries.shape != gallery.shape or 0 in queries.shape:
        shapes = f"{queries.shape} and {gallery.shape}"
        raise ProtocolError(f"queries, gallery: must both have shape (n, width), neither of them 0, got {shapes}")
    check_finite("queries", queries)
    check_finite("gallery", gallery)
    return pair_ranks(queries, gallery)


def scores_accuracy(
    scores: NDArray[np.floating[Any]], labels: NDArray[np.int64], train_labels: NDArray[np.int64]
) -> list[Metric]:
    """Accuracy of the highest class score, for fine-tuned networks; ties go to the lower class.

    Parameters
    ----------
    scores
        Shape (n, classes), finite: scores of each test item, averaged over its windows and crops.
    labels
        Shape (n,): the correct classes.
    train_labels
        Shape (rows,): labels of the training part, for chance.

    Raises
    ------
    ProtocolError
        If shapes do not match, scores are not finite, or a label has no column or no training row.
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise ProtocolError(f"scores: must have shape (n, classes), neither of them 0, got {scores.shape}")
    check_finite("scores", scores)
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


def unweighted_recall(accuracy: Metric, labels: NDArray[np.int64]) -> Metric:
    """Unweighted average recall (UAR): the mean over classes of each class's recall, also called balanced accuracy.

    An item of a class with ``count`` of the ``n`` held-out items has the value n / (classes * count) if it is correct,
    else 0, so that the mean over items is the UAR. The bootstrap of `summarised` keeps these weights. That is exact if
    every group has the same share of each class, and close otherwise. Chance is one class for every item.

    Parameters
    ----------
    accuracy
        Of the same items: 1 if correct, else 0.
    labels
        Shape (n,): the correct classes. Only classes with an item count, as in scikit-learn.

    Raises
    ------
    ProtocolError
        If there is not one label an item.

    References
    ----------
    Schuller et al. 2009, "The INTERSPEECH 2009 Emotion Challenge": classes of emotions are unequal, and always
    answering the largest must not pay.
    """
    _check_labels("labels", labels)
    if labels.shape != accuracy.per_item.shape:
        raise ProtocolError(f"labels: must have shape {accuracy.per_item.shape} as the items, got {labels.shape}")
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights = len(labels) / (len(classes) * counts[place])
    return Metric("UAR", accuracy.per_item * weights, 1 / len(classes))


def averaged(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over windows: (n, windows, width) to (n, width)."""
    return np.asarray(features.mean(axis=1, dtype=np.float64), np.float32)


def check_finite(name: str, rows: NDArray[np.floating[Any]]) -> None:
    """Raise a `ProtocolError` unless rows are finite floating-point numbers."""
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


def check_sides(train: Rows, test: Rows) -> None:
    """Raise a `ProtocolError` unless widths are equal, and every test class is one of at least 2 training classes."""
    widths = train.features.shape[2], test.features.shape[2]
    if widths[0] != widths[1]:
        raise ProtocolError(f"test features: must have the training features' width {widths[0]}, got {widths[1]}")
    _check_classes(train.labels, test.labels)


def _inner_folds(train: Rows) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Row numbers of the training and held-out part of each fold; empty if inner validation is not possible."""
    from sklearn.model_selection import StratifiedGroupKFold

    for count in (3, 2):
        if len(np.unique(train.groups)) < count or np.bincount(train.labels).max() < count:
            continue
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=_SEED)
        with warnings.catch_warnings():
            # It warns about classes with fewer rows than folds. Their held-out rows are wrong for every C alike.
            warnings.simplefilter("ignore", UserWarning)
            folds = list(splitter.split(train.labels, train.labels, train.groups))
        if all(len(held_out) and len(np.unique(train.labels[fitted])) > 1 for fitted, held_out in folds):
            return folds
    return []


def _logistic(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], cs: Sequence[float]
) -> list[NDArray[np.int64]]:
    """Classes of ``test`` predicted by logistic regression with each C; standardises the (n, width) features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(train.astype(np.float64))
    fitted, asked = _in_span(scaler.transform(train.astype(np.float64)), scaler.transform(test.astype(np.float64)))
    # L-BFGS computes hundreds of products of this size. If they are small, waking BLAS threads for each costs more than
    # the product: 7 times as long for 480 rows and 8 classes on two busy cores.
    small = fitted.size * len(np.unique(labels)) < _SMALL_PRODUCT
    with _convergence_ignored(), threadpool_limits(1 if small else None):
        models = [LogisticRegression(C=c, max_iter=_LINEAR_ITERATIONS).fit(fitted, labels) for c in cs]
    return [np.asarray(model.predict(asked), np.int64) for model in models]


def _distinct(windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The windows without repeated ones, in lexicographic order.

    As ``np.unique(windows, axis=0)``, which makes a field of every column: 35 ms a file for 7,680 columns.
    """
    return np.array(sorted(set(map(tuple, windows.tolist()))), windows.dtype)


def _in_span(train: NDArray[np.float64], test: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both rotated into the span of the training rows if these are fewer than the features, else as they are.

    A linear model's solution lies in that span, and an L2 penalty is invariant under rotation, so the solution is the
    same. 400 rows of width 1,536 are fitted about four times as fast by logistic regression, and 320 of 7,680 nine
    times as fast by `svm`.
    """
    if len(train) >= train.shape[1]:
        return train, test
    basis = np.linalg.qr(train.T)[0]
    return train @ basis, test @ basis


@contextmanager
def _convergence_ignored() -> Iterator[None]:
    """Ignore convergence warnings: on separable rows, a weakly regularised fit is correct long before it converges."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        yield


def _drawn_by_chance(members: NDArray[np.int64], total: int, k: int) -> float:
    """Mean probability over queries that k of ``total`` rows, drawn without replacement, include one of ``members``."""
    drawn = np.arange(min(k, total))
    missed = np.maximum(total - members[:, None] - drawn, 0) / (total - drawn)
    return float(1 - missed.prod(axis=1).mean())


def _accuracy(predicted: NDArray[np.int64], train_labels: NDArray[np.int64], test_labels: NDArray[np.int64]) -> Metric:
    """Accuracy of predictions; chance is the accuracy of always predicting the most frequent training class."""
    most_frequent = np.bincount(train_labels).argmax()
    right = (predicted == test_labels).astype(np.float64)
    return Metric("accuracy", right, float((test_labels == most_frequent).mean()))
