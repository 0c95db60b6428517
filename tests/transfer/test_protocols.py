import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import hypergeom
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from cmacc.pretraining.features import unit_rows
from cmacc.transfer.metrics import Metric, ProtocolError, summarised
from cmacc.transfer.nearest import prototypes
from cmacc.transfer.protocols import (
    Rows,
    _distinct,
    averaged,
    chosen_c,
    class_retrieval,
    knn,
    linear,
    pair_retrieval,
    ranks,
    scores_accuracy,
    svm,
)
from cmacc.transfer.recipes import RECIPES, crops_of

CLASSIFIERS: list[Callable[[Rows, Rows], list[Metric]]] = [linear, svm, knn]
ALL = [*CLASSIFIERS, prototypes, class_retrieval]


def rows(features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> Rows:
    """Of (n, width) or (n, windows, width) features; each row a group of its own unless told."""
    features = features[:, None] if features.ndim == 2 else features
    groups = np.arange(len(features)) if groups is None else groups
    return Rows(features.astype(np.float32), np.asarray(labels, np.int64), groups)


def taken(side: Rows, which: slice | np.ndarray) -> Rows:
    return Rows(side.features[which], side.labels[which], side.groups[which])


def clouds(
    seed: int, count: int, classes: int, width: int, *, windows: int = 1, noise: float = 1.0, per_group: int = 1
) -> Rows:
    """Overlapping clouds round the corners of a simplex; rows of one group lie close together."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) // per_group % classes
    groups = np.arange(count) // per_group
    of_group = rng.normal(size=(groups[-1] + 1, width))[groups]
    centres = np.eye(classes, width)[labels] * 2 + noise * of_group + 0.3 * noise * rng.normal(size=(count, width))
    return rows(centres[:, None] + 0.3 * noise * rng.normal(size=(count, windows, width)), labels, groups)


@pytest.fixture
def tied() -> tuple[Rows, Rows]:
    """Training and test rows of few directions, on whole numbers: cosines tie again and again."""
    rng = np.random.default_rng(3)
    sides = [rows(rng.integers(-1, 2, (count, 3)) + np.array([0, 0, 2]), np.arange(count) % 4) for count in (60, 40)]
    return sides[0], sides[1]


# Classifiers


@pytest.mark.parametrize("protocol", ALL)
def test_a_planted_encoder_is_right_just_where_its_labels_are(protocol: Callable[[Rows, Rows], list[Metric]]) -> None:
    # 60 test rows of 5 classes, the first 9 of which carry the feature of the next class.
    rng = np.random.default_rng(0)
    train_labels, test_labels = np.arange(100) % 5, np.arange(60) % 5
    seen = np.where(np.arange(60) < 9, (test_labels + 1) % 5, test_labels)

    def planted(labels: np.ndarray) -> np.ndarray:
        return np.eye(5)[labels][:, None] + 0.02 * rng.normal(size=(len(labels), 3, 5))

    train = rows(planted(train_labels), train_labels)
    perfect = protocol(train, rows(planted(test_labels), test_labels))[0]
    assert perfect.value == 1.0
    assert perfect.chance == pytest.approx(0.2)
    spoilt = protocol(train, rows(planted(seen), test_labels))[0]
    assert spoilt.per_item.tolist() == [0.0] * 9 + [1.0] * 51
    assert spoilt.value == 51 / 60


@pytest.mark.parametrize("protocol", CLASSIFIERS)
def test_labels_that_features_do_not_tell_are_guessed(protocol: Callable[[Rows, Rows], list[Metric]]) -> None:
    # Test labels drawn anew are independent of every prediction that has not seen them: hits of 200 are binomial with
    # 1/4, mean 50, deviation 6.1. More than 28 off, 4.5 deviations, has p < 1e-5.
    side = clouds(0, 400, 4, 8, noise=0.5)
    train, test = taken(side, slice(200)), taken(side, slice(200, 400))
    assert protocol(train, test)[0].value > 0.8
    drawn = np.random.default_rng(1).integers(0, 4, 400)
    train, test = (Rows(s.features, labels, s.groups) for s, labels in ((train, drawn[:200]), (test, drawn[200:])))
    assert 22 <= protocol(train, test)[0].per_item.sum() <= 78


@pytest.mark.parametrize("protocol", ALL)
def test_the_same_twice_and_test_rows_are_judged_one_by_one(protocol: Callable[[Rows, Rows], list[Metric]]) -> None:
    side = clouds(5, 160, 3, 6, windows=2)
    train, test = taken(side, slice(100)), taken(side, slice(100, 160))
    other = Rows(test.features[::-1] * np.float32(50), test.labels[::-1].copy(), test.groups)
    mixed = Rows(
        *(np.concatenate([getattr(s, name) for s in (test, other)]) for name in ("features", "labels", "groups"))
    )
    alone, again, among_others = protocol(train, test), protocol(train, test), protocol(train, mixed)
    for first, second, third in zip(alone, again, among_others, strict=True):
        assert first.per_item.tolist() == second.per_item.tolist() == third.per_item[:60].tolist()
    assert 0 < alone[0].value < 1  # otherwise the lists above could not differ


@pytest.mark.parametrize("protocol", CLASSIFIERS)
def test_chance_is_the_most_frequent_training_class(protocol: Callable[[Rows, Rows], list[Metric]]) -> None:
    features = np.random.default_rng(0).normal(size=(14, 3))
    train, test = rows(features[:10], np.array([0] * 8 + [1] * 2)), rows(features[10:], np.array([0, 1, 1, 1]))
    assert protocol(train, test)[0].chance == 0.25
    assert scores_accuracy(np.eye(2)[test.labels], test.labels, train.labels)[0].chance == 0.25


@pytest.mark.parametrize(("count", "width"), [(120, 8), (96, 150)])  # more rows than features, and fewer
def test_linear_against_a_grid_search_of_scikit_learn(count: int, width: int) -> None:
    side = clouds(2, count + 60, 4, width, windows=3, per_group=2)
    train, test = taken(side, slice(count)), taken(side, slice(count, None))
    features = train.features.mean(axis=1)
    folds = list(StratifiedGroupKFold(3, shuffle=True, random_state=0).split(features, train.labels, train.groups))
    assert len({len(held_out) for _, held_out in folds}) == 1  # it averages folds, we rows: the same if of one size
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]},
        cv=folds,
    )
    search.fit(features, train.labels)
    means = search.cv_results_["mean_test_score"]
    assert len(set(means.round(9))) > 2  # C matters here
    assert chosen_c(train) == search.best_params_["logisticregression__C"]
    right = search.predict(test.features.mean(axis=1)) == test.labels
    assert linear(train, test)[0].per_item.tolist() == right.tolist()
    assert 0.3 < right.mean() < 1


def test_the_shrinkage_is_chosen_without_parting_groups() -> None:
    # Groups of 4 near copies, a quarter of the groups with wrong labels. Where copies are parted, weak shrinkage finds
    # them again, wrong label and all; where they are not, it only learns the wrong labels by heart.
    rng = np.random.default_rng(0)
    groups, side_of, is_wrong = np.repeat(np.arange(60), 4), np.arange(60) % 2, rng.random(60) < 0.25
    features = rng.normal(size=(60, 60))
    features[:, :10] += 2 * side_of[:, None] - 1
    features = features[groups] + 0.02 * rng.normal(size=(240, 60))
    labels = (side_of ^ is_wrong)[groups]
    assert chosen_c(rows(features, labels, groups)) <= 0.01
    assert chosen_c(rows(features, labels)) >= 0.1


def test_ties_go_to_the_strongest_shrinkage() -> None:
    side = clouds(0, 90, 3, 4, noise=0.01)  # all right at every C
    assert chosen_c(side) == 1e-4


@pytest.mark.parametrize(
    ("labels", "groups", "is_tested"),
    [
        ([0, 1] * 12, list(range(24)), True),
        ([0, 0, 1, 1] * 6, [0, 0, 0, 0] * 3 + [1, 1, 1, 1] * 3, True),  # two groups: two folds
        ([0, 1] * 12, [0] * 24, False),  # one group
        ([0] * 12 + [1] * 12, [0] * 12 + [1] * 12, False),  # a group a class: training parts of one class
        ([0, 1], [0, 1], False),
        ([0] * 23 + [1], list(range(24)), False),  # the one row of class 1 is held out once
        ([0, 1] * 12 + [2], list(range(25)), True),  # a class of one row beside others
    ],
)
def test_where_inner_validation_is_not_possible_c_is_fixed(
    labels: list[int], groups: list[int], is_tested: bool
) -> None:
    # Features that a tested choice answers with 1e-4 (all Cs tie): one class or cloud far from the other.
    features = np.eye(3)[labels] + 0.001 * np.random.default_rng(0).normal(size=(len(labels), 3))
    side = rows(features, np.asarray(labels), np.asarray(groups))
    assert chosen_c(side) == (1e-4 if is_tested else 0.01)
    assert linear(side, side)[0].value > 0.9  # no warning leaks, all of it runs


def test_an_unconverged_fit_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.transfer.protocols._LINEAR_ITERATIONS", 1)
    monkeypatch.setattr("cmacc.transfer.protocols._SVM_ITERATIONS", 1)
    side = clouds(0, 60, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(side, side)
        svm(side, side)


@pytest.mark.parametrize("classes", [2, 5])
def test_svm_averages_decision_values_over_windows(classes: int) -> None:
    side = clouds(7, 200, classes, 8, windows=4, noise=1.5)
    train, test = taken(side, slice(120)), taken(side, slice(120, 200))
    examples = train.features.reshape(-1, 8).astype(np.float64)
    mean, deviation = examples.mean(axis=0), examples.std(axis=0)
    # The other solver (primal) and one class against the rest at a time: the same problem has one solution.
    scores = np.zeros((80, classes))
    for c in range(classes):
        is_class = np.repeat(train.labels == c, 4)
        # A file's four windows weigh as one: a quarter of C each.
        model = LinearSVC(C=0.01 / 4, dual=False, tol=1e-8).fit((examples - mean) / deviation, is_class)
        for w in range(4):
            scores[:, c] += model.decision_function((test.features[:, w] - mean) / deviation) / 4
    right = scores.argmax(axis=1) == test.labels
    assert svm(train, test)[0].per_item.tolist() == right.tolist()
    assert 0.3 < right.mean() < 1


def test_svm_trains_on_distinct_windows_only() -> None:
    # A short file's windows are all alike: repeated, they must not weigh more than the file's one window.
    side = clouds(8, 90, 3, 5, noise=1.5)
    repeats = np.repeat(side.features, 6, axis=1)
    once, often = taken(side, slice(60)), Rows(repeats[:60], side.labels[:60], side.groups[:60])
    test = clouds(9, 300, 3, 5, noise=1.5)
    assert svm(once, test)[0].per_item.tolist() == svm(often, test)[0].per_item.tolist()
    counted = LinearSVC(C=0.01, dual=False).fit(
        StandardScaler().fit_transform(np.repeat(once.features[:, 0], 6, axis=0)), np.repeat(once.labels, 6)
    )
    by_hand = counted.predict(StandardScaler().fit(once.features[:, 0]).transform(test.features[:, 0])) == test.labels
    assert by_hand.tolist() != svm(often, test)[0].per_item.astype(bool).tolist()  # six times would have differed


@pytest.mark.parametrize("classes", [2, 5])
def test_svm_of_more_features_than_examples_is_that_of_the_unrotated_ones(classes: int) -> None:
    side = clouds(12, 120, classes, 400, windows=2, noise=0.3)
    train, test = taken(side, slice(60)), taken(side, slice(60, 120))
    examples = train.features.reshape(-1, 400).astype(np.float64)
    mean, deviation = examples.mean(axis=0), examples.std(axis=0)
    model = LinearSVC(C=0.01 / 2, dual=True, tol=1e-8, max_iter=100_000)
    model.fit((examples - mean) / deviation, train.labels.repeat(2))
    scores = model.decision_function((test.features.reshape(-1, 400) - mean) / deviation).reshape(60, 2, -1).mean(1)
    scores = np.concatenate([-scores, scores], axis=1) if classes == 2 else scores
    right = scores.argmax(axis=1) == test.labels
    assert svm(train, test)[0].per_item.tolist() == right.tolist()
    assert 0.3 < right.mean() < 1


def test_distinct_windows_are_those_of_numpy() -> None:
    rows = np.random.default_rng(0).integers(-1, 2, (40, 3)).astype(np.float32) * np.float32(0.1)
    rows[::7] = -0.0
    wanted = np.unique(rows, axis=0)
    got = _distinct(rows)
    assert got.dtype == np.float32
    assert np.array_equal(got, wanted)
    assert len(got) < 40


@pytest.mark.parametrize("train_count", [150, 12])  # more and fewer than k
def test_knn_against_scikit_learn(train_count: int) -> None:
    side = clouds(2, 250, 4, 6, windows=2, noise=2.0)
    train, test = taken(side, slice(train_count)), taken(side, slice(150, 250))
    theirs = KNeighborsClassifier(min(20, train_count), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(train.features.mean(axis=1).astype(np.float64), train.labels)
    right = theirs.predict(test.features.mean(axis=1).astype(np.float64)) == test.labels
    assert knn(train, test)[0].per_item.tolist() == right.tolist()
    assert 0.2 < right.mean() < 0.9


def test_knn_ties_against_a_naive_loop(tied: tuple[Rows, Rows]) -> None:
    train, test = tied
    right = []
    for query, label in zip(test.features[:, 0].astype(float), test.labels, strict=True):
        norms = [np.linalg.norm(query) * np.linalg.norm(row) for row in train.features[:, 0].astype(float)]
        cosines = [
            round(float(query @ row) / norm, 10)
            for row, norm in zip(train.features[:, 0].astype(float), norms, strict=True)
        ]
        nearest = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:20]
        votes = [sum(np.exp(cosines[i] / 0.07) for i in nearest if train.labels[i] == c) for c in range(4)]
        right.append(float(votes.index(max(votes)) == label))
    assert knn(train, test)[0].per_item.tolist() == right
    assert 0 < sum(right) < len(right)


def test_equal_votes_go_to_the_lower_class() -> None:
    train = rows(np.ones((4, 37)) / 3, np.array([2, 1, 2, 1]))
    assert knn(train, rows(np.ones((2, 37)), np.array([1, 2])))[0].per_item.tolist() == [1, 0]


def test_scores_accuracy_is_the_share_of_highest_scores() -> None:
    scores = np.array([[0.1, 0.9, 0.0], [5.0, 5.0, 1.0], [-3.0, -2.0, -1.0], [0.2, 0.3, 0.1]], np.float32)
    (metric,) = scores_accuracy(scores, np.array([1, 1, 2, 0]), np.array([0, 1, 2, 2]))
    assert (metric.name, metric.per_item.tolist(), metric.value) == ("accuracy", [1, 0, 1, 0], 0.5)
    assert metric.chance == 0.25


# Retrieval


def test_class_retrieval_against_brute_force_with_ties(tied: tuple[Rows, Rows]) -> None:
    train, test = tied
    expected: dict[int, list[float]] = {k: [] for k in (1, 5, 10, 20, 50)}
    for query, label in zip(test.features[:, 0].astype(float), test.labels, strict=True):
        keys = []
        for row, other in zip(train.features[:, 0].astype(float), train.labels, strict=True):
            cosine = round(float(query @ row) / float(np.linalg.norm(query) * np.linalg.norm(row)), 10)
            keys.append((-cosine, int(other == label)))  # wrong ones first among equals
        order = sorted(keys)
        for k, hits in expected.items():
            hits.append(float(any(right for _, right in order[:k])))
    metrics = class_retrieval(train, test)
    assert [m.name for m in metrics] == [f"R@{k}" for k in expected]
    for metric, hits in zip(metrics, expected.values(), strict=True):
        assert metric.per_item.tolist() == hits
    assert 0 < metrics[0].value < metrics[1].value < 1


def test_class_retrieval_averages_windows_and_ignores_length() -> None:
    side = clouds(3, 150, 4, 6, windows=3, noise=2.0)
    train, test = taken(side, slice(100)), taken(side, slice(100, 150))
    means = [rows(s.features.mean(axis=1) * np.float32(scale), s.labels) for s, scale in ((train, 0.01), (test, 300))]
    for one, other in zip(class_retrieval(train, test), class_retrieval(*means), strict=True):
        assert one.per_item.tolist() == other.per_item.tolist()


@pytest.mark.parametrize("width", [3, 37, 129])
def test_a_collapsed_encoder_scores_worst_and_not_best(width: int) -> None:
    same = np.repeat(np.random.default_rng(0).normal(size=(1, width)), 83, axis=0)
    labels = np.arange(83) % 3
    by_class = class_retrieval(rows(same, labels), rows(same, labels))
    assert [m.value for m in by_class] == [0, 0, 0, 0, 0]  # 55 wrong rows are ahead of the first right one
    copies = same.astype(np.float32)
    assert ranks(copies, copies).tolist() == [83] * 83


def test_copies_tie_in_whichever_order_blas_sums() -> None:
    # At this size OpenBLAS gives copies of one row products that differ by rounding, for most queries.
    rng = np.random.default_rng(0)
    copies, queries = np.repeat(rng.normal(size=(1, 512)), 1025, axis=0), rng.normal(size=(1025, 512))
    assert set(ranks(queries.astype(np.float32), copies.astype(np.float32))) == {1025}
    train_labels = (np.arange(1025) % 25 == 0).astype(np.int64)  # 41 wrong rows, all of them ahead of the right ones
    by_class = class_retrieval(rows(copies, train_labels), rows(queries, np.zeros(1025)))
    assert [m.value for m in by_class] == [0, 0, 0, 0, 1]


def test_class_chance_is_hypergeometric() -> None:
    rng = np.random.default_rng(0)
    train_labels, test_labels = np.repeat([0, 1, 2], [30, 5, 2]), np.array([0, 0, 1, 2, 2, 2])
    train, test = rows(rng.normal(size=(37, 4)), train_labels), rows(rng.normal(size=(6, 4)), test_labels)
    sizes = {0: 30, 1: 5, 2: 2}
    for k, metric in zip((1, 5, 10, 20, 50), class_retrieval(train, test), strict=True):
        expected = np.mean([1 - hypergeom.pmf(0, 37, sizes[c], min(k, 37)) for c in test_labels])
        assert metric.chance == pytest.approx(expected, abs=1e-12)
    # And by drawing: 20,000 draws have a standard error of at most 0.0036, 4.5 of which are exceeded with p < 1e-5.
    drawn = rng.permuted(np.tile(train_labels, (20_000, 1)), axis=1)[:, :5]
    hits = np.mean([(drawn == c).any(axis=1).mean() for c in test_labels])
    assert class_retrieval(train, test)[1].chance == pytest.approx(hits, abs=4.5 * 0.0036)


def test_ranks_against_brute_force_with_ties() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (rng.integers(-2, 3, (40, 3)).astype(np.float32) for _ in range(2))
    expected = []
    for i in range(40):
        scores = [sum(float(a) * float(b) for a, b in zip(queries[i], row, strict=True)) for row in gallery]
        expected.append(sorted(range(40), key=lambda j: (-scores[j], j == i)).index(i) + 1)
    assert ranks(queries, gallery).tolist() == expected
    metrics = {m.name: m for m in pair_retrieval(queries, gallery)}
    assert list(metrics) == ["R@1", "R@5", "R@10", "median_rank"]
    for k in (1, 5, 10):
        assert metrics[f"R@{k}"].value == pytest.approx(np.mean(np.asarray(expected) <= k))
        assert metrics[f"R@{k}"].chance == k / 40
    assert metrics["median_rank"].value == np.median(expected)
    assert metrics["median_rank"].chance == 20.5


def test_retrieval_of_itself_is_perfect() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    embeddings = unit_rows(rows).astype(np.float32)
    assert ranks(embeddings, embeddings).tolist() == [1] * 20
    assert pair_retrieval(embeddings[:3], embeddings[:3])[1].chance == 1.0


def test_random_embeddings_retrieve_at_chance() -> None:
    # Ranks are uniform on 1..n: over 2,000 queries the mean is within 4 standard errors (p < 1e-4) of (n + 1) / 2.
    rng = np.random.default_rng(1)
    found = np.concatenate([ranks(*rng.normal(size=(2, 50, 16)).astype(np.float32)) for _ in range(40)])
    assert abs(found.mean() - 25.5) < 4 * np.sqrt((50**2 - 1) / 12 / len(found))


# Averages


def test_unit_rows_and_averages() -> None:
    lengths = np.linalg.norm(unit_rows(np.array([[3, 4], [1e-3, 0], [0, 0]], np.float32)), axis=1)
    assert lengths == pytest.approx([1, 1, 0])
    features = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    assert averaged(features).tolist() == [[2, 3], [8, 9]]
    assert averaged(features).dtype == np.float32


def split(per_item: np.ndarray, name: str = "accuracy") -> Metric:
    return Metric(name, per_item.astype(np.float64), 0.25)


def test_interval_of_independent_items_is_the_normal_one() -> None:
    # Binomial of 400 at 0.7: 1.96 standard errors are 0.0449. The ends of 2,000 resamples vary by about 0.001.
    right = np.arange(400) < 280
    summary = summarised([split(right)], [np.arange(400)])
    assert (summary.value, summary.by_split, summary.chance, summary.count) == (0.7, [0.7], 0.25, 400)
    assert summary.low == pytest.approx(0.7 - 0.0449, abs=0.005)
    assert summary.high == pytest.approx(0.7 + 0.0449, abs=0.005)


def test_interval_of_groups_that_succeed_together_is_that_of_the_groups() -> None:
    # 100 groups of 4 items, all right or all wrong: as 100 independent items, twice as wide as 400.
    right, groups = np.repeat(np.arange(100) < 70, 4), np.repeat(np.arange(100), 4)
    summary = summarised([split(right)], [groups])
    assert summary.high - summary.low == pytest.approx(2 * 0.0898, abs=0.012)


def test_splits_are_resampled_apart_and_averaged() -> None:
    right, groups = np.arange(100) < 70, np.arange(100)
    one = summarised([split(right)], [groups])
    four = summarised([split(right)] * 3 + [split(np.arange(100) < 30)], [groups] * 4)
    assert four.value == pytest.approx((0.7 * 3 + 0.3) / 4)
    assert four.by_split == pytest.approx([0.7, 0.7, 0.7, 0.3])
    assert four.count == 400
    # The mean of four independent splits varies half as much as one; resampled alike, it would not.
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.15)
    uneven = summarised([split(np.ones(10)), split(np.zeros(90))], [np.arange(10), np.arange(90)])
    assert (uneven.value, uneven.low, uneven.high) == (0.5, 0.5, 0.5)  # of splits, not of items


def test_interval_of_a_median() -> None:
    # Of uniform ranks 1..999 the sample median's deviation is 999 / (2 sqrt 999) = 15.8.
    summary = summarised([split(np.arange(1, 1000), "median_rank")], [np.arange(999)])
    assert summary.value == 500
    assert summary.high - summary.low == pytest.approx(2 * 1.96 * 15.8, rel=0.15)


def test_the_interval_is_the_same_twice_and_of_one_group_is_a_point() -> None:
    right, groups = np.arange(30) % 3 == 0, np.arange(30) // 2
    assert summarised([split(right)], [groups]) == summarised([split(right)], [groups])
    point = summarised([split(right)], [np.zeros(30, np.int64)])
    assert point.low == point.value == point.high == pytest.approx(1 / 3)


def test_recipes_go_by_their_names() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.windows == 10
        assert crops_of(name, "video") == recipe.crops == (3 if name == "finetune" else 1)
        assert crops_of(name, "audio") == crops_of(name, "video_to_audio") == 1
    assert set(RECIPES) == {"linear", "svm", "knn", "prototypes", "finetune", "retrieval", "zero_shot"}


# Bad input


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("features", "labels", "groups", "message"),
    [
        (np.ones((4, 3)), [0] * 4, [0] * 4, r"features: must have shape \(n, windows, width\).*got \(4, 3\)"),
        (np.ones((0, 1, 3)), [], [], r"features: must have shape .*got \(0, 1, 3\)"),
        (np.ones((2, 1, 3), int), [0, 1], [0, 1], "features: must be floating-point numbers, got int64"),
        (np.ones((2, 1, 3)), [0], [0, 1], r"labels: must have shape \(2,\) as the features, got \(1,\)"),
        (np.ones((2, 1, 3)), [0, 1], [0], r"groups: must have shape \(2,\) as the features, got \(1,\)"),
        (np.ones((2, 1, 3)), [0, -1], [0, 1], "labels: must be class indices from 0, got -1"),
        (np.ones((2, 1, 3)), [0.0, 1.0], [0, 1], "labels: must be integers, got float64"),
        (np.array([1, np.nan, np.inf, 2]).reshape(4, 1, 1), [0] * 4, [0] * 4, "features: .* infinity in 2 of 4 rows"),
    ],
)
def test_rows_are_checked(features: np.ndarray, labels: list[float], groups: list[int], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        Rows(features, np.asarray(labels, None if labels else np.int64), np.asarray(groups))


@pytest.mark.parametrize("protocol", ALL)
def test_sides_are_checked(protocol: Callable[[Rows, Rows], list[Metric]]) -> None:
    four = np.ones((4, 2))
    train = rows(four, np.array([0, 1, 0, 1]))
    with pytest.raises(ProtocolError, match="test features: must have the training features' width 2, got 3"):
        protocol(train, rows(np.ones((4, 3)), train.labels))
    with pytest.raises(ProtocolError, match="test labels: must be classes with training rows, got 2, 5"):
        protocol(train, rows(four, np.array([0, 5, 2, 5])))
    with pytest.raises(ProtocolError, match="train labels: must hold at least 2 classes, got 1"):
        protocol(rows(four, np.zeros(4)), rows(four, np.zeros(4)))


@pytest.mark.usefixtures("users_checks")
def test_embeddings_scores_and_splits_are_checked() -> None:
    two = np.eye(2, dtype=np.float32)
    with pytest.raises(ProtocolError, match=r"queries, gallery: .* got \(2, 2\) and \(1, 2\)"):
        pair_retrieval(two, two[:1])
    with pytest.raises(ProtocolError, match=r"gallery: must be finite, got NaN or infinity in 1 of 2 rows"):
        ranks(two, np.array([[1, np.nan], [0, 1]], np.float32))
    labels = np.array([0, 1])
    with pytest.raises(ProtocolError, match=r"scores: must have shape \(n, classes\).*got \(2,\)"):
        scores_accuracy(two[0], labels, labels)
    with pytest.raises(ProtocolError, match=r"scores: must be finite"):
        scores_accuracy(two * np.float32(np.nan), labels, labels)
    with pytest.raises(ProtocolError, match=r"labels: must have shape \(2,\) as the scores, got \(1,\)"):
        scores_accuracy(two, labels[:1], labels)
    with pytest.raises(ProtocolError, match=r"train_labels: must have shape \(rows,\), got \(1, 2\)"):
        scores_accuracy(two, labels, labels[None])
    with pytest.raises(ProtocolError, match="train_labels: must be below the 2 classes scored, got 2"):
        scores_accuracy(two, labels, np.array([0, 2]))
    with pytest.raises(ProtocolError, match="test labels: must be classes with training rows, got 1"):
        scores_accuracy(np.eye(3), np.array([0, 1, 2]), np.array([0, 2]))
    metric = split(np.ones(3))
    with pytest.raises(ProtocolError, match=r"summarised: .*got none of 0 splits and groups of 0"):
        summarised([], [])
    with pytest.raises(ProtocolError, match=r"summarised: .*of 2 splits and groups of 1"):
        summarised([metric, metric], [np.arange(3)])
    with pytest.raises(ProtocolError, match=r"summarised: .*got \['R@1', 'accuracy'\] of 2 splits"):
        summarised([metric, split(np.ones(3), "R@1")], [np.arange(3)] * 2)
    with pytest.raises(ProtocolError, match=r"groups: must have the metric's shape .* got \(4,\) and \(3,\)"):
        summarised([metric], [np.arange(4)])
    with pytest.raises(ProtocolError, match=r"groups: .* n at least 1, got \(0,\) and \(0,\)"):
        summarised([split(np.ones(0))], [np.arange(0)])
