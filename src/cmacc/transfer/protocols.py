"""Protocols: features and answers in, metrics out. Nothing here knows of files or encoders."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Strong shrinkage: frozen features are several hundred wide and training sets here are a few hundred rows.
_PROBE_C = 0.01
_NEIGHBOURS = 5


@dataclass(frozen=True)
class Metric:
    """One number of a protocol, with what guessing would give and how many held-out items it is over."""

    name: str
    value: float
    chance: float
    count: int


def linear_probe(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
) -> list[Metric]:
    """Accuracy of a multinomial logistic regression on standardised features (C = 0.01).

    Chance is the accuracy of always naming the most frequent training class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=_PROBE_C, max_iter=2000))
    predicted = probe.fit(train, train_labels).predict(test)
    return [_accuracy(predicted, train_labels, test_labels)]


def knn(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
) -> list[Metric]:
    """Accuracy of the vote of the 5 nearest training rows by cosine, each weighted by its similarity."""
    similarity = unit_rows(test) @ unit_rows(train).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(_NEIGHBOURS, len(train))]
    votes = np.zeros((len(test), int(max(train_labels.max(), test_labels.max())) + 1))
    weights = np.take_along_axis(similarity, nearest, axis=1) + 1.0  # in [0, 2]: a vote never counts against its class
    np.add.at(votes, (np.arange(len(test))[:, None], train_labels[nearest]), weights)
    return [_accuracy(votes.argmax(1), train_labels, test_labels)]


def retrieval(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> list[Metric]:
    """R@1, R@5, R@10 and median rank of finding row i of the gallery by row i of the queries, by inner product.

    An equal score of another row counts as ahead, so that a collapsed encoder scores worst and not best.
    """
    ranks = retrieval_ranks(queries, gallery)
    count = len(ranks)
    recalls = [Metric(f"R@{k}", float((ranks <= k).mean()), min(1.0, k / count), count) for k in (1, 5, 10)]
    return [*recalls, Metric("median_rank", float(np.median(ranks)), (count + 1) / 2, count)]


def retrieval_ranks(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank, from 1, of the right gallery row for every query."""
    scores = queries @ gallery.T
    right = np.diagonal(scores)[:, None]
    return np.asarray((scores >= right).sum(1), np.int64)


def _accuracy(predicted: NDArray[np.int64], train_labels: NDArray[np.int64], test_labels: NDArray[np.int64]) -> Metric:
    most_frequent = np.bincount(train_labels).argmax()
    return Metric(
        "accuracy",
        float((predicted == test_labels).mean()),
        float((test_labels == most_frequent).mean()),
        len(test_labels),
    )


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)
