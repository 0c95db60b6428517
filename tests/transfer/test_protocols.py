import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from cmacc.transfer import knn, linear_probe, retrieval, retrieval_ranks


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_ranks_against_sorting() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng.normal(size=(40, 8))), unit(rng.normal(size=(40, 8)))
    expected = [1 + list(np.argsort(-(gallery @ q), kind="stable")).index(i) for i, q in enumerate(queries)]
    assert retrieval_ranks(queries, gallery).tolist() == expected
    metrics = {m.name: m for m in retrieval(queries, gallery)}
    for k in (1, 5, 10):
        assert metrics[f"R@{k}"].value == pytest.approx(np.mean(np.asarray(expected) <= k))
        assert metrics[f"R@{k}"].chance == k / 40
    assert metrics["median_rank"].value == np.median(expected)
    assert metrics["median_rank"].chance == 20.5


def test_retrieval_of_itself_is_perfect_and_a_collapsed_encoder_scores_worst() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(20, 8)))
    assert retrieval_ranks(rows, rows).tolist() == [1] * 20
    same = np.repeat(rows[:1], 20, axis=0)
    assert retrieval_ranks(same, same).tolist() == [20] * 20


def test_random_embeddings_retrieve_at_chance() -> None:
    # Ranks are uniform on 1..n: over 2,000 queries the mean is within 4 standard errors (p < 1e-4) of (n + 1) / 2.
    rng = np.random.default_rng(1)
    ranks = np.concatenate(
        [retrieval_ranks(*unit(rng.normal(size=(2 * 50, 16))).reshape(2, 50, 16)) for _ in range(40)]
    )
    error = np.sqrt((50**2 - 1) / 12 / len(ranks))
    assert abs(ranks.mean() - 25.5) < 4 * error


def test_probe_and_knn_separate_what_is_separable_and_guess_what_is_not() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    rows = unit(np.eye(3)[labels] + 0.1 * rng.normal(size=(120, 3)))
    noise = unit(rng.normal(size=(120, 3)))
    for protocol in (linear_probe, knn):
        (metric,) = protocol(rows[:90], labels[:90], rows[90:], labels[90:])
        assert (metric.name, metric.value, metric.count) == ("accuracy", 1.0, 30)
        assert metric.chance == pytest.approx(1 / 3)
        # 30 guesses at 1/3: more than 22 right has p < 1e-5.
        assert protocol(noise[:90], labels[:90], noise[90:], labels[90:])[0].value <= 22 / 30


def test_knn_against_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 200)
    rows = (np.eye(4)[labels] + 0.6 * rng.normal(size=(200, 4))).astype(np.float32)
    theirs = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: 2 - distance)
    expected = theirs.fit(rows[:150], labels[:150]).score(rows[150:], labels[150:])
    assert knn(rows[:150], labels[:150], rows[150:], labels[150:])[0].value == pytest.approx(expected)


def test_chance_is_the_most_frequent_training_class() -> None:
    train_labels, test_labels = np.array([0] * 8 + [1] * 2), np.array([0, 1, 1, 1])
    rows = np.random.default_rng(0).normal(size=(14, 3)).astype(np.float32)
    assert linear_probe(rows[:10], train_labels, rows[10:], test_labels)[0].chance == 0.25
